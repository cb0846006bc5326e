"""What is particular to the Triton kernels on a GPU; tests/every_target has the rest.

Nothing counts as verified there until both have passed on it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from oracle import (
    Case,
    check,
    check_gradient,
    make_case,
    oracle,
    peak_over_a_flat_tail,
    run,
    with_everything,
)

import cfpo_kernels

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOW: dict[str, Any] = {"backend": "triton", "device": "cuda"}


@pytest.mark.parametrize("v", [1, 7, 1000, 16384, 50257, 128256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_term_at_once(dtype: torch.dtype, v: int) -> None:
    for rows in (5, 300):  # split rows, whole rows
        if rows * v < 3e7:
            case = with_everything(make_case(rows, v, dtype, seed=v, mask_every=4))
            check(case, **HOW)
            check(case, inplace=True, **HOW)


@pytest.mark.parametrize("peak", [0.5, 0.99, 0.9999])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_likely_tokens_and_offsets(dtype: torch.dtype, peak: float) -> None:
    check(make_case(16, 4096, dtype, peak=peak), **HOW)
    if dtype != torch.float16:
        check(make_case(16, 4096, dtype, peak=peak, offset=1e4), **HOW)


def test_a_flat_tail_far_below_the_peak() -> None:
    for below in (12.0, 23.0, 24.5, 26.0):
        check(peak_over_a_flat_tail(262144, torch.bfloat16, 0.01, below), **HOW)


def test_powers_of_two_are_exact() -> None:
    """The hardware's exp2 of whole numbers: segments merge by it."""
    x = torch.arange(-126, 128, device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)
    exp2_kernel[(1,)](x, y, len(x), BLOCK=256)
    assert torch.equal(y, torch.ldexp(torch.ones_like(x), x.int()))


@triton.jit
def exp2_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.exp2(tl.load(x_ptr + i, mask=i < n)), mask=i < n)


def test_the_slice_of_a_trainer() -> None:
    for v in (32000, 50257):
        flat = make_case(30, v, torch.bfloat16)
        whole = flat.logits.view(5, 6, v)
        case = Case(
            whole[:, :-1],
            flat.token_ids.view(5, 6)[:, :-1],
            flat.advantages.view(5, 6)[:, :-1],
            flat.old_logps.view(5, 6)[:, :-1],
        )
        check(case, **HOW)
        check(case, inplace=True, **HOW)


@pytest.mark.parametrize("v", [1001, 50257])
def test_any_address(v: int) -> None:
    flat = make_case(12, v, torch.bfloat16, mask_every=5)
    want = check(flat, **HOW)
    for first in (1, 3, 8):
        memory = torch.zeros(12 * (v + first) + 8, dtype=torch.bfloat16)
        logits = memory[first:].as_strided((12, v), (v + first, 1), first)
        logits.copy_(flat.logits)
        case = Case(logits, flat.token_ids, flat.advantages, flat.old_logps, flat.options)
        for inplace in (False, True):
            got = run(case, inplace=inplace, **HOW)
            assert torch.equal(got.dlogits, want.dlogits) and torch.equal(got.logps, want.logps)


@pytest.mark.parametrize("v", [7, 1000, 32000, 50257, 128256])
def test_a_row_depends_on_itself_only(v: int) -> None:
    """Bitwise: alone (split), among many (whole), scored, and over 100 repetitions."""
    case = with_everything(make_case(400 if v < 4096 else 150, v, torch.bfloat16))
    case.options["normalizer"] = 7.0
    want = check(case, **HOW)
    for _ in range(100 if v == 32000 else 3):
        got = run(case, inplace=True, **HOW)
        assert torch.equal(got.dlogits, want.dlogits) and torch.equal(got.logps, want.logps)
    part = {k: x[3:5] if isinstance(x, torch.Tensor) else x for k, x in case.options.items()}
    few = Case(
        case.logits[3:5], case.token_ids[3:5], case.advantages[3:5], case.old_logps[3:5], part
    )
    got = run(few, **HOW)
    assert torch.equal(got.dlogits, want.dlogits[3:5]) and torch.equal(got.logps, want.logps[3:5])
    scored = cfpo_kernels.token_logps(
        case.logits.cuda(),
        case.token_ids.cuda(),
        temperature=case.options["temperature"].cuda(),
        backend="triton",
    )
    assert torch.equal(scored.cpu(), want.logps)


def test_split_backward() -> None:
    for v in (1000, 50257, 262144):
        case = make_case(6, v, torch.bfloat16)
        for inplace in (False, True):
            logits = case.logits.cuda().requires_grad_()
            logps, entropy = cfpo_kernels.token_logps(
                logits,
                case.token_ids.cuda(),
                return_entropy=True,
                inplace=inplace,
                backend="triton",
            )
            (logps * 0.5 - entropy * 0.1).sum().backward()
            leaf = case.logits.double().requires_grad_()
            log_p = torch.log_softmax(leaf, -1)
            picked = log_p.gather(1, case.token_ids[:, None]).sum()
            (picked * 0.5 + (log_p.exp() * log_p).sum() * 0.1).backward()
            error = (logits.grad.cpu().double() - leaf.grad).norm(dim=-1)
            rounding = (leaf.grad.bfloat16().double() - leaf.grad).norm(dim=-1)
            assert (error <= 1.1 * rounding + 2e-5 * leaf.grad.norm(dim=-1)).all()


