"""What the CUDA backend says without a GPU, and which devices a build runs on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_native import FakeNative

import cfpo_kernels
from cfpo_kernels import BackendUnavailableError
from cfpo_kernels.backends import cpu, cuda, resolve


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("120f-real", [(12, 0), (12, 1)], [(10, 3)]),
        ("80-virtual", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("90a-real,80", [(8, 6), (10, 0)], [(7, 5)]),
        ("90a-virtual", [(9, 0)], [(10, 0)]),
    ],
)
def test_which_devices_a_build_runs_on(
    archs: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(cuda.runs_on(archs, capability) for capability in runs)
    assert not any(cuda.runs_on(archs, capability) for capability in does_not)


def test_cpu_tensors_are_refused_and_untouched() -> None:
    logits = torch.randn(2, 10, requires_grad=True)
    before = logits.detach().clone()
    ids = torch.zeros(2, dtype=torch.int64)
    reason = "built without CUDA"
    if cpu.native.cuda_built:
        reason = "CUDA tensors.* cpu" if torch.cuda.is_available() else "no usable GPU"
    with pytest.raises(BackendUnavailableError, match=f"backend='cuda'.*{reason}"):
        cfpo_kernels.cfpo_loss(logits, ids, torch.ones(2), inplace=True, backend="cuda")
    assert torch.equal(logits, before)


@pytest.mark.skipif(
    not cpu.native.cuda_built or torch.cuda.is_available(), reason="needs CUDA without a GPU"
)
def test_a_failure_names_the_kernel_the_device_and_the_cause() -> None:
    rows = (0, 0, 1, 1000, 1, 0, 1000)
    where = {"device": 0, "stream": 0, "workspace": 0, "row_kernel": "auto"}
    with pytest.raises(RuntimeError, match=r"multiply_kernel on device 0 failed: cudaError\w+: \w"):
        cpu.native.cuda.multiply_rows(rows=rows, factors=0, factor_stride=0, **where)
    with pytest.raises(RuntimeError, match=r"on device 0 failed: cudaError\w+: \w"):
        cpu.native.cuda.workspace_bytes(rows, 0)


@pytest.mark.parametrize(("major", "available"), [(9, True), (8, False)])
def test_the_status_says_what_it_sees(
    major: int, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeNative("A Device", major, 0)
    monkeypatch.setattr(cpu, "native", fake)
    monkeypatch.setattr(cuda, "native", fake)
    status = cfpo_kernels.available_backends()["cuda"]
    assert bool(status) is available and "A Device" in status.detail
    assert ("does not run here" in status.detail) is not available


class OldDriver(FakeNative):
    """The same where torch runs, by a CUDA runtime of its own, and the module does not."""

    status = 35

    def cuda_query(self) -> dict[str, Any]:
        if self.status == 0:
            return super().cuda_query()
        return {
            "status": self.status,
            "status_name": "cudaErrorInsufficientDriver",
            "status_text": "this build needs driver 580 or newer",
            "devices": [],
        }


def test_torch_may_run_on_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = OldDriver("A Device", 9, 0)
    monkeypatch.setattr(cpu, "native", fake)
    monkeypatch.setattr(cuda, "native", fake)
    monkeypatch.setattr(cuda, "_usable", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = torch.device("cuda", 0)
    reason = "no usable GPU (cudaErrorInsufficientDriver: this build needs driver 580 or newer)"
    assert cuda.why_not(device) == reason
    status = cfpo_kernels.available_backends()["cuda"]
    assert not status and reason in status.detail
    with pytest.raises(BackendUnavailableError, match="driver 580 or newer"):
        resolve("cuda", device, torch.bfloat16, 1000)
    fake.status = 0
    assert cuda.why_not(device) == "", "asked again"
    fake.status = 35
    assert resolve("cuda", device, torch.bfloat16, 1000) == "cuda", "not asked any more"


@pytest.mark.skipif(
    not cpu.native.cuda_built or cpu.native.cuda_query()["driver_version"] != 0,
    reason="needs CUDA without a driver",
)
def test_without_a_driver_the_status_says_which_is_needed() -> None:
    detail = cfpo_kernels.available_backends()["cuda"].detail
    assert "no usable GPU (cudaErrorInsufficientDriver: there is no NVIDIA driver" in detail
    assert "needs driver 580 or newer" in detail
