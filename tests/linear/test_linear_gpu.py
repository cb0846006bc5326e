"""The loss from hidden states on a GPU; on every commit the same functions run on the CPU.

What a CPU does not have, a graph or a guard against syncs, is left out there, and the products are
of float32 or of converted operands.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from heads import (
    HeadCase,
    check,
    is_noticed,
    linear,
    logits_of,
    make,
    planted,
    regularizers,
    relative,
    whole,
)
from ranks import forkserver
from torch import Tensor

import cfpo_kernels
from bench.memory import can_measure_cpu, cpu_extra_bytes, cuda_extra_bytes
from cfpo_kernels import PPOClip
from cfpo_kernels.backends import cuda
from cfpo_kernels.linear import api, fused, head, memory, products

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        torch.cuda.is_available() and bool(cuda.why_not(torch.device("cuda"))),
        reason="no CUDA kernels for this device in this build",
    ),
]

on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
on_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# Rows in seven chunks, the last of 8; on a GPU rows that its kernels for long rows take.
N, CHUNK, H = 200, 32, 64
V = {"cpu": 1003, "cuda": 32003}


def case_on(device: str, dtype: torch.dtype = torch.float32, **how: Any) -> HeadCase:
    made = make(N, V[device], H, dtype, **{"spread": 1.0, "mask_every": 7} | how)
    return on(made, device)


def on(case: HeadCase, device: str) -> HeadCase:
    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    tensors = {name: moved(x) for name, x in vars(case).items() if isinstance(x, Tensor)}
    options = {name: moved(x) for name, x in case.options.items()}
    return replace(case, **tensors, options=options)


def how_on(device: str, **how: Any) -> dict[str, Any]:
    return {"backend": device, "chunk_tokens": CHUNK} | how


# Each schedule of docs/linear.md by what takes it: R, S, and L of a frozen head.
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "R": ({}, ()),
    "R frozen": ({}, ("weight",)),
    "S": ({"low_memory": True}, ()),
    "L": ({"reduction": "none"}, ("weight",)),
    "PPO": ({"objective": PPOClip()}, ()),
}
each_way = pytest.mark.parametrize("way", WAYS)


# --- Values and gradients, against float64 -------------------------------------------------------


@on_each_device
@each_way
def test_float32(device: str, way: str) -> None:
    how, frozen = WAYS[way]
    case = case_on(device, bias=True)
    case.options |= on_options(case, device)
    got = linear(case, frozen=frozen, stats=True, **how_on(device), **how)
    check(got, whole(case, frozen=frozen, **how), 1e-5)


def on_options(case: HeadCase, device: str) -> dict[str, Any]:
    """Regularizers, whose random numbers are the CPU's."""
    found = regularizers(on(case, "cpu"), torch.Generator().manual_seed(3))
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in found.items()}


# By dtype of logits: rounding of logits and of their gradient; of the gradient that is returned.
LARGEST = {torch.bfloat16: 2e-2, torch.float32: 5e-3}


@on_each_device
@each_way
@pytest.mark.parametrize("logits_dtype", LARGEST, ids=str)
def test_bfloat16_is_summed_in_float32(device: str, way: str, logits_dtype: torch.dtype) -> None:
    """As exact in seven chunks as in one, and as what the gradient is rounded to."""
    how, frozen = WAYS[way]
    case = case_on(device, torch.bfloat16, idle_every=0)
    want = whole(case, frozen=frozen, **how)

    def errors(chunk: int) -> dict[str, float]:
        more = {"logits_dtype": logits_dtype, "chunk_tokens": chunk}
        got = linear(case, frozen=frozen, **how_on(device, **more), **how)
        assert got.gradients.keys() == want.gradients.keys()
        return {name: relative(x, want.gradients[name]) for name, x in got.gradients.items()}

    one, many = errors(N), errors(CHUNK)
    assert all(0 < error < LARGEST[logits_dtype] for error in one.values()), one
    assert all(many[name] <= 1.05 * error for name, error in one.items()), (one, many)


