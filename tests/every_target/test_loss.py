"""The fused loss and its gradient against float64, over dtypes, vocabularies and options."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, LARGE_V, SMALL_V, Case, check, make_case, oracle, run, with_everything
from targets import Target

import cfpo_kernels
from cfpo_kernels import CFPO, CFPOLoss, PPOClip


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("v", SMALL_V + LARGE_V)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_vocabulary(dtype: torch.dtype, v: int, inplace: bool, target: Target) -> None:
    rows = target.unsplit if v <= 4096 else 7
    check(make_case(rows, v, dtype, seed=v, mask_every=5), inplace=inplace)


@pytest.mark.parametrize("v", [1, 7, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_term_at_once(dtype: torch.dtype, v: int) -> None:
    check(with_everything(make_case(13, v, dtype, seed=v, mask_every=4)))
    check(with_everything(make_case(13, v, dtype, seed=v, mask_every=4)), inplace=True)


@pytest.mark.parametrize("v", [7, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_an_offset_of_all_logits(dtype: torch.dtype, v: int) -> None:
    check(make_case(13, v, dtype, offset=1e4))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator: str) -> None:
    case = with_everything(make_case(13, 1000))
    case.options |= {"kl_estimator": estimator, "kl_coef": 0.5, "entropy_coef": 0.0}
    check(case)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["bonus", "penalty"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_alone(dtype: torch.dtype, sign: float) -> None:
    case = make_case(13, 1000, dtype, entropy_coef=sign * 0.7)
    case.advantages = torch.zeros_like(case.advantages)
    check(case)


@pytest.mark.parametrize(
    "objective",
    [
        CFPO(0.05),
        CFPO(0.2, log_ratio_clip=0.25),
        PPOClip(),
        PPOClip(0.1, 0.3),
        PPOClip(0.2, 0.2, dual_clip=3.0),
    ],
    ids=str,
)
def test_objectives(objective: CFPO | PPOClip) -> None:
    case = make_case(39, 257, objective=objective)
    # On the exact boundary of a clip the branch is a matter of rounding: test_objective.py.
    edges = torch.arange(39) % 12
    case.options["mask"] = (edges != 1) & (edges != 2)
    check(case)


@pytest.mark.parametrize("objective", [CFPO(0.05), PPOClip(0.1, 0.3), PPOClip(dual_clip=3.0)])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_objectives_and_estimators(objective: CFPO | PPOClip, estimator: str) -> None:
    case = with_everything(make_case(39, 257, objective=objective))
    case.options["kl_estimator"] = estimator
    check(case)


REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none"]


def batch(b: int = 4, t: int = 6, v: int = 100, **options: object) -> Case:
    case = make_case(b * t, v, **options)
    for name in ("logits", "token_ids", "advantages", "old_logps"):
        x = getattr(case, name)
        setattr(case, name, x.reshape(b, t, *x.shape[1:]))
    return case


@pytest.mark.parametrize("normalizer", [None, 7.5, torch.tensor(12)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction: str, normalizer: object) -> None:
    case = batch()
    mask = torch.ones(4, 6)
    mask[0, 2:] = 0
    mask[2] = 0  # a sequence without tokens is not counted
    case.options |= {"mask": mask, "reduction": reduction, "normalizer": normalizer}
    got = check(case)
    assert got.loss.shape == ((4, 6) if reduction == "none" else ())
    assert got.loss.dtype == torch.float32


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_equals_padded(reduction: str) -> None:
    lengths = torch.tensor([6, 2, 0, 5])
    padded = batch()
    mask = torch.arange(6) < lengths[:, None]
    padded.options |= {"mask": mask, "reduction": reduction}
    packed = Case(
        padded.logits[mask], padded.token_ids[mask], padded.advantages[mask], padded.old_logps[mask]
    )
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    packed.options = {"cu_seqlens": bounds, "reduction": reduction}
    got, want = check(packed), check(padded)
    if reduction != "none":
        torch.testing.assert_close(got.loss, want.loss)
    assert torch.equal(got.dlogits, want.dlogits[mask])


def test_advantages_of_a_sequence() -> None:
    for b, t in ((4, 6), (5, 5)):  # also where B == T one dimension means one a sequence
        case = batch(b, t)
        per_sequence = torch.randn(b)
        case.advantages = per_sequence[:, None].expand(b, t)
        want = check(case)
        for given in (per_sequence, per_sequence[:, None]):
            case.advantages = given
            assert torch.equal(run(case).dlogits, want.dlogits)


def test_integer_and_float_inputs_are_equal() -> None:
    case = make_case(13, 1000, mask_every=3)
    want = run(case)
    case.token_ids = case.token_ids.int()
    case.options["mask"] = case.options["mask"].float() * 0.3  # a mask is not a weight
    case.old_logps = case.old_logps.double()
    got = run(case)
    assert torch.equal(got.dlogits, want.dlogits) and torch.equal(got.loss, want.loss)


def test_on_policy() -> None:
    case = make_case(13, 1000)
    case.old_logps = None
    check(case)
    # Old log-probs of the same logits are exactly r = 1.
    scored = cfpo_kernels.token_logps(case.logits, case.token_ids)
    on_policy = run(case)
    case.old_logps = scored
    got = run(case)
    assert torch.equal(got.dlogits, on_policy.dlogits) and torch.equal(got.loss, on_policy.loss)
    _, stats = cfpo_kernels.cfpo_loss(
        case.logits, case.token_ids, case.advantages, scored, return_stats=True
    )
    assert stats.ratio_mean == 1 and stats.ratio_max == 1 and stats.outside_fraction == 0


def test_scalar_temperatures_agree() -> None:
    case = make_case(13, 1000, temperature=0.8)
    want = check(case)
    for same in (torch.tensor(0.8), torch.full((13,), 0.8)):
        case.options["temperature"] = same
        assert torch.equal(run(case).dlogits, want.dlogits)


def test_grad_scale_keeps_small_float16_gradients() -> None:
    # Off-target gradients of 1e-9 are zeros in float16, unless the scale comes first.
    case = make_case(8, 32000, torch.float16, normalizer=4e3)
    scale = 2.0**14
    plain = run(case).dlogits
    logits = case.logits.clone().requires_grad_()
    loss = cfpo_kernels.cfpo_loss(
        logits,
        case.token_ids,
        case.advantages,
        case.old_logps,
        normalizer=4e3,
        grad_scale=torch.tensor(scale),
    )
    (loss * scale).backward()
    want = oracle(case).dlogits * scale
    error = (logits.grad.double() - want).norm() / want.norm()
    lost = (plain.double() * scale - want).norm() / want.norm()
    assert error < 1e-3 < 5e-3 < lost
    # Without the scale in the incoming gradient the result is the plain gradient.
    logits.grad = None
    cfpo_kernels.cfpo_loss(
        logits, case.token_ids, case.advantages, case.old_logps, normalizer=4e3, grad_scale=scale
    ).backward()
    torch.testing.assert_close(logits.grad, plain, rtol=1e-3, atol=6e-8)


def test_incoming_gradient() -> None:
    case = make_case(13, 1000, reduction="none", mask_every=5)
    logits = case.logits.clone().requires_grad_()
    loss = cfpo_kernels.cfpo_loss(
        logits, case.token_ids, case.advantages, case.old_logps, **case.options
    )
    incoming = torch.randn(13)
    loss.backward(incoming)
    want = oracle(case).dlogits * incoming.double()[:, None]
    torch.testing.assert_close(logits.grad.double(), want, rtol=2e-5, atol=1e-8)


def test_stats() -> None:
    case = with_everything(make_case(39, 500, mask_every=4))
    options = case.options
    _, stats = cfpo_kernels.cfpo_loss(
        case.logits,
        case.token_ids,
        case.advantages,
        case.old_logps,
        epsilon=0.15,
        return_stats=True,
        **options,
    )
    want, mask = oracle(case), case.mask()
    log_ratio = (want.logps - case.old_logps.double())[mask]
    ratio = log_ratio.exp()
    kl_distance = (options["ref_logps"].double() - want.logps)[mask]
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "outside_fraction": ((ratio - 1).abs() > 0.15).double().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "ref_kl": (kl_distance.exp() - kl_distance - 1).mean(),
        "entropy_mean": want.entropy[mask].mean(),
    }
    for name, value in expected.items():
        got = getattr(stats, name)
        assert got.shape == () and got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(got.double(), value, rtol=2e-5, atol=1e-6)
    assert not stats.logps.requires_grad and not stats.logps[~mask].any()
    assert not stats.entropy[~mask].any()


def test_module_is_the_function() -> None:
    case = make_case(13, 100)
    module = CFPOLoss(0.3, reduction="sum", entropy_coef=0.1)
    arguments = (case.logits, case.token_ids, case.advantages, case.old_logps)
    want = cfpo_kernels.cfpo_loss(*arguments, epsilon=0.3, reduction="none", entropy_coef=0.1)
    assert torch.equal(module(*arguments, reduction="none"), want)
    assert "epsilon=0.3" in repr(module)
    with pytest.raises(TypeError, match="reductoin"):
        CFPOLoss(reductoin="sum")
    with pytest.raises(ValueError, match="epsilon"):
        CFPOLoss(-1.0)


def test_without_gradient_nothing_of_size_v_is_made() -> None:
    case = make_case(13, 1000)
    arguments = (case.token_ids, case.advantages, case.old_logps)
    with_gradient = run(case).loss
    assert torch.equal(cfpo_kernels.cfpo_loss(case.logits, *arguments), with_gradient)
    leaf = case.logits.clone().requires_grad_()
    with torch.no_grad():
        loss = cfpo_kernels.cfpo_loss(leaf, *arguments, inplace=True)
    assert not loss.requires_grad and torch.equal(leaf, case.logits)
