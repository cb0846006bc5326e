"""Stage 2 alone: the kernels' own loss of log-probs that exist, and its derivatives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from chosen_objectives import CHOSEN, name_of, with_drift
from golden_shapes import SHAPES, number, problem_of, row_shape, shape_of
from oracle import make_case, with_everything
from torch import Tensor

from cfpo_kernels import (
    CFPO,
    PPOClip,
    backends,
    policy_loss,
    policy_loss_from_logps,
    stage_two,
    token_logps,
)
from cfpo_kernels.backends import cpu
from cfpo_kernels.backends.base import KernelRows, KernelTerms
from cfpo_kernels.inputs import LossSettings, TokenInputs
from cfpo_kernels.objectives import Objective
from cfpo_kernels.shapes import Shape

N, SEQUENCES = 40, torch.tensor([0, 8, 9, 25, 40])


class Found:
    """Of the native function, in float64 but for the loss."""

    def __init__(
        self,
        logps: Tensor,
        inputs: TokenInputs,
        settings: LossSettings,
        log_ratios: Tensor | None = None,
        weights: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> None:
        n = logps.numel()
        self.loss = torch.full((n,), 7.0)
        self.dlogps, self.dlog_ratios = torch.full((2, n), 7.0, dtype=torch.float64)
        shape, *others = settings
        cpu.native.token_losses(
            n,
            logps,
            entropy,
            torch.ones(n) if weights is None else weights,
            log_ratios,
            list(inputs),
            shape.kind,
            shape.numbers,
            *others,
            self.loss,
            self.dlogps,
            None if log_ratios is None else self.dlog_ratios,
            1,
        )


def each(rows: list[dict[str, Any]], name: str) -> Tensor | None:
    if rows[0][name] is None:
        return None
    return torch.tensor([number(row[name]) for row in rows], dtype=torch.float64)


def test_golden_shapes() -> None:
    """What goes by log r and what by log p are the table's derivative together."""

    def group_of(row: dict[str, Any]) -> tuple[int, bool, bool]:
        return row["shape"], row["low"] is None, row["high"] is None

    count = 0
    for (shape, *_), group in itertools.groupby(sorted(SHAPES["policy"], key=group_of), group_of):
        rows = list(group)
        low, high = (
            None if x is None else x.float() for x in (each(rows, "low"), each(rows, "high"))
        )
        inputs = TokenInputs(each(rows, "advantage").float(), low=low, high=high)  # type: ignore[union-attr]
        logps, log_ratios = each(rows, "logp"), each(rows, "log_ratio")
        assert logps is not None
        found = Found(logps, inputs, LossSettings(shape_of(SHAPES["shapes"][shape])), log_ratios)
        for row, loss, *slopes in zip(
            rows, found.loss, found.dlogps, found.dlog_ratios, strict=True
        ):
            got = loss.item(), sum(slopes).item()
            if low is None and high is None:
                assert got[0] == pytest.approx(row["loss"], rel=1e-6, abs=1e-12), row
                assert got[1] == pytest.approx(row["dlogp"], rel=1e-12, abs=1e-14), row
            else:  # the bounds of a token are float32
                assert problem_of(row, row_shape(row), got) == ""
            count += 1
    assert count == 568


