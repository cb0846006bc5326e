"""cfpo_loss_from_logps and policy_loss_from_logps: the same loss, from log-probs that exist."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import Case, Outcome, check_gradient, check_values, make_case, oracle, with_everything

import cfpo_kernels
from cfpo_kernels import CFPO, PPOClip, policy_loss_from_logps, token_logps

OBJECTIVES = (CFPO(), CFPO(0.3, log_ratio_clip=0.25), PPOClip(0.1, 0.3, dual_clip=2.0))
REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none")


def padded(case: Case, b: int, t: int) -> Case:
    for name in ("logits", "token_ids", "advantages", "old_logps"):
        x = getattr(case, name)
        setattr(case, name, x.reshape(b, t, *x.shape[1:]))
    case.options = {
        name: x.reshape(b, t) if isinstance(x, torch.Tensor) and x.dim() == 1 else x
        for name, x in case.options.items()
    }
    return case


def run_in_two_steps(case: Case, backend: str = "cpu") -> Outcome:
    """token_logps, then the loss of its log-probs."""
    options = dict(case.options)
    temperature = options.pop("temperature", 1.0)
    logits = case.logits.detach().clone().requires_grad_()
    logps, entropy = token_logps(
        logits,
        case.token_ids,
        mask=options.get("mask"),
        temperature=temperature,
        return_entropy=True,
        backend=backend,
    )
    loss, stats = policy_loss_from_logps(
        logps,
        case.advantages,
        case.old_logps,
        objective=case.objective,
        entropy=entropy,
        return_stats=True,
        **options,
    )
    loss.sum().backward()
    return Outcome(loss.detach(), logits.grad, stats.logps, stats.entropy)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_with_token_logps_it_is_the_fused_loss(dtype: torch.dtype, objective: Any) -> None:
    case = with_everything(make_case(26, 1000, dtype, mask_every=5, objective=objective))
    # Without advantage what is left is the KL term's 1 - e^d, and where d is nearly 0 the rounding
    # of logps to float32, which the fused loss does not do, shows.
    case.advantages[case.advantages == 0] = 0.5
    got, want = run_in_two_steps(case), oracle(case)
    check_gradient(got.dlogits, want.dlogits, case)
    check_values(got, want)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; test_stage_two.py compares the kernels' own stage 2 with this."""
    monkeypatch.setattr(cfpo_kernels.stage_two, "_is_native", lambda *_: False)


@pytest.mark.parametrize("normalizer", [None, 7.5, torch.tensor(12)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bitwise_the_reference_backend(in_torch: None, reduction: str, normalizer: object) -> None:
    for objective in OBJECTIVES:
        case = padded(with_everything(make_case(24, 50, mask_every=5, objective=objective)), 4, 6)
        case.options["mask"][2] = False  # a sequence without tokens
        case.options |= {"reduction": reduction, "normalizer": normalizer}
        logits = case.logits.clone().requires_grad_()
        want, want_stats = cfpo_kernels.policy_loss(
            logits,
            case.token_ids,
            case.advantages,
            case.old_logps,
            objective=objective,
            backend="reference",
            return_stats=True,
            **case.options,
        )
        want.sum().backward()
        got = run_in_two_steps(case, "reference")
        assert torch.equal(got.loss, want) and want.abs().sum() > 0
        assert torch.equal(got.dlogits, logits.grad)
        assert torch.equal(got.logps, want_stats.logps)
        assert torch.equal(got.entropy, want_stats.entropy)


@pytest.mark.parametrize("given", ["entropy", "no entropy"])
def test_statistics_are_those_of_the_fused_loss(given: str) -> None:
    case = with_everything(make_case(24, 50, mask_every=5))
    case.options["entropy_coef"] = 0.0
    temperature = case.options.pop("temperature")
    arguments = (case.token_ids, case.advantages, case.old_logps)
    _, want = cfpo_kernels.cfpo_loss(
        case.logits, *arguments, temperature=temperature, return_stats=True, **case.options
    )
    logps, entropy = token_logps(
        case.logits, case.token_ids, temperature=temperature, return_entropy=True
    )
    _, got = cfpo_kernels.cfpo_loss_from_logps(
        logps,
        *arguments[1:],
        entropy=entropy if given == "entropy" else None,
        return_stats=True,
        **case.options,
    )
    for name in want._fields:
        if given == "no entropy" and name.startswith("entropy"):
            active = getattr(got, name)[case.mask()] if name == "entropy" else got.entropy_mean
            assert active.isnan().all()
        else:
            torch.testing.assert_close(getattr(got, name), getattr(want, name))
    assert got.ratio_max > 1.5 and 0 < got.outside_fraction < 1  # the case has something to count


def test_packed_sequences_and_advantages_of_sequences() -> None:
    case = padded(make_case(12, 30), 3, 4)
    per_sequence, logps = torch.tensor([1.0, -2.0, 0.5]), token_logps(case.logits, case.token_ids)
    want = cfpo_kernels.cfpo_loss_from_logps(
        logps, per_sequence, case.old_logps, reduction="seq-mean-token-mean"
    )
    got = cfpo_kernels.cfpo_loss_from_logps(
        logps.reshape(-1),
        per_sequence.repeat_interleave(4),
        case.old_logps.reshape(-1),
        reduction="seq-mean-token-mean",
        cu_seqlens=torch.tensor([0, 4, 8, 12]),
    )
    assert torch.equal(got, want)


def test_on_policy_is_the_policy_gradient() -> None:
    logps = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.0])
    loss = cfpo_kernels.cfpo_loss_from_logps(logps, advantages, reduction="sum")
    loss.backward()
    assert loss.item() == -0.5 and torch.equal(logps.grad, -advantages)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_tokens_reach_nothing(poison: float) -> None:
    case = with_everything(make_case(10, 30, mask_every=3))
    case.options.pop("temperature")
    masked = ~case.options["mask"]
    logps, entropy = token_logps(case.logits, case.token_ids, return_entropy=True)

    def run(spoil: bool) -> tuple[torch.Tensor, ...]:
        def spoiled(x: torch.Tensor) -> torch.Tensor:
            return torch.where(masked, poison, x) if spoil else x.clone()

        options = {
            name: spoiled(x) if name in ("token_weights", "ref_logps") else x
            for name, x in case.options.items()
        }
        leaves = [spoiled(x).detach().requires_grad_() for x in (logps, entropy)]
        loss, stats = cfpo_kernels.cfpo_loss_from_logps(
            leaves[0],
            spoiled(case.advantages),
            spoiled(case.old_logps),
            entropy=leaves[1],
            return_stats=True,
            **options,
        )
        loss.backward()
        return loss.detach(), leaves[0].grad, leaves[1].grad, *stats

    for got, want in zip(run(True), run(False), strict=True):
        assert torch.equal(got, want) and got.isfinite().all()
    _, dlogps, dentropy, *_ = run(True)
    assert not dlogps[masked].any() and not dentropy[masked].any()
    assert (dentropy[~masked] < 0).all()


