"""The objectives themselves: one golden table for every language, finite differences, branches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import naive_kl, naive_policy

from cfpo_kernels import CFPO, PPOClip, reference
from cfpo_kernels.backends import cpu

GOLDEN = json.loads((Path(__file__).parent / "golden" / "objectives.json").read_text())
OBJECTIVES = {"cfpo": CFPO, "ppo_clip": PPOClip}


def native_term(
    objective: CFPO | PPOClip, log_ratio: float, advantage: float
) -> tuple[float, float]:
    return cpu.native.objective_term(objective.name, objective.parameters(), log_ratio, advantage)


def torch_term(
    objective: CFPO | PPOClip, log_ratio: float, advantage: float
) -> tuple[float, float]:
    x = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    loss = reference.policy_term(objective, x, torch.tensor(advantage, dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss, x)
    return loss.item(), slope.item()


@pytest.mark.parametrize("term", [native_term, torch_term], ids=["native", "torch"])
@pytest.mark.parametrize("row", GOLDEN["policy"], ids=lambda row: row["note"])
def test_golden_policy(row: dict, term: object) -> None:
    objective = OBJECTIVES[row["objective"]](**row["parameters"])
    got = term(objective, row["log_ratio"], row["advantage"])
    assert got == pytest.approx((row["loss"], row["dlogp"]), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("row", GOLDEN["kl"], ids=lambda row: f"{row['estimator']} {row['d']}")
def test_golden_kl(row: dict) -> None:
    want = pytest.approx((row["loss"], row["dlogp"]), rel=1e-12, abs=1e-14)
    assert cpu.native.kl_term(row["estimator"], -row["d"], 0.0) == want
    logp = torch.tensor(-row["d"], dtype=torch.float64, requires_grad=True)
    loss = reference.kl_term(row["estimator"], logp, torch.zeros((), dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss, logp)
    assert (loss.item(), slope.item()) == want


policies = st.one_of(
    st.builds(CFPO, st.floats(0.05, 0.5), st.none() | st.floats(0.1, 5.0)),
    st.builds(PPOClip, st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.none() | st.floats(1.5, 5.0)),
)


@given(policies, st.floats(-2.0, 2.0), st.floats(-3.0, 3.0))
def test_partials_are_finite_differences(
    objective: CFPO | PPOClip, log_ratio: float, advantage: float
) -> None:
    step = 1e-5
    kinks = [math.log1p(objective.trust_region()[1]), math.log1p(-objective.trust_region()[0])]
    if isinstance(objective, CFPO):
        kinks = [-(objective.log_ratio_clip or 99), objective.log_ratio_clip or 99]
    elif objective.dual_clip is not None:
        kinks.append(math.log(objective.dual_clip))
    if any(abs(log_ratio - kink) <= 2 * step for kink in kinks):
        return  # no derivative there
    for term in (native_term, torch_term):
        up, down = (
            term(objective, log_ratio + step, advantage),
            term(objective, log_ratio - step, advantage),
        )
        slope = (up[0] - down[0]) / (2 * step)
        got = term(objective, log_ratio, advantage)[1]
        assert got == pytest.approx(slope, rel=1e-4, abs=1e-6)


@given(policies, st.floats(-2.0, 2.0), st.floats(-3.0, 3.0))
def test_native_equals_the_naive_formula(
    objective: CFPO | PPOClip, log_ratio: float, advantage: float
) -> None:
    naive = naive_policy(
        objective,
        torch.tensor(log_ratio, dtype=torch.float64),
        torch.tensor(advantage, dtype=torch.float64),
    ).item()
    assert native_term(objective, log_ratio, advantage)[0] == pytest.approx(naive, abs=1e-11)


@pytest.mark.parametrize("advantage", [2.0, -0.5])
@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_cfpo_gradient_vanishes_only_at_its_optimum(advantage: float, epsilon: float) -> None:
    best = math.log(1 + math.copysign(epsilon, advantage))
    objective = CFPO(epsilon)
    assert native_term(objective, best, advantage)[1] == pytest.approx(0.0, abs=1e-12)
    assert native_term(objective, 0.0, advantage)[1] == -advantage
    for x in torch.linspace(-3, 3, 241).tolist():
        slope = native_term(objective, x, advantage)[1]
        # Descending the loss moves r towards the optimum from either side.
        assert abs(x - best) < 1e-9 or math.copysign(1, slope) == math.copysign(1, x - best)


@pytest.mark.parametrize("side", [-1, 1])
def test_clip_branch_next_to_the_boundary(side: int) -> None:
    objective = PPOClip(0.2, 0.3)
    for advantage, edge in ((1.0, math.log(1.3)), (-1.0, math.log(0.8))):
        inside = edge - math.copysign(1e-9, advantage)
        outside = edge + math.copysign(1e-9, advantage)
        assert native_term(objective, inside, advantage)[1] != 0
        assert native_term(objective, outside, advantage)[1] == 0
        # With the other sign of A this edge is not clipped.
        assert native_term(objective, outside, -advantage)[1] != 0


def test_overflow_of_the_ratio() -> None:
    for objective in (CFPO(), PPOClip()):
        assert native_term(objective, 1000.0, 0.0) == (0.0, 0.0)
        assert torch_term(objective, 1000.0, 0.0) == (0.0, 0.0)
    loss, slope = native_term(CFPO(log_ratio_clip=2.0), 1000.0, 1.0)
    assert math.isfinite(loss) and slope == 0.0
    assert native_term(PPOClip(), 1000.0, 1.0) == (-1.2, 0.0)
    assert native_term(CFPO(), 1000.0, 1.0)[0] == math.inf  # not NaN


def test_kl_is_what_the_oracle_says() -> None:
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])
    for name in ("k1", "k2", "k3"):
        torch.testing.assert_close(reference.kl_term(name, logp, ref), naive_kl(name, logp, ref))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: CFPO(0.0), "epsilon"),
        (lambda: CFPO(-0.2), "epsilon"),
        (lambda: CFPO(math.nan), "epsilon"),
        (lambda: CFPO(0.2, log_ratio_clip=0.0), "log_ratio_clip"),
        (lambda: PPOClip(0.0, 0.2), "epsilon_low"),
        (lambda: PPOClip(1.0, 0.2), "epsilon_low"),
        (lambda: PPOClip(0.2, math.inf), "epsilon_high"),
        (lambda: PPOClip(dual_clip=0.5), "dual_clip"),
    ],
)
def test_bad_parameters(make: object, argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        make()