def test_sums_in_bfloat16_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, "R", ({"accumulate": "weight"}, ()))
    monkeypatch.setattr(api, "FEW_CHUNKS", 64)
    is_noticed(lambda: test_bfloat16_is_summed_in_float32("cpu", "R", torch.bfloat16))


@pytest.mark.gpu
@each_way
def test_products_are_written_in_float32(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the products that have such a result: operands of bfloat16 are not converted."""
    assert products.widens(torch.bfloat16, torch.device("cuda")), "torch 2.8 or newer"
    seen: list[tuple[torch.dtype, torch.dtype | None]] = []
    for name in ("mm", "addmm"):
        known = getattr(torch, name)

        def noted(*args: Any, _known: Any = known, **more: Any) -> Tensor:
            seen.append((args[-1].dtype, more["out"].dtype if "out" in more else None))
            return _known(*args, **more)

        monkeypatch.setattr(products.torch, name, noted)
    how, frozen = WAYS[way]
    case = case_on("cuda", torch.bfloat16)
    linear(case, frozen=frozen, **how_on("cuda", logits_dtype=torch.float32), **how)
    assert (torch.bfloat16, torch.float32) in seen


@pytest.fixture
def gpu_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """torch's products that write float32, which it has for GPUs only, of CPU tensors.

    torch checks the call as it does there, and they check what reaches them.
    """
    if not hasattr(torch.ops.aten.mm, "dtype_out"):
        pytest.skip("torch 2.8 or newer has them")
    called = []

    def check_operands(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> None:
        assert a.dtype == b.dtype in (torch.bfloat16, torch.float16)
        assert out_dtype == out.dtype == torch.float32
        assert out.shape == (a.shape[0], b.shape[1])

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        check_operands(a, b, out_dtype, out)
        called.append("mm")
        return out.copy_(a.float() @ b.float())

    def addmm(
        x: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor, **scales: float
    ) -> Tensor:
        check_operands(a, b, out_dtype, out)
        assert x.data_ptr() == out.data_ptr() and x.stride() == out.stride() and not scales
        called.append("addmm")
        return out.copy_(x + a.float() @ b.float())

    monkeypatch.setattr(products, "widens", lambda dtype, device: dtype.itemsize == 2)
    monkeypatch.setattr(products, "is_fast", lambda dtype, device: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype_out", mm, "CPU")
        library.impl("addmm.dtype_out", addmm, "CPU")
        yield called


@each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_calls_of_a_gpus_products(
    way: str, dtype: torch.dtype, gpu_products: list[str]
) -> None:
    how, frozen = WAYS[way]
    case = case_on("cpu", dtype, idle_every=0, bias=True)
    want = whole(case, frozen=frozen, **how)
    for logits_dtype in (dtype, torch.float32):
        gpu_products.clear()
        got = linear(case, frozen=frozen, **how_on("cpu", logits_dtype=logits_dtype), **how)
        for name, exact in want.gradients.items():
            assert relative(got.gradients[name], exact) < LARGEST[torch.bfloat16]
        # To a bias in float32, to other chunks' gradient of the head, to other slices' of rows.
        assert "addmm" in gpu_products or (way == "R frozen" and logits_dtype == dtype)


def test_a_product_that_adds_nothing_would_be_noticed(gpu_products: list[str]) -> None:
    product = products.product

    def forgets(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
        product(out, a, b, add=add and out.dtype == a.dtype)

    with planted(head, "product", forgets):
        is_noticed(lambda: test_the_calls_of_a_gpus_products("R", torch.bfloat16, gpu_products))


@on_each_device
@on_each_dtype
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=str)
def test_log_probs(device: str, dtype: torch.dtype, frozen: tuple[str, ...]) -> None:
    case = case_on(device, dtype)
    mask = case.options["mask"]
    factors = torch.where(mask, torch.linspace(0.5, 2.0, N, device=device), 0.0)

    def of(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(logits, -1)
        logps = log_p.gather(1, case.token_ids[:, None])[:, 0]
        return logps.where(mask, 0.0), -(log_p.exp() * log_p).sum(-1).where(mask, 0.0)

    given, exact = case.leaves(frozen), case.leaves(frozen, torch.float64)
    got = cfpo_kernels.linear_token_logps(
        given["hidden"],
        given["weight"],
        case.token_ids,
        mask=mask,
        return_entropy=True,
        **how_on(device, logits_dtype=torch.float32),
    )
    want = of(logits_of(exact, {}))
    for values in (got, want):
        sum((x * factors).sum() for x in values).backward()  # type: ignore[union-attr]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    limit = 1e-5 if dtype == torch.float32 else LARGEST[torch.float32]
    for name, leaf in exact.items():
        if leaf.grad is not None:
            assert relative(given[name].grad, leaf.grad) <= limit  # type: ignore[arg-type]


@on_each_device
@on_each_dtype
def test_scoring_and_training_have_the_same_bits(device: str, dtype: torch.dtype) -> None:
    """r is exactly 1, and linear_cfpo_loss is linear_policy_loss."""
    case = case_on(device, dtype)
    given = case.leaves()
    common = {"mask": case.options["mask"], **how_on(device)}
    place = (given["hidden"], given["weight"], case.token_ids)
    scored = cfpo_kernels.linear_token_logps(*place, **common).detach()  # type: ignore[union-attr]
    loss = cfpo_kernels.linear_cfpo_loss(
        *place, case.advantages, scored, reduction="none", **common
    )
    assert torch.equal(loss, -case.advantages.where(common["mask"], 0.0))
    case.old_logps = scored + 0.1
    want = linear(case, **how_on(device))
    got = cfpo_kernels.linear_cfpo_loss(*place, case.advantages, case.old_logps, **common)
    got.backward()
    assert torch.equal(got.detach(), want.loss)
    assert torch.equal(given["weight"].grad, want.gradients["weight"])


# --- A step waits for nothing, and can be captured ------------------------------------------------


@contextmanager
def no_syncs(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Step:
    """Loss and gradients, again and again, of tensors that stay where they are."""

    def __init__(self, device: str, dtype: torch.dtype, way: str) -> None:
        (self.how, frozen), self.device = WAYS[way], device
        self.case = case_on(device, dtype)
        active = int(self.case.options["mask"].sum())
        self.how = how_on(device, active_tokens=active + 3, stats=True) | self.how
        self.leaves = self.case.leaves(frozen)

    def __call__(self) -> list[Tensor]:
        for leaf in self.leaves.values():
            leaf.grad = None
        found = linear(self.case, leaves=self.leaves, **self.how)
        assert found.stats is not None
        return [found.loss, *found.gradients.values(), *found.stats]

    def same(self, got: list[Tensor], want: list[Tensor]) -> bool:
        """Bit by bit; statistics of what was not asked for are NaN."""
        return len(got) == len(want) and all(
            torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
            for x, y in zip(got, want, strict=True)
        )

    def change(self, seed: int) -> None:
        other = make(N, V[self.device], H, self.case.hidden.dtype, seed=seed, spread=1.0)
        with torch.no_grad():
            self.leaves["hidden"].copy_(other.hidden)
        self.case.token_ids.copy_(other.token_ids)
        self.case.advantages.copy_(other.advantages)

    def captured(self) -> tuple[Callable[[], None], list[Tensor]]:
        """What repeats the step, and where it leaves what it found."""
        if self.device == "cpu":
            kept = [x.clone() for x in self()]

            def again() -> None:
                for x, found in zip(kept, self(), strict=True):
                    x.copy_(found)

            return again, kept
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = self()
        return graph.replay, kept


@on_each_device
@on_each_dtype
@each_way
def test_no_step_waits_for_the_device(device: str, dtype: torch.dtype, way: str) -> None:
    step = Step(device, dtype, way)
    want = [x.clone() for x in step()]
    with no_syncs(device):
        got = step()
    assert step.same(got, want)
    assert got[0].isfinite().all() and got[1].isfinite().all() and got[1].any()


@on_each_device
@on_each_dtype
@each_way
def test_a_graph_of_a_step(device: str, dtype: torch.dtype, way: str) -> None:
    """Replayed it has the bits of an eager step, of other values too."""
    step = Step(device, dtype, way)
    replay, kept = step.captured()
    for seed in (1, 2):
        step.change(seed)
        want = [x.clone() for x in step()]
        for x in kept:
            x.fill_(7.0)
        replay()
        assert step.same(kept, want)
        assert want[0].isfinite().all() and want[1].isfinite().all()


# --- Memory --------------------------------------------------------------------------------------

MIB = 2**20
SLACK = 16 * MIB
# (N, H, V) of chunks of 256: a tile of 32 MiB, or of 125 MiB.
SIZES = {"cpu": (512, 64, 32768), "cuda": (2048, 512, 128256)}
ROWS = 256
FORMULAS = {
    "R": memory.in_forward,
    "S": memory.by_slices,
    "L": memory.late,
    "no gradient": memory.scoring,
}


def keeps_a_second_tile() -> None:
    project = fused._Fused.project

    def new_tile(self: Any, logits: Tensor, chunk: Any) -> Any:
        self.last = getattr(self, "tile", None)
        self.tile = torch.empty_like(logits)
        return project(self, self.tile, chunk)

    fused._Fused.project = new_tile  # type: ignore[method-assign]


def measure(device: str, dtype: torch.dtype, way: str, mistake: Callable[[], None] | None) -> int:
    """Bytes beyond the arguments at the peak of a step; in a process of its own on a CPU."""
    how, frozen = WAYS.get(way, ({}, ("hidden", "weight")))
    if device == "cpu":
        torch.set_num_threads(1)
        ctypes.CDLL(None).mallopt(-3, MIB)  # freed memory goes back at once
    if mistake is not None:
        mistake()

    def step(n: int, h: int, v: int) -> Callable[[], None]:
        g = torch.Generator(device).manual_seed(0)
        like: dict[str, Any] = {"device": device, "generator": g}
        hidden = torch.randn(n, h, **like).to(dtype).requires_grad_("hidden" not in frozen)
        weight = (torch.randn(v, h, **like) * 0.05).to(dtype)
        weight.requires_grad_("weight" not in frozen)
        ids, advantages = torch.randint(v, (n,), **like), torch.randn(n, **like)

        def call() -> None:
            loss = cfpo_kernels.linear_cfpo_loss(
                hidden, weight, ids, advantages, backend=device, chunk_tokens=ROWS, **how
            )
            assert isinstance(loss, Tensor)
            if loss.requires_grad:
                loss.sum().backward()

        return call

    n, h, v = SIZES[device]
    step(ROWS + 1, h, 512)()
    if device == "cpu":
        return cpu_extra_bytes(step(n, h, v))
    step(n, h, v)()  # what cuBLAS keeps for itself
    return cuda_extra_bytes(step(n, h, v))


def over_the_formula(
    device: str, dtype: torch.dtype, way: str, mistake: Callable[[], None] | None = None
) -> float:
    n, h, v = SIZES[device]
    allowed = FORMULAS[way](memory.Step(n, v, h, dtype, torch.device(device), ROWS))
    if device != "cpu":
        return measure(device, dtype, way, mistake) - allowed - SLACK
    with ProcessPoolExecutor(1, mp_context=forkserver()) as process:
        return process.submit(measure, device, dtype, way, mistake).result() - allowed - SLACK


@on_each_device
@pytest.mark.skipif(not can_measure_cpu(), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("way", FORMULAS)
def test_memory_is_that_of_the_formula(device: str, way: str) -> None:
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        assert over_the_formula(device, dtype, way) <= 0


@pytest.mark.skipif(not can_measure_cpu(), reason="needs /proc/self/clear_refs")
def test_a_second_tile_would_be_noticed() -> None:
    assert over_the_formula("cpu", torch.float32, "R", keeps_a_second_tile) > 0
