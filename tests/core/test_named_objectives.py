"""Every named objective against its naive formula: at the shape, in the kernels, at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from chosen_objectives import CHOSEN, name_of, with_drift
from golden_shapes import TERMS, boundaries
from hypothesis import given
from hypothesis import strategies as st
from naive_objectives import NAIVE, naive_policy
from oracle import Case, check, check_gradient, make_case, oracle, with_everything

import cfpo_kernels
from cfpo_kernels.objectives import OBJECTIVES, Objective
from cfpo_kernels.objectives.base import BOTH


def test_every_name_has_a_naive_formula() -> None:
    assert NAIVE.keys() == OBJECTIVES.keys()
    assert {type(o).__name__ for o in CHOSEN} == {o.__name__ for o in OBJECTIVES.values()}
    assert {o.__name__ for o in OBJECTIVES.values()} <= set(cfpo_kernels.__all__)


def float64(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64)


def bounds_of(objective: Objective, low: float, high: float, advantage: float) -> dict[str, Any]:
    bounds = objective.bounds_of(float64(low), float64(high), float64(advantage))
    return {"low": bounds[0].item(), "high": bounds[1].item()}


@given(
    st.sampled_from(CHOSEN + with_drift),
    st.floats(-2.0, 2.0),
    st.floats(-3.0, 3.0),
    st.floats(-4.0, -0.01),
    st.none() | st.tuples(st.floats(-0.7, -0.1), st.floats(0.1, 0.7)),
)
def test_shapes_are_the_naive_formulas(
    objective: Objective,
    log_ratio: float,
    advantage: float,
    logp: float,
    bounds: tuple[float, float] | None,
) -> None:
    """Value and derivative, in C++ and torch; golden rows have the exact boundaries."""
    if objective.bounded is None:
        bounds = None
    elif objective.needs_bounds:
        bounds = bounds or (-0.3, 0.25)
    kinks = boundaries(objective.shape()) + list(bounds or ())
    if any(abs(log_ratio - kink) < 1e-9 for kink in kinks):
        return
    leaf = float64(logp).requires_grad_()
    x = leaf - leaf.detach() + log_ratio
    given_bounds = None if bounds is None else (float64(bounds[0]), float64(bounds[1]))
    loss = naive_policy(objective, leaf, x, float64(advantage), given_bounds)
    (slope,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    want = (loss.item(), 0.0 if slope is None else slope.item())
    own = {} if bounds is None else bounds_of(objective, *bounds, advantage)
    for term in TERMS.values():
        got = term(objective.shape(), log_ratio, advantage, logp=logp, **own)
        assert got == pytest.approx(want, rel=1e-9, abs=1e-10)


# Away from every boundary in use: near one, the rounding of logits decides.
DELTAS = [0.0, 0.05, -0.05, -0.15, 0.12, 0.42, -0.45, 1.3, -1.7, 0.24, -0.27]


def case_of(objective: Objective, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    case = make_case(33, 300, dtype, objective=objective, **options)
    deltas = torch.tensor(DELTAS)[torch.arange(33) % len(DELTAS)]
    case.old_logps = (oracle_logps(case) - deltas).float()
    if objective.needs_bounds:
        case.options["log_ratio_bounds"] = per_token_bounds(33)
    return case


def per_token_bounds(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return -0.2 - 0.02 * torch.rand(n, generator=g), 0.18 + 0.02 * torch.rand(n, generator=g)


def oracle_logps(case: Case) -> torch.Tensor:
    log_p = torch.log_softmax(case.logits.double(), -1)
    return log_p.gather(-1, case.token_ids[:, None]).squeeze(-1)


@pytest.mark.parametrize("objective", CHOSEN + with_drift[:3], ids=name_of)
def test_kernels_against_float64(objective: Objective) -> None:
    case = case_of(objective, mask_every=5)
    check(case)
    check(case, inplace=True)
    check(case, backend="reference")
    case.options["token_weights"] = 0.5 + torch.rand(33, generator=torch.Generator().manual_seed(3))
    check(case)


@pytest.mark.parametrize("objective", [o for o in CHOSEN if o.bounded is not None], ids=name_of)
def test_bounds_of_each_token(objective: Objective) -> None:
    case = case_of(objective)
    case.options["log_ratio_bounds"] = per_token_bounds(33)
    with_numbers = case_of(objective)
    with_numbers.options["log_ratio_bounds"] = (-0.1, torch.tensor(0.08))
    for chosen in (case, with_numbers):
        check(chosen)
        check(chosen, backend="reference")
    # Bounds matter: with others the gradient is another.
    with pytest.raises(AssertionError):
        check_gradient(oracle(with_numbers).dlogits.float(), oracle(case).dlogits, case)


@pytest.mark.parametrize("objective", CHOSEN, ids=name_of)
def test_from_logps_is_the_same(objective: Objective) -> None:
    case = case_of(objective, mask_every=4)
    leaf = case.logits.clone().requires_grad_()
    logps = cfpo_kernels.token_logps(leaf, case.token_ids, mask=case.mask())
    loss = cfpo_kernels.policy_loss_from_logps(
        logps, case.advantages, case.old_logps, objective=objective, **case.options
    )
    loss.backward()
    want = oracle(case)
    check_gradient(leaf.grad, want.dlogits, case)
    assert loss.item() == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-6)


BACKENDS = ("cpu", "reference", "from_logps")


def loss_and_gradient(
    backend: str, logits: torch.Tensor, ids: torch.Tensor, *given: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    if backend == "from_logps":
        logps = cfpo_kernels.token_logps(leaf, ids)
        loss = cfpo_kernels.policy_loss_from_logps(logps, *given, **options)
    else:
        loss = cfpo_kernels.policy_loss(leaf, ids, *given, backend=backend, **options)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [1000.0, -1000.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("objective", CHOSEN, ids=name_of)
def test_a_token_of_no_weight_counts_nothing(
    objective: Objective, shift: float, backend: str
) -> None:
    """Whatever its ratio is; and so does one without an advantage."""
    logits, ids = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    old = torch.log_softmax(logits, -1)[torch.arange(4), ids]
    options: dict[str, Any] = {"objective": objective, "reduction": "none"}
    if objective.needs_bounds:
        options["log_ratio_bounds"] = (-0.2, 0.2)
    weights = torch.tensor([0.0, 0.0, 1.0, 1.0])
    advantages = torch.tensor([1.0, -2.0, 1.0, -2.0])
    moved = old - shift * torch.tensor([1.0, 1.0, 0.0, 0.0]).where(weights == 0, 0)
    moved = torch.where(weights == 0, moved, old)
    loss, gradient = loss_and_gradient(
        backend, logits, ids, advantages, moved, token_weights=weights, **options
    )
    assert loss[:2].tolist() == [0.0, 0.0] and not gradient[:2].any()
    assert gradient[2:].abs().sum() > 0 and gradient.isfinite().all()
    if objective.shape().drift:
        return  # which acts without an advantage
    idle = torch.where(weights == 0, 0.0, advantages)
    loss, gradient = loss_and_gradient(backend, logits, ids, idle, moved, **options)
    assert loss[:2].tolist() == [0.0, 0.0] and not gradient[:2].any()
    assert gradient[2:].abs().sum() > 0 and gradient.isfinite().all()


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_ratios_that_overflow_are_finite_where_they_are_bounded(backend: str) -> None:
    logits, ids = torch.zeros(2, 50), torch.tensor([1, 2])
    old = torch.full((2,), -1000.0)  # log r = 996
    for name in ("cispo", "gppo", "ice_pop", "sapo", "ppo_clip", "topr"):
        objective = OBJECTIVES[name](**({"dual_clip": 3.0} if name == "ppo_clip" else {}))
        loss, gradient = loss_and_gradient(
            backend, logits, ids, torch.tensor([1.0, -1.0]), old, objective=objective
        )
        assert loss.isfinite() and gradient.isfinite().all(), name


@pytest.mark.parametrize("objective", CHOSEN, ids=name_of)
def test_log_ratio_bounds_go_where_there_are_bounds(objective: Objective) -> None:
    v = torch.zeros(3)

    def loss(bounds: Any) -> torch.Tensor:
        return cfpo_kernels.policy_loss_from_logps(  # type: ignore[return-value]
            v, v + 1, v, objective=objective, log_ratio_bounds=bounds
        )

    name = type(objective).__name__
    if objective.bounded is None:
        with pytest.raises(ValueError, match=f"log_ratio_bounds must be None for {name}"):
            loss((-0.1, 0.1))
    else:
        loss((-0.1, 0.1))
    if objective.needs_bounds:
        with pytest.raises(ValueError, match=f"log_ratio_bounds must be given for {name}"):
            loss(None)


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        (0.2, TypeError, r"log_ratio_bounds must be a pair \(low, high\), got float"),
        ((0.1, 0.2, 0.3), TypeError, "log_ratio_bounds must be a pair"),
        ((math.nan, 0.2), ValueError, r"log_ratio_bounds\[0\]"),
        ((-0.2, "high"), TypeError, r"log_ratio_bounds\[1\]"),
        ((-0.2, torch.zeros(4)), ValueError, r"log_ratio_bounds\[1\].*\(4,\)"),
        ((torch.zeros(3, dtype=torch.int64), 0.2), TypeError, r"log_ratio_bounds\[0\]"),
    ],
    ids=str,
)
def test_bad_bounds(bounds: Any, error: type[Exception], message: str) -> None:
    v = torch.zeros(3)
    with pytest.raises(error, match=message):
        cfpo_kernels.cfpo_loss_from_logps(v, v, v, log_ratio_bounds=bounds)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1+", "k3+"])
@pytest.mark.parametrize("weighted", [False, True])
def test_kl_estimators(estimator: str, weighted: bool) -> None:
    case = with_everything(make_case(26, 200, mask_every=6))
    case.options |= {"kl_estimator": estimator, "kl_ratio_weighted": weighted}
    check(case)
    check(case, backend="reference")


def statistics(objective: Objective, x: list[float], a: list[float], **options: Any) -> Any:
    logps = torch.full((len(x),), -2.0)
    old = logps - torch.tensor(x)
    return cfpo_kernels.policy_loss_from_logps(
        logps, torch.tensor(a), old, objective=objective, return_stats=True, **options
    )[1]


def test_dropped_and_outside_fractions() -> None:
    x, a = [0.3, 0.3, -0.3, -0.3, 0.1, 0.3], [1.0, -1.0, 1.0, -1.0, 1.0, 0.0]
    stats = statistics(cfpo_kernels.PPOClip(0.2, 0.28), x, a)
    assert stats.dropped_fraction == pytest.approx(2 / 5)  # of those with an advantage
    assert stats.outside_fraction == pytest.approx(5 / 6)
    assert statistics(cfpo_kernels.CFPO(), x, a).dropped_fraction == 0
    assert statistics(cfpo_kernels.CFPO(log_ratio_clip=0.2), x, a).dropped_fraction == 1 - 1 / 5
    assert statistics(cfpo_kernels.CISPO(0.8, 1.2), x, a).dropped_fraction == 0
    masked = statistics(cfpo_kernels.PPOClip(), x, a, mask=torch.tensor([1, 1, 0, 0, 1, 1]))
    assert masked.dropped_fraction == pytest.approx(1 / 3)
    free = statistics(cfpo_kernels.Reinforce(), x, a)
    assert free.dropped_fraction == 0 and free.outside_fraction.isnan()
    dppo = statistics(cfpo_kernels.DPPO(), x, a, log_ratio_bounds=(-0.4, 0.2))
    assert dppo.dropped_fraction == pytest.approx(1 / 5)
    assert dppo.outside_fraction == pytest.approx(3 / 6)
    assert statistics(cfpo_kernels.PPOClip(), x, [0.0] * 6).dropped_fraction.isnan()


@pytest.mark.parametrize(
    ("name", "arguments", "argument"),
    [
        ("cispo", {"low": -0.1}, "low"),
        ("cispo", {"low": 2.0, "high": 1.0}, "low must be below high"),
        ("ice_pop", {"high": math.inf}, "high"),
        ("sapo", {"tau_positive": 0.0}, "tau_positive"),
        ("dppo", {"cap": -1.0}, "cap"),
        ("gppo", {"beta_low": -0.1}, "beta_low"),
        ("gppo", {"dual_clip": 1.0}, "dual_clip"),
        ("aspo", {"epsilon_low": 1.0}, "epsilon_low"),
        ("power_is", {"power_positive": math.inf, "power_negative": 1.0}, "power_positive"),
        ("dro", {"beta": 0.0}, "beta"),
        ("cfpo", {"epsilon_high": -1.0}, "epsilon_high"),
        ("reinforce", {"drift": -0.1}, "drift"),
    ],
)
def test_bad_parameters(name: str, arguments: dict[str, float], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        OBJECTIVES[name](**arguments)


def test_both_bounds_or_the_one_that_matters() -> None:
    """A bound on the other side replaces nothing, except where an objective looks at both."""
    v, a = torch.tensor([-0.5]), torch.tensor([1.0])
    for objective in CHOSEN:
        if objective.bounded is None or objective.name == "cfpo":
            continue
        inside = cfpo_kernels.policy_loss_from_logps(
            v - 1, a, v - 0.5, objective=objective, log_ratio_bounds=(-9.0, 0.1)
        )
        below = cfpo_kernels.policy_loss_from_logps(
            v - 1, a, v - 0.5, objective=objective, log_ratio_bounds=(-0.1, 0.1)
        )
        assert (inside != below) == (objective.bounded == BOTH), objective
