"""Every row of the golden tables, through the kernels. core/test_objective.py has them by scalars,
which C++ and torch compute in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from golden_shapes import GOLDEN, SHAPES, Term, native_term, number, problem_of, row_shape, shape_of

from cfpo_kernels import ops
from cfpo_kernels.inputs import LossSettings, TokenInputs
from cfpo_kernels.objectives import OBJECTIVES
from cfpo_kernels.shapes import Shape

pytestmark = pytest.mark.not_on("reference", reason="core/test_objective.py has it in float64")

LARGEST_LOGP = -0.05  # of which something else than 0 is left for 1 - p


def through_the_kernels(rows: list[dict[str, Any]], settings: LossSettings) -> list[Term]:
    """Loss and d loss / d logp of each: rows of two columns, whose first is the token's."""
    n = len(rows)
    logp = torch.tensor([row["logp"] for row in rows], dtype=torch.float64)
    logits = torch.stack([torch.zeros(n), torch.log(torch.expm1(-logp)).float()], dim=1)
    logp = torch.log_softmax(logits.double(), dim=1)[:, 0]  # with the rounding of the logits

    def each(name: str, otherwise: float) -> torch.Tensor:
        return torch.tensor([number(row.get(name, otherwise)) for row in rows], dtype=torch.float64)

    def bound(name: str) -> torch.Tensor | None:
        return None if rows[0].get(name) is None else each(name, 0.0).float()

    inputs = TokenInputs(
        each("advantage", 0.0).float(),
        (logp - each("log_ratio", 0.0)).float(),
        None,
        (logp + each("d", 0.0)).float() if settings.kl_coef else None,
        bound("low"),
        bound("high"),
    )
    loss, _, _, dlogits = ops.policy_loss(
        logits,
        torch.zeros(n, dtype=torch.int64),
        torch.ones(n),
        torch.ones(1),
        False,
        True,
        "cpu",
        list(inputs),
        *ops.flat(settings),
        None,
    )
    dlogp = dlogits[:, 0].double() / -torch.expm1(logp)
    return list(zip(loss.tolist(), dlogp.tolist(), strict=True))


def problems(rows: list[dict[str, Any]], shapes: list[Shape], settings: LossSettings) -> list[str]:
    got = through_the_kernels(rows, settings)
    found = (problem_of(*x, near=4e-6) for x in zip(rows, shapes, got, strict=True))
    return [problem for problem in found if problem]


def at_a_logp_there_is(row: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Some rows have a log-prob above 0, to tell it from 0; a kernel cannot be told one."""
    if row["logp"] <= LARGEST_LOGP:
        return row
    loss, _ = native_term(shape, row["log_ratio"], row["advantage"], logp=-1.0)
    return row | {"logp": -1.0, "loss": loss}


@pytest.mark.nightly_on(
    "triton-interpreted", reason="20 s, and test_triton_interpreted.py has each row by scalars"
)
def test_policies_by_shape() -> None:
    def launch(row: dict[str, Any]) -> tuple[int, bool, bool]:
        return row["shape"], row["low"] is None, row["high"] is None

    found, count = [], 0
    for (shape, _, _), group in itertools.groupby(sorted(SHAPES["policy"], key=launch), launch):
        given = list(group)
        shapes = [row_shape(row) for row in given]
        rows = [at_a_logp_there_is(*x) for x in zip(given, shapes, strict=True)]
        own = shape_of(SHAPES["shapes"][shape])
        found += problems(rows, shapes, LossSettings(own))
        count += len(rows)
    assert count == 568 and found == []


def test_policies_by_name() -> None:
    found, count = [], 0
    key = lambda row: (row["objective"], str(row["parameters"]))  # noqa: E731
    for _, group in itertools.groupby(sorted(GOLDEN["policy"], key=key), key):
        rows = [row | {"logp": -1.0} for row in group]
        shape = OBJECTIVES[rows[0]["objective"]](**rows[0]["parameters"]).shape()
        found += problems(rows, [shape] * len(rows), LossSettings(shape))
        count += len(rows)
    assert count == 102 and found == []


@pytest.mark.parametrize("estimator", sorted({row["estimator"] for row in SHAPES["kl"]}))
def test_kl(estimator: str) -> None:
    rows = [row for row in GOLDEN["kl"] + SHAPES["kl"] if row["estimator"] == estimator]
    weighted, name = estimator.endswith("r"), estimator.removesuffix("r")
    settings = LossSettings(Shape("window"), name, weighted, kl_coef=1.0)
    got = through_the_kernels([row | {"logp": -1.0} for row in rows], settings)
    for row, term in zip(rows, got, strict=True):
        assert term == pytest.approx((row["loss"], row["dlogp"]), rel=4e-6, abs=2e-6), row
