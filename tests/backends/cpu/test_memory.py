"""Peak extra memory of a step, as the operating system counts it, each in a fresh process."""

from __future__ import annotations

import pytest
import torch

from bench.memory import CpuMemoryProbe, can_measure_cpu

pytestmark = pytest.mark.skipif(not can_measure_cpu(), reason="needs /proc/self/clear_refs")

CASE = "cpu-128256-bf16"
LOGITS = 512 * 128256 * 2  # bytes
MIB = 2**20


@pytest.fixture(scope="module")
def probe() -> CpuMemoryProbe:
    return CpuMemoryProbe(min(2, torch.get_num_threads()))


def extra(probe: CpuMemoryProbe, name: str) -> int:
    measured = probe.extra_bytes(CASE, name)
    assert measured is not None
    return measured


@pytest.mark.slow
def test_inplace_needs_less_than_a_mebibyte(probe: CpuMemoryProbe) -> None:
    assert extra(probe, "cpu-inplace") < MIB


@pytest.mark.slow
def test_otherwise_one_gradient(probe: CpuMemoryProbe) -> None:
    assert LOGITS - MIB < extra(probe, "cpu-outofplace") < LOGITS + MIB


@pytest.mark.slow
def test_without_a_gradient_less_than_a_mebibyte(probe: CpuMemoryProbe) -> None:
    assert extra(probe, "cpu-forward") < MIB