def on_cuda(case: Case) -> tuple[torch.Tensor, ...]:
    tensors = (case.logits, case.token_ids, case.advantages, case.old_logps)
    return tuple(x.cuda() for x in tensors)


def test_replays_in_a_cuda_graph() -> None:
    for rows in (300, 4):  # whole and split rows
        case = make_case(rows, 50257, torch.bfloat16)
        logits, *rest = on_cuda(case)
        leaf = logits.clone().requires_grad_()

        def step(leaf: torch.Tensor = leaf, rest: list[torch.Tensor] = rest) -> torch.Tensor:
            loss = cfpo_kernels.cfpo_loss(leaf, *rest, backend="triton")
            leaf.grad = None
            loss.backward()
            return loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        other = make_case(rows, 50257, torch.bfloat16, seed=1)
        for new, old in zip(on_cuda(other), (leaf.detach(), *rest), strict=True):
            old.copy_(new)
        graph.replay()
        want = oracle(other)
        assert loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
        check_gradient(leaf.grad.cpu(), want.dlogits, other)


def test_runs_on_the_current_stream() -> None:
    case = make_case(64, 128256, torch.bfloat16)
    logits, *rest = on_cuda(case)
    want = cfpo_kernels.cfpo_loss(logits, *rest, backend="triton")
    assert want.item() == pytest.approx(oracle(case).loss.item(), rel=1e-4)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late = logits * 0 + logits  # ready only after the wait, on this stream
        got = cfpo_kernels.cfpo_loss(late, *rest, backend="triton")
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, want)


def test_no_call_waits_for_the_device() -> None:
    case = with_everything(make_case(13, 1000, torch.bfloat16, mask_every=5))
    logits, *rest = on_cuda(case)
    leaf = logits.requires_grad_()
    options = {
        name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.options.items()
    }

    def step() -> None:
        loss, _ = cfpo_kernels.cfpo_loss(
            leaf, *rest, backend="triton", return_stats=True, **options
        )
        (loss * 0.5).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Twice the half.
    check_gradient(leaf.grad.cpu(), oracle(case).dlogits, case)


def test_compiles_without_a_graph_break() -> None:
    case = make_case(64, 32000, torch.bfloat16)
    logits, *rest = on_cuda(case)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = cfpo_kernels.cfpo_loss(x * 2, *rest, backend="triton")
        assert isinstance(loss, torch.Tensor)
        return loss

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    step(eager).backward()
    doubled = Case(2 * case.logits, case.token_ids, case.advantages, case.old_logps)
    check_gradient(eager.grad.cpu() / 2, oracle(doubled).dlogits, doubled)
    torch.compile(step, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-2, atol=1e-9)


def test_unknown_tokens_are_nan() -> None:
    logits = torch.randn(4, 1000, device="cuda")
    ids = torch.tensor([1, 1000, -3, 2**40], device="cuda")
    loss = cfpo_kernels.cfpo_loss(
        logits, ids, torch.ones(4, device="cuda"), reduction="none", backend="triton"
    )
    assert loss.isnan().tolist() == [False, True, True, True]


@pytest.mark.slow
def test_many_short_rows() -> None:
    n, v = 1_000_000, 1000
    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, v, (n,), device="cuda")
    leaf = logits.clone().requires_grad_()
    cfpo_kernels.cfpo_loss(
        leaf, ids, torch.ones(n, device="cuda"), inplace=True, reduction="sum", backend="triton"
    ).backward()
    for rows in (slice(0, 1000), slice(n - 1000, n)):
        p = torch.softmax(logits[rows].double(), -1)
        want = p - torch.nn.functional.one_hot(ids[rows], v)
        error = (leaf.grad[rows].double() - want).norm(dim=-1)
        rounding = (want.bfloat16().double() - want).norm(dim=-1)
        assert (error <= 1.1 * rounding + 2e-5).all()


@pytest.mark.slow
def test_beyond_32_bit_offsets() -> None:
    n, v = 30_000, 151_936  # 4.6e9 elements
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    logits = torch.empty(n, v, device="cuda", dtype=torch.bfloat16)
    for chunk in logits.split(2000):
        chunk.normal_()
    rows = torch.tensor([0, 1, 14_135, 28_271, n - 1])
    before = logits[rows.cuda()].cpu()
    ids = torch.randint(0, v, (n,), device="cuda")
    leaf = logits.requires_grad_()
    cfpo_kernels.cfpo_loss(
        leaf, ids, torch.ones(n, device="cuda"), inplace=True, reduction="sum", backend="triton"
    ).backward()
    p = torch.softmax(before.double(), -1)
    want = p - torch.nn.functional.one_hot(ids[rows.cuda()].cpu(), v)
    error = (leaf.grad[rows.cuda()].cpu().double() - want).norm(dim=-1)
    rounding = (want.bfloat16().double() - want).norm(dim=-1)
    assert (error <= 1.1 * rounding + 2e-5).all()
