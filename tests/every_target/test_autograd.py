"""Autograd, torch.compile, operators, and what surrounds a loss in a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Case, check, make_case, run, with_everything
from torch.utils.checkpoint import checkpoint

import cfpo_kernels
from cfpo_kernels import CFPO, CFPOFunction, ops
from cfpo_kernels.inputs import LossSettings

pytestmark = pytest.mark.not_on(
    "cpu-*",
    "*-split",
    "*-cluster",
    "*-transient",
    "*-ptx*",
    reason="above the kernels: one target of a backend will do",
)


def step(case: Case, hidden: torch.Tensor, head: torch.Tensor, **options: Any) -> torch.Tensor:
    return cfpo_kernels.cfpo_loss(
        hidden @ head, case.token_ids, case.advantages, case.old_logps, **options
    )


def layer(v: int = 300) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """A case with logits = hidden @ head."""
    case = make_case(12, v)
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(12, 16, generator=g, requires_grad=True)
    head = torch.randn(16, v, generator=g, requires_grad=True)
    return case, hidden, head


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("inplace", [False, True])
def test_through_a_layer(inplace: bool) -> None:
    case, hidden, head = layer()
    got = gradients(step(case, hidden, head, inplace=inplace), hidden, head)
    want = gradients(step(case, hidden, head, backend="reference"), hidden, head)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.not_on("reference", reason="it never overwrites the logits")
def test_inplace_bumps_the_version() -> None:
    case, hidden, head = layer()
    logits = hidden @ head
    squared = (logits**2).sum()  # saves the logits
    version = logits._version
    cfpo_kernels.cfpo_loss(logits, case.token_ids, case.advantages, case.old_logps, inplace=True)
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.not_on("reference", reason="it never overwrites the logits")
def test_the_gradient_buffer_is_guarded_until_backward() -> None:
    case, hidden, head = layer()
    logits = hidden @ head
    loss = cfpo_kernels.cfpo_loss(
        logits, case.token_ids, case.advantages, case.old_logps, inplace=True
    )
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.not_on("reference", reason="it never overwrites the logits")
def test_inplace_gradient_is_the_logits_memory() -> None:
    case = make_case(4, 100)
    leaf = case.logits.clone().requires_grad_()
    cfpo_kernels.cfpo_loss(
        leaf, case.token_ids, case.advantages, case.old_logps, inplace=True
    ).backward()
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    assert torch.equal(leaf.grad, run(case).dlogits)


@pytest.mark.not_on("reference", reason="its graph is torch's own")
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_twice_is_refused(inplace: bool) -> None:
    case = make_case(4, 100)
    leaf = case.logits.clone().requires_grad_()
    loss = cfpo_kernels.cfpo_loss(
        leaf, case.token_ids, case.advantages, case.old_logps, inplace=inplace
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.not_on("reference", reason="it is differentiable twice")
def test_double_backward_is_refused() -> None:
    case = make_case(4, 100)
    leaf = case.logits.clone().requires_grad_()
    for loss in (
        cfpo_kernels.cfpo_loss(leaf, case.token_ids, case.advantages, case.old_logps),
        cfpo_kernels.token_logps(leaf, case.token_ids).sum(),
    ):
        with pytest.raises(RuntimeError, match=r"double backward.*not supported.*reference"):
            torch.autograd.grad(loss, leaf, create_graph=True)


def test_only_logits_get_a_gradient() -> None:
    case = with_everything(make_case(6, 50))
    leaf = case.logits.clone().requires_grad_()
    others = [case.advantages, case.old_logps]
    others += [case.options[name] for name in ("token_weights", "ref_logps", "temperature")]
    for x in others:
        x.requires_grad_()
    cfpo_kernels.cfpo_loss(
        leaf, case.token_ids, case.advantages, case.old_logps, **case.options
    ).backward()
    assert all(x.grad is None for x in others)


def test_zero_upstream_gradient() -> None:
    case = make_case(6, 50)
    leaf = case.logits.clone().requires_grad_()
    loss = cfpo_kernels.cfpo_loss(leaf, case.token_ids, case.advantages, case.old_logps)
    (0.0 * loss).backward()
    assert not leaf.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_checkpoint(reentrant: bool, inplace: bool) -> None:
    case, hidden, head = layer()
    want = gradients(step(case, hidden, head), hidden, head)
    reference = gradients(step(case, hidden, head, backend="reference"), hidden, head)
    torch.testing.assert_close(want, reference, rtol=1e-4, atol=1e-6)
    loss = checkpoint(
        lambda h, w: step(case, h, w, inplace=inplace), hidden, head, use_reentrant=reentrant
    )
    loss.backward()
    torch.testing.assert_close([hidden.grad, head.grad], want)


def test_autocast() -> None:
    case, hidden, head = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden @ head
        assert logits.dtype == torch.bfloat16
        loss, stats = cfpo_kernels.cfpo_loss(
            logits, case.token_ids, case.advantages, case.old_logps, return_stats=True
        )
        assert loss.dtype == torch.float32 and stats.ratio_mean.dtype == torch.float32
        loss.backward()
    outside = cfpo_kernels.cfpo_loss(
        logits.detach(), case.token_ids, case.advantages, case.old_logps
    )
    assert torch.equal(loss, outside)
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_inference_mode() -> None:
    case = make_case(6, 50)
    with torch.inference_mode():
        loss = cfpo_kernels.cfpo_loss(case.logits, case.token_ids, case.advantages, case.old_logps)
        logps = cfpo_kernels.token_logps(case.logits.clone(), case.token_ids)
    assert loss.isfinite() and logps.isfinite().all()


def test_gradient_accumulation() -> None:
    case, hidden, head = layer()
    step(case, hidden, head).backward()
    once = head.grad.clone()
    step(case, hidden, head, inplace=True).backward()
    torch.testing.assert_close(head.grad, 2 * once)


@pytest.mark.not_on("reference", reason="it is no Function of ours")
def test_function_is_the_public_one() -> None:
    assert issubclass(CFPOFunction, torch.autograd.Function)
    case = make_case(6, 50)
    leaf = case.logits.clone().requires_grad_()
    loss = cfpo_kernels.cfpo_loss(
        leaf, case.token_ids, case.advantages, case.old_logps, reduction="none"
    )
    assert type(loss.grad_fn.next_functions[0][0]).__name__ == "CFPOFunctionBackward"


COMPILED: dict[str, Callable[..., Any]] = {
    "loss": lambda c, h, w: step(c, h, w),
    "inplace": lambda c, h, w: step(c, h, w, inplace=True),
    "stats": lambda c, h, w: step(c, h, w, return_stats=True)[0],
    "sequences": lambda c, h, w: step(
        c, h, w, reduction="seq-mean-token-mean", cu_seqlens=torch.tensor([0, 5, 12])
    ),
    "options": lambda c, h, w: step(
        c,
        h,
        w,
        mask=c.token_ids % 3 != 0,
        ref_logps=c.old_logps,
        kl_coef=0.1,
        entropy_coef=0.1,
        temperature=0.9,
        grad_scale=4.0,
        normalizer=torch.tensor(9.0),
    ),
    "none": lambda c, h, w: (step(c, h, w, reduction="none") * torch.arange(12)).sum(),
    "logps": lambda c, h, w: sum(
        x.sum() for x in cfpo_kernels.token_logps(h @ w, c.token_ids, return_entropy=True)
    ),
    "logps inplace": lambda c, h, w: cfpo_kernels.token_logps(
        h @ w, c.token_ids, inplace=True
    ).sum(),
    "reference": lambda c, h, w: step(c, h, w, backend="reference"),
    "no_grad": lambda c, h, w: step(c, h.detach(), w.detach()) + (h.sum() + w.sum()) * 0,
}


# What is ours, fake implementations and autograd, aot_eager goes through too. Of those that
# inductor compiles, these two write to their own memory and to the logits.
ALWAYS_BY_INDUCTOR = ("loss", "logps inplace")


def compiled(compiler: str, name: str) -> Any:
    marks = []
    if compiler == "inductor" and name not in ALWAYS_BY_INDUCTOR:
        marks.append(pytest.mark.nightly)
    if (compiler, name) != ("aot_eager", "loss"):
        why = "torch.compile stops at the operator, whichever kernel is behind it"
        marks.append(pytest.mark.nightly_on("cuda-*", "triton-*", reason=why))
    return pytest.param(compiler, name, marks=marks)


@pytest.mark.not_on("reference", reason="`COMPILED` has it")
@pytest.mark.parametrize(
    ("compiler", "name"),
    [compiled(compiler, name) for compiler in ("aot_eager", "inductor") for name in COMPILED],
)
def test_compile_without_graph_breaks(compiler: str, name: str) -> None:
    torch._dynamo.reset()
    case, hidden, head = layer()
    function = COMPILED[name]
    want_loss = function(case, hidden, head)
    want = gradients(want_loss, hidden, head)
    compiled = torch.compile(lambda h, w: function(case, h, w), fullgraph=True, backend=compiler)
    got_loss = compiled(hidden, head)
    torch.testing.assert_close(got_loss, want_loss)
    torch.testing.assert_close(gradients(got_loss, hidden, head), want, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="torch.compile of torch 2.10 and older refuses them"
)
def test_compiled_call_takes_changing_numbers() -> None:
    """A number that changes between calls becomes symbolic in the graph."""
    torch._dynamo.reset()
    case, hidden, head = layer()
    compiled = torch.compile(
        lambda h, w, x: step(case, h, w, temperature=x, entropy_coef=x, epsilon=x, normalizer=x),
        fullgraph=True,
        backend="aot_eager",
    )
    for x in (0.5, 0.6, 0.7):
        want = step(case, hidden, head, temperature=x, entropy_coef=x, epsilon=x, normalizer=x)
        torch.testing.assert_close(compiled(hidden, head, x), want)


def test_compiled_call_takes_changing_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(cfpo_kernels.cfpo_loss, fullgraph=True, backend="aot_eager")
    for n, v in ((4, 50), (5, 60), (7, 90)):
        case = make_case(n, v)
        arguments = (case.token_ids, case.advantages, case.old_logps)
        leaf = case.logits.clone().requires_grad_()
        compiled(leaf, *arguments).backward()
        assert torch.equal(leaf.grad, check(case).dlogits)


def operator_arguments() -> dict[str, tuple[Any, ...]]:
    case = make_case(6, 50)
    weights, temperature = torch.full((6,), 1 / 6), torch.ones(1)
    rows = (case.logits, case.token_ids, weights, temperature)
    inputs = [case.advantages, case.old_logps, None, None, None, None]
    terms = (inputs, *ops.flat(LossSettings(CFPO(log_ratio_clip=1e30).shape())), None)
    backward = (torch.zeros(6, 2, dtype=torch.float64), torch.zeros(6), torch.ones(6), None)
    return {
        "policy_loss": (*rows, True, True, "cpu", *terms),
        "policy_loss_": (*rows, False, "cpu", *terms),
        "token_scores": (*rows, True, "cpu"),
        "token_logps_backward": (*rows, "cpu", *backward),
        "token_logps_backward_": (*rows, "cpu", *backward),
        "multiply_rows_": (case.logits, weights, "cpu"),
    }


@pytest.mark.parametrize("name", operator_arguments())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name), operator_arguments()[name])


RETURNED = {
    "policy_loss": "float32 (6,), float32 (6,), float32 (6,), float32 (6, 50)",
    "policy_loss_": "float32 (6,), float32 (6,), float32 (0,)",
    "token_scores": "float64 (6,), float64 (6, 2), float32 (6,)",
    "token_logps_backward": "float32 (6, 50)",
    "token_logps_backward_": "",
    "multiply_rows_": "",
}


@pytest.mark.parametrize("name", RETURNED)
def test_an_operator_that_gives_something_else_needs_another_name(name: str) -> None:
    """Graphs that an earlier version of the package compiled are found on disk by it."""
    found = getattr(ops, name)(*operator_arguments()[name])
    found = () if found is None else found if isinstance(found, tuple) else (found,)
    described = (f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in found)
    assert ", ".join(described) == RETURNED[name]


def test_outputs_do_not_depend_on_what_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that the operators allocate is poisoned with NaN before the kernels run."""
    case = with_everything(make_case(13, 1000, mask_every=4))
    want = check(case)

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *a, **k: make(*a, **k).fill_(torch.nan)

    monkeypatch.setattr(ops.torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(ops, "new_gradient", poisoned(ops.new_gradient))
    got = run(case)
    assert torch.equal(got.dlogits, want.dlogits) and torch.equal(got.logps, want.logps)
    logps, entropy = cfpo_kernels.token_logps(
        case.logits, case.token_ids, mask=case.mask(), return_entropy=True
    )
    assert logps.isfinite().all() and entropy.isfinite().all()