def test_an_all_masked_batch_is_a_connected_zero() -> None:
    logps = torch.full((4,), torch.nan, requires_grad=True)
    loss = cfpo_kernels.cfpo_loss_from_logps(logps, torch.ones(4), mask=torch.zeros(4))
    loss.backward()
    assert loss.item() == 0 and not logps.grad.any()


def test_dtypes() -> None:
    advantages, old = torch.tensor([1.0, -1.0]), torch.tensor([-1.1, -2.3])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        logps = torch.tensor([-1.0, -2.5], dtype=dtype, requires_grad=True)
        loss = cfpo_kernels.cfpo_loss_from_logps(logps, advantages, old)
        wide = torch.promote_types(dtype, torch.float32)
        want = cfpo_kernels.cfpo_loss_from_logps(logps.detach().to(wide), advantages, old)
        assert loss.dtype == wide and torch.equal(loss.detach(), want)
        loss.backward()
        assert logps.grad.dtype == dtype and logps.grad.abs().min() > 0.01


def test_twice_differentiable_and_compiled() -> None:
    case = make_case(6, 30, torch.float64)
    logps = torch.log_softmax(case.logits, -1).gather(1, case.token_ids[:, None])[:, 0]
    logps = logps.detach().requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return cfpo_kernels.cfpo_loss_from_logps(x, case.advantages, case.old_logps)

    assert torch.autograd.gradcheck(loss, logps) and torch.autograd.gradgradcheck(loss, logps)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logps), loss(logps))


V = torch.ones(3)
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("logps", {"logps": [1.0]}, TypeError, "list"),
    ("logps", {"logps": torch.ones(3, dtype=torch.int64)}, TypeError, "torch.int64"),
    (
        "advantages",
        {"advantages": torch.ones(2)},
        ValueError,
        r"shape of logps, \(3,\), got \(2,\)",
    ),
    ("old_logps", {"old_logps": torch.ones(3, 1)}, ValueError, r"shape of logps.*\(3, 1\)"),
    ("mask", {"mask": torch.ones(4)}, ValueError, r"shape of logps.*\(4,\)"),
    ("mask", {"mask": torch.ones(3, device="meta")}, ValueError, "device of the logps, cpu"),
    ("entropy", {"entropy_coef": 0.1}, ValueError, "entropy_coef=0.1"),
    ("entropy", {"entropy": torch.ones(2)}, ValueError, r"\(2,\)"),
    ("ref_logps", {"kl_coef": 0.1}, ValueError, "kl_coef=0.1"),
    ("reduction", {"reduction": "mean"}, ValueError, "token-mean"),
    ("reduction", {"reduction": "seq-mean-token-sum"}, ValueError, r"logps \(B, T\), or cu_seq"),
    (
        "cu_seqlens",
        {"logps": torch.ones(1, 3), "advantages": V[None], "cu_seqlens": torch.tensor([0, 3])},
        ValueError,
        r"packed logps \(N,\), got logps of shape \(1, 3\)",
    ),
    ("epsilon", {"epsilon": 0.0}, ValueError, "0.0"),
    ("return_stats", {"return_stats": 1}, TypeError, "int"),
]


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"), REFUSED, ids=lambda x: str(x)[:30]
)
def test_refused(name: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        cfpo_kernels.cfpo_loss_from_logps(**({"logps": V, "advantages": V} | changes))
    assert name in str(caught.value)


def test_objective_must_be_an_objective() -> None:
    with pytest.raises(TypeError, match=r"objective.*str"):
        policy_loss_from_logps(V, V, objective="cfpo")  # type: ignore[arg-type]


BUGS = {
    "no penalty": ("policy_term", lambda right: lambda s, logp, x, a, *_: -x.exp() * a),
    "wrong epsilon": (
        "policy_term",
        lambda right: lambda s, *given: right(CFPO(0.21).shape(), *given),
    ),
    "kl turned round": ("kl_term", lambda right: lambda e, x, ref: right(e, ref, x)),
}


@pytest.mark.parametrize("name", BUGS)
def test_the_comparison_with_float64_sees(
    name: str, in_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, broken = BUGS[name]
    case = with_everything(make_case(26, 1000))
    want = oracle(case)
    right = getattr(cfpo_kernels.formula, function)
    monkeypatch.setattr(cfpo_kernels.formula, function, broken(right))
    with pytest.raises(AssertionError):
        check_gradient(run_in_two_steps(case).dlogits, want.dlogits, case)
