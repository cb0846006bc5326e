"""The objectives themselves: one golden table for every language, finite differences, branches."""

from __future__ import annotations

import importlib
import math
import re
from typing import Any

import pytest
import torch
from golden_shapes import (
    GOLDEN,
    SHAPES,
    SIGNS,
    TERMS,
    Term,
    boundaries,
    kl_of,
    native_term,
    row_shape,
    shape_of,
    torch_term,
)
from hypothesis import given
from hypothesis import strategies as st
from naive_objectives import naive_policy
from oracle import naive_kl

from cfpo_kernels import CFPO, PPOClip, formula
from cfpo_kernels.backends import cpu
from cfpo_kernels.inputs import TokenInputs
from cfpo_kernels.objectives import OBJECTIVES, Objective
from cfpo_kernels.shapes import NUMBERS


def term_of(term: Any, objective: Objective, log_ratio: float, advantage: float) -> Term:
    return term(objective.shape(), log_ratio, advantage)  # type: ignore[no-any-return]


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("row", GOLDEN["policy"], ids=lambda row: row["note"])
def test_golden_policy(row: dict, term: Any) -> None:
    objective = OBJECTIVES[row["objective"]](**row["parameters"])
    got = term_of(term, objective, row["log_ratio"], row["advantage"])
    assert got == pytest.approx((row["loss"], row["dlogp"]), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("row", GOLDEN["kl"], ids=lambda row: f"{row['estimator']} {row['d']}")
def test_golden_kl(row: dict) -> None:
    for got in kl_of(row["estimator"], row["d"], 0.0).values():
        assert got == pytest.approx((row["loss"], row["dlogp"]), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_golden_shapes(term: Any) -> None:
    wrong = []
    for row in SHAPES["policy"]:
        got = term(row_shape(row), row["log_ratio"], row["advantage"], logp=row["logp"])
        if got != pytest.approx((row["loss"], row["dlogp"]), rel=1e-12, abs=1e-14):
            wrong.append((row["note"], got, row["loss"], row["dlogp"]))
    assert len(SHAPES["policy"]) == 568 and wrong == []


def test_golden_estimators() -> None:
    for row in SHAPES["kl"]:
        for got in kl_of(row["estimator"], row["d"], row["log_ratio"]).values():
            assert got == pytest.approx((row["loss"], row["dlogp"]), rel=1e-12, abs=1e-14), row


@pytest.mark.parametrize("entry", SHAPES["shapes"], ids=lambda entry: str(entry["source"]))
def test_named_objectives_are_the_shapes_of_the_table(entry: dict) -> None:
    if entry.get("objective") not in OBJECTIVES:
        pytest.skip("held at the shape")
    got = OBJECTIVES[entry["objective"]](**entry["arguments"]).shape()
    assert got.kind == entry["kind"]
    want = shape_of(entry)
    # What a branch that cannot be reached would do is nobody's business.
    for sign in SIGNS:
        for end, kept in (("low", "below"), ("high", "above")):
            if math.isinf(getattr(want, f"{end}_{sign}")):
                field = f"{kept}_{sign}"
                want = want._replace(**{field: getattr(got, field)})
    assert got.numbers == pytest.approx(want.numbers, rel=1e-14, abs=1e-15)


def test_every_language_has_the_same_tables() -> None:
    assert tuple(cpu.native.token_columns()) == TokenInputs._fields
    assert tuple(cpu.native.policy_numbers()) == NUMBERS
    token = pytest.importorskip("cfpo_kernels.triton_kernels.token")
    kernel = importlib.import_module("cfpo_kernels.triton_kernels.kernels").policy_loss_kernel
    assert TokenInputs._fields == token.COLUMNS
    pointers = [name for name in kernel.arg_names if name.removesuffix("_ptr") in token.COLUMNS]
    assert tuple(name.removesuffix("_ptr") for name in pointers) == TokenInputs._fields
    shared = [name for name in kernel.arg_names if name in NUMBERS]
    own = [name for name in kernel.arg_names if re.fullmatch(r"p\d+", name)]
    assert tuple(shared) == NUMBERS[: len(shared)] and len(shared) + len(own) == len(NUMBERS)


policies = st.one_of(
    st.builds(CFPO, st.floats(0.05, 0.5), st.none() | st.floats(0.1, 5.0)),
    st.builds(PPOClip, st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.none() | st.floats(1.5, 5.0)),
)


@given(policies, st.floats(-2.0, 2.0), st.floats(-3.0, 3.0))
def test_partials_are_finite_differences(
    objective: CFPO | PPOClip, log_ratio: float, advantage: float
) -> None:
    step = 1e-5
    if any(abs(log_ratio - kink) <= 2 * step for kink in boundaries(objective.shape())):
        return  # no derivative there
    for term in TERMS.values():
        up, down = (
            term_of(term, objective, log_ratio + step, advantage),
            term_of(term, objective, log_ratio - step, advantage),
        )
        slope = (up[0] - down[0]) / (2 * step)
        got = term_of(term, objective, log_ratio, advantage)[1]
        assert got == pytest.approx(slope, rel=1e-4, abs=1e-6)


@given(policies, st.floats(-2.0, 2.0), st.floats(-3.0, 3.0))
def test_native_equals_the_naive_formula(
    objective: CFPO | PPOClip, log_ratio: float, advantage: float
) -> None:
    naive = naive_policy(
        objective,
        torch.tensor(-1.0, dtype=torch.float64),
        torch.tensor(log_ratio, dtype=torch.float64),
        torch.tensor(advantage, dtype=torch.float64),
    ).item()
    assert term_of(native_term, objective, log_ratio, advantage)[0] == pytest.approx(
        naive, abs=1e-11
    )


@pytest.mark.parametrize("advantage", [2.0, -0.5])
@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_cfpo_gradient_vanishes_only_at_its_optimum(advantage: float, epsilon: float) -> None:
    best = math.log(1 + math.copysign(epsilon, advantage))
    objective = CFPO(epsilon)
    assert term_of(native_term, objective, best, advantage)[1] == pytest.approx(0.0, abs=1e-12)
    assert term_of(native_term, objective, 0.0, advantage)[1] == -advantage
    for x in torch.linspace(-3, 3, 241).tolist():
        slope = term_of(native_term, objective, x, advantage)[1]
        # Descending the loss moves r towards the optimum from either side.
        assert abs(x - best) < 1e-9 or math.copysign(1, slope) == math.copysign(1, x - best)


@pytest.mark.parametrize("side", [-1, 1])
def test_clip_branch_next_to_the_boundary(side: int) -> None:
    objective = PPOClip(0.2, 0.3)
    for advantage, edge in ((1.0, math.log(1.3)), (-1.0, math.log(0.8))):
        inside = edge - math.copysign(1e-9, advantage)
        outside = edge + math.copysign(1e-9, advantage)
        assert term_of(native_term, objective, inside, advantage)[1] != 0
        assert term_of(native_term, objective, outside, advantage)[1] == 0
        # With the other sign of A this edge is not clipped.
        assert term_of(native_term, objective, outside, -advantage)[1] != 0


def test_overflow_of_the_ratio() -> None:
    for objective in (CFPO(), PPOClip()):
        assert term_of(native_term, objective, 1000.0, 0.0) == (0.0, 0.0)
        assert term_of(torch_term, objective, 1000.0, 0.0) == (0.0, 0.0)
    loss, slope = term_of(native_term, CFPO(log_ratio_clip=2.0), 1000.0, 1.0)
    assert math.isfinite(loss) and slope == 0.0
    assert term_of(native_term, PPOClip(), 1000.0, 1.0) == (-1.2, 0.0)
    assert term_of(native_term, CFPO(), 1000.0, 1.0)[0] == math.inf  # not NaN


def test_kl_is_what_the_oracle_says() -> None:
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])
    for name in ("k1", "k2", "k3"):
        torch.testing.assert_close(formula.kl_term(name, logp, ref), naive_kl(name, logp, ref))


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