def batch(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(N, generator=g)
    return {
        "logps": old + 0.3 * torch.randn(N, generator=g),
        "old_logps": old,
        "advantages": torch.randn(N, generator=g) * (torch.arange(N) % 5 != 0),
        "token_weights": torch.rand(N, generator=g) * (torch.arange(N) % 7 != 0),
        "ref_logps": old + 0.3 * torch.randn(N, generator=g),
        "entropy": torch.rand(N, generator=g),
        "mask": torch.arange(N) % 6 != 0,
    }


def slopes_of(given: dict[str, Tensor], upstream: float = -1.7, **how: Any) -> tuple[Tensor, ...]:
    """The losses, and the gradients of logps and entropy."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("logps", "entropy")}
    loss = policy_loss_from_logps(**(given | leaves), reduction="none", **how)
    assert isinstance(loss, Tensor)
    (upstream * loss).sum().backward()
    dlogps, dentropy = (x.grad for x in leaves.values())
    assert dlogps is not None and dentropy is not None
    return loss.detach(), dlogps, dentropy


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence, by token"])
@pytest.mark.parametrize("estimator", ["k1", "k3", "k3+"])
@pytest.mark.parametrize("objective", CHOSEN + with_drift, ids=name_of)
def test_it_is_the_formula(objective: Objective, estimator: str, ratio: str) -> None:
    given = batch()
    how: dict[str, Any] = {
        "objective": objective,
        "kl_coef": 0.3,
        "kl_estimator": estimator,
        "kl_ratio_weighted": estimator == "k3",
        "entropy_coef": 0.05,
        "cu_seqlens": SEQUENCES,
        "ratio_level": ratio.split(",")[0],
    }
    if objective.needs_bounds:
        how["log_ratio_bounds"] = (-0.19, 0.17)
    if ratio == "sequence":
        given["advantages"] = torch.tensor([1.0, -1.5, 0.0, 0.7])
    got = slopes_of(given, **how)
    want = slopes_of(
        {name: x if x.dtype == torch.bool else x.double() for name, x in given.items()}, **how
    )
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2e-6, atol=2e-7)
        assert not mine[~given["mask"]].any()


def in_torch(*_: Any) -> bool:
    return False


def test_plain_torch_is_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that the tests above do not take it."""
    given, how = batch(), {"objective": CFPO()}
    native = slopes_of(given, entropy_coef=0.1, **how)
    monkeypatch.setattr(stage_two, "_is_native", in_torch)
    other = slopes_of(given, entropy_coef=0.1, **how)
    assert not torch.equal(native[0], other[0])
    torch.testing.assert_close(native, other)


def kernels_losses(case: Any, settings: LossSettings, inputs: TokenInputs) -> tuple[Tensor, Found]:
    """Of the fused kernel, and of stage 2 after its stage 1."""
    n = len(case.token_ids)
    rows = KernelRows(case.logits, case.token_ids, torch.ones(n), torch.ones(1))
    kernels = backends.kernels("cpu")
    loss, rounded = torch.empty(2, n)
    logps, lse = (torch.empty(*shape, dtype=torch.float64) for shape in ((n,), (n, 2)))
    terms = KernelTerms(inputs, settings, None)
    kernels.policy_loss(rows, terms, loss=loss, logps=rounded, entropy=None, dlogits=None)
    kernels.token_logps(rows, logps=logps, lse=lse, entropy=None)
    assert torch.equal(logps.float(), rounded) and (logps != rounded).any()
    return loss, Found(logps, inputs, settings)


@pytest.mark.parametrize("objective", [CFPO(), PPOClip(0.1, 0.3, dual_clip=2.0)], ids=name_of)
def test_in_bits_the_loss_of_the_fused_kernels(objective: Objective) -> None:
    case = with_everything(make_case(26, 1000))
    options = case.options
    inputs = TokenInputs(
        case.advantages, case.old_logps, options["token_weights"], options["ref_logps"]
    )
    fused, alone = kernels_losses(case, LossSettings(objective.shape(), kl_coef=0.1), inputs)
    assert torch.equal(fused, alone.loss)


def test_log_probs_that_were_just_scored_have_a_ratio_of_exactly_1() -> None:
    case = make_case(26, 1000)
    rows = KernelRows(case.logits, case.token_ids, torch.ones(26), torch.ones(1))
    logps, lse = (torch.empty(*shape, dtype=torch.float64) for shape in ((26,), (26, 2)))
    backends.kernels("cpu").token_logps(rows, logps=logps, lse=lse, entropy=None)
    settings = LossSettings(CFPO(1e-6).shape())  # where a difference of 1e-8 would show
    inputs = TokenInputs(case.advantages, logps.float())
    assert torch.equal(Found(logps, inputs, settings).loss, -case.advantages)
    moved = inputs._replace(old_logps=torch.nextafter(logps.float(), torch.tensor(0.0)))
    others = Found(logps, moved, settings).loss != -case.advantages
    assert others[case.advantages != 0].all()


def test_between_two_passes_nothing_is_rounded() -> None:
    """A sequence of one token has the loss of a token, in bits; the mean of others is float64."""
    case = make_case(26, 1000)
    arguments = (case.token_ids, case.advantages, case.old_logps)
    how: dict[str, Any] = {"objective": PPOClip(), "reduction": "none"}
    one_pass = policy_loss(case.logits, *arguments, **how)
    two = policy_loss(
        case.logits, *arguments, ratio_level="sequence", cu_seqlens=torch.arange(27), **how
    )
    assert isinstance(one_pass, Tensor) and isinstance(two, Tensor)
    assert torch.equal(one_pass, two)


@pytest.mark.parametrize("native", [True, False])
def test_sequences_that_were_just_scored_have_a_ratio_of_exactly_1(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:  # as on a GPU
        monkeypatch.setattr(stage_two, "_is_native", in_torch)
    case = make_case(26, 1000)
    old = token_logps(case.logits, case.token_ids)
    how: dict[str, Any] = {"ratio_level": "sequence", "cu_seqlens": torch.tensor([0, 5, 26])}
    loss, stats = policy_loss(
        case.logits,
        case.token_ids,
        case.advantages,
        old,
        objective=CFPO(1e-6),
        reduction="none",
        return_stats=True,
        **how,
    )
    assert torch.equal(loss, -case.advantages) and stats.ratio_max == 1


def test_differentiated_twice_it_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch()

    def twice(**how: Any) -> tuple[Tensor, ...]:
        leaf, entropy = (given[name].clone().requires_grad_() for name in ("logps", "entropy"))
        known = given | {"logps": leaf, "entropy": entropy}
        loss = policy_loss_from_logps(**known, kl_coef=0.1, entropy_coef=0.2, **how)
        (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
        penalty = loss + slope.square().sum()
        return torch.autograd.grad(penalty, (leaf, entropy))

    ways: list[dict[str, Any]] = [
        {"objective": CFPO()},
        {"objective": CFPO(), "ratio_level": "sequence", "cu_seqlens": SEQUENCES},
    ]
    native = [twice(**how) for how in ways]
    monkeypatch.setattr(stage_two, "_is_native", in_torch)
    for how, got in zip(ways, native, strict=True):
        torch.testing.assert_close(got, twice(**how), rtol=1e-5, atol=1e-6)


def test_no_infinity_upstream_reaches_a_slope_of_zero() -> None:
    given = batch()
    *_, clean = slopes_of(given, objective=PPOClip(), entropy_coef=0.1)
    _, dlogps, dentropy = slopes_of(given, float("inf"), objective=PPOClip(), entropy_coef=0.1)
    idle = ~given["mask"] | (given["advantages"] == 0) | (given["token_weights"] == 0)
    assert not dlogps[idle].any() and not dentropy[~given["mask"]].any() and clean.any()


def test_what_has_to_see_operators_sees_them() -> None:
    given = batch()
    arguments = (given["logps"], given["advantages"], given["old_logps"])

    def loss(logps: Tensor) -> Any:
        return policy_loss_from_logps(logps, *arguments[1:], objective=CFPO())

    hessian = torch.func.jacfwd(torch.func.grad(loss))(arguments[0])
    assert torch.equal(hessian, hessian.diagonal().diag()) and hessian.any()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments[0], torch.ones(N))
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    assert tangent is not None and tangent.isfinite() and tangent != 0


def test_shapes_that_are_not_the_kernels_are_torchs() -> None:
    terms = (torch.zeros(3), None, torch.ones(3), TokenInputs(torch.ones(3)))
    assert not stage_two._is_native(
        *terms, LossSettings(Shape("torch")), stage_two.formula.ONE_TOKEN
    )
    assert stage_two._is_native(*terms, LossSettings(Shape("window")), stage_two.formula.ONE_TOKEN)
