"""Peak memory beyond the arguments, as the operating system counts it, each in a fresh process."""

from __future__ import annotations

import ctypes
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from heads import forkserver

import cfpo_kernels
from bench.memory import can_measure_cpu, cpu_extra_bytes
from cfpo_kernels.linear import fused, head

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

        def call() -> None:
            loss = cfpo_kernels.linear_cfpo_loss(
                hidden, weight, ids, advantages, **{"chunk_tokens": CHUNK} | how
            )
            assert isinstance(loss, torch.Tensor)
            if loss.requires_grad:
                loss.sum().backward()

        return call

    step(CHUNK + 1, 512)()
    return cpu_extra_bytes(step(n, V))


def extra(*arguments: Any, **more: Any) -> float:
    with ProcessPoolExecutor(1, mp_context=forkserver()) as process:
        return process.submit(measure, *arguments, **more).result() / MIB


def rows(n: int, b: int, *, chunks: bool) -> float:
    """MiB of a tile, the gradient of hidden states, that of the weight in float32 or its dtype."""
    return (CHUNK * V * b + n * H * b + V * H * (4 if chunks else b)) / MIB


def slices(n: int, b: int) -> float:
    """MiB: the kept tile, gradients of hidden states in float32 and their dtype, the weight's."""
    columns = head.SLICE
    return (CHUNK * (V + columns) * b + n * H * (4 + b) + V * H * b + columns * H * 4) / MIB


def test_the_gradient_in_forward() -> None:
    """The case in which plain torch needs 1,542 MiB."""
    measured = extra(N, torch.float32, {})
    assert measured <= rows(N, 4, chunks=True) + 16
    assert measured <= 150


@pytest.mark.nightly
def test_a_second_tile_is_noticed() -> None:
    assert (
        extra(SHORT, torch.float32, {}, mistake=keeps_a_second_tile)
        > rows(SHORT, 4, chunks=True) + 16
    )


WAYS = {
    "slices": (torch.float32, {"low_memory": True}, (), False, slices(SHORT, 4)),
    "bf16": (torch.bfloat16, {}, (), True, rows(SHORT, 2, chunks=True)),
    "bf16-slices": (torch.bfloat16, {"low_memory": True}, (), True, slices(SHORT, 2)),
    "no-gradient": (torch.float32, {}, ("hidden", "weight"), False, CHUNK * V * 4 / MIB),
    "late": (
        torch.float32,
        {"reduction": "none"},
        ("weight",),
        False,
        (CHUNK * V + SHORT * H) * 4 / MIB,
    ),
}


@pytest.mark.parametrize(
    "way", [pytest.param(x, marks=() if x == "bf16" else pytest.mark.nightly) for x in WAYS]
)
def test_other_ways(way: str) -> None:
    dtype, how, frozen, slow, most = WAYS[way]
    upcast = 3 * head.SLICE * max(H, CHUNK) * 4 / MIB if slow else 0
    measured = extra(SHORT, dtype, how, frozen, slow)
    assert measured <= most + upcast + 16


@pytest.mark.nightly
def test_whole_upcast_operands_are_noticed() -> None:
    upcast = 3 * head.SLICE * max(H, CHUNK) * 4 / MIB
    measured = extra(SHORT, torch.bfloat16, {}, (), True, upcasts_whole)
    assert measured > rows(SHORT, 2, chunks=True) + upcast + 16
