"""Peak memory beyond the arguments, as the operating system counts it, each in a fresh process."""

from __future__ import annotations

import ctypes
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from ranks import forkserver

import cfpo_kernels
from bench.memory import can_measure_cpu, cpu_extra_bytes
from cfpo_kernels.linear import fused, head, memory

pytestmark = pytest.mark.skipif(not can_measure_cpu(), reason="needs /proc/self/clear_refs")

MIB = 2**20
M_MMAP_THRESHOLD = -3
N, H, V, CHUNK = 2048, 256, 65536, 256
SHORT = 2 * CHUNK


def keeps_a_second_tile(run: Any) -> Any:
    """The mistake of the old chunked head: a new tile a chunk, before the last one is gone."""
    project = fused._Fused.project

    def new_tile(self: Any, logits: torch.Tensor, chunk: Any) -> Any:
        self.last = getattr(self, "tile", None)
        self.tile = torch.empty_like(logits)
        return project(self, self.tile, chunk)

    fused._Fused.project = new_tile  # type: ignore[method-assign]


def upcasts_whole(run: Any) -> Any:
    head.SLICE = V


def measure(
    n: int,
    dtype: torch.dtype,
    how: dict[str, Any],
    frozen: tuple[str, ...] = (),
    slow: bool = False,
    mistake: Any = None,
) -> int:
    """Bytes beyond the arguments at the peak of forward and backward. In a process of its own."""
    torch.set_num_threads(1)
    # Freed memory goes back at once, so that only what is alive counts, not how the heap is filled.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    if slow:
        from cfpo_kernels.linear import products

        products.is_fast = lambda dtype, device: dtype == torch.float32
    if mistake is not None:
        mistake(None)

    def step(n: int, v: int) -> Any:
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, H, generator=g).to(dtype).requires_grad_("hidden" not in frozen)
        weight = (torch.randn(v, H, generator=g) * 0.05).to(dtype)
        weight.requires_grad_("weight" not in frozen)
        ids, advantages = torch.randint(0, v, (n,), generator=g), torch.randn(n, generator=g)

        def whole() -> None:
            logits = hidden @ weight.t()  # kept until the end, as a caller does
            if how["whole"] is None:
                logps = torch.log_softmax(logits.float(), -1).gather(1, ids[:, None])[:, 0]
                loss = -(torch.exp(logps - logps.detach()) * advantages).mean()
            else:
                loss = cfpo_kernels.cfpo_loss(logits, ids, advantages, inplace=how["whole"])
            loss.backward()

        def call() -> None:
            loss = cfpo_kernels.linear_cfpo_loss(
                hidden, weight, ids, advantages, **{"chunk_tokens": CHUNK} | how
            )
            assert isinstance(loss, torch.Tensor)
            if loss.requires_grad:
                loss.sum().backward()

        return whole if "whole" in how else call

    step(CHUNK + 1, 512)()
    return cpu_extra_bytes(step(n, V))


def extra(*arguments: Any, **more: Any) -> float:
    with ProcessPoolExecutor(1, mp_context=forkserver()) as process:
        return process.submit(measure, *arguments, **more).result() / MIB


def at(n: int, dtype: torch.dtype = torch.float32, converts: bool = False) -> memory.Step:
    return memory.Step(n, V, H, dtype, torch.device("cpu"), CHUNK, converts=converts)


def test_the_gradient_in_forward() -> None:
    """The case in which plain torch needs 1,542 MiB."""
    measured = extra(N, torch.float32, {})
    assert measured <= memory.in_forward(at(N)) / MIB + 16
    assert measured <= 150


@pytest.mark.nightly
def test_a_second_tile_is_noticed() -> None:
    assert (
        extra(SHORT, torch.float32, {}, mistake=keeps_a_second_tile)
        > memory.in_forward(at(SHORT)) / MIB + 16
    )


WAYS = {
    "slices": (torch.float32, {"low_memory": True}, (), False, memory.by_slices),
    "bf16": (torch.bfloat16, {}, (), True, memory.in_forward),
    "bf16-slices": (torch.bfloat16, {"low_memory": True}, (), True, memory.by_slices),
    "no-gradient": (torch.float32, {}, ("hidden", "weight"), False, memory.scoring),
    "late": (torch.float32, {"reduction": "none"}, ("weight",), False, memory.late),
    "whole": (
        torch.float32,
        {"whole": False},
        (),
        False,
        partial(memory.whole_logits, inplace=False),
    ),
    "in-place": (
        torch.float32,
        {"whole": True},
        (),
        False,
        partial(memory.whole_logits, inplace=True),
    ),
    "plain torch": (torch.float32, {"whole": None}, (), False, memory.plain_torch),
}


@pytest.mark.parametrize(
    "way", [pytest.param(x, marks=() if x == "bf16" else pytest.mark.nightly) for x in WAYS]
)
def test_other_ways(way: str) -> None:
    dtype, how, frozen, slow, formula = WAYS[way]
    measured = extra(SHORT, dtype, how, frozen, slow)
    most = formula(at(SHORT, dtype, slow)) / MIB
    assert measured <= most + 16
    assert measured >= 0.8 * most or slow  # what is converted need not all be there at a time


@pytest.mark.nightly
def test_whole_upcast_operands_are_noticed() -> None:
    measured = extra(SHORT, torch.bfloat16, {}, (), True, upcasts_whole)
    assert measured > memory.in_forward(at(SHORT, torch.bfloat16, True)) / MIB + 16
