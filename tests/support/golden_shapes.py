"""The shared table of right values, and a term of the loss as each language computes it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from repository import GOLDEN as TABLES

from cfpo_kernels import formula
from cfpo_kernels.backends import cpu
from cfpo_kernels.inputs import LossSettings, TokenInputs
from cfpo_kernels.shapes import Shape

SHAPES = json.loads((TABLES / "shapes.json").read_text())
GOLDEN = json.loads((TABLES / "objectives.json").read_text())  # by names of objectives


def number(x: float | str) -> float:
    return float(x)  # "inf", "-inf"


def shape_of(entry: dict[str, Any]) -> Shape:
    return Shape(entry["kind"], **{name: number(x) for name, x in entry["numbers"].items()})


def row_shape(row: dict[str, Any]) -> Shape:
    """The row's shape; bounds of a token replace both of its own."""
    shape = shape_of(SHAPES["shapes"][row["shape"]])
    for end in ("low", "high"):
        if row[end] is not None:
            bound = number(row[end])
            shape = shape._replace(**{f"{end}_positive": bound, f"{end}_negative": bound})
    return shape


Term = tuple[float, float]  # loss, d loss / d logp


def native_term(
    shape: Shape,
    log_ratio: float,
    advantage: float,
    *,
    logp: float = -1.0,
    low: float | None = None,
    high: float | None = None,
    token_weight: float = 1.0,
) -> Term:
    loss, dlogp = cpu.native.policy_term(
        shape=shape.kind,
        numbers=shape.numbers,
        logp=logp,
        log_ratio=log_ratio,
        advantage=advantage,
        low=low,
        high=high,
        token_weight=token_weight,
    )
    return loss, dlogp


def torch_term(
    shape: Shape,
    log_ratio: float,
    advantage: float,
    *,
    logp: float = -1.0,
    low: float | None = None,
    high: float | None = None,
    token_weight: float = 1.0,
) -> Term:
    def one(x: float | None) -> torch.Tensor | None:
        return None if x is None else torch.tensor([x], dtype=torch.float64)

    # old_logp = logp - log_ratio would be rounded: the sum must be log_ratio to the last bit.
    leaf = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    inputs = TokenInputs(one(advantage), None, one(token_weight), None, one(low), one(high))  # type: ignore[arg-type]
    loss = formula.policy_loss(leaf + logp, leaf + log_ratio, inputs, shape)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.item(), slope.item()


TERMS = {"native": native_term, "torch": torch_term}


def kl_of(estimator: str, d: float, log_ratio: float) -> dict[str, Term]:
    """`estimator`, or one whose name ends in r for a factor of r, in C++ and torch."""
    weighted = estimator.endswith("r")
    estimator = estimator.removesuffix("r")
    native = cpu.native.kl_term(
        estimator=estimator, distance=d, log_ratio=log_ratio, ratio_weighted=weighted
    )
    leaf = torch.tensor(-d, dtype=torch.float64, requires_grad=True)
    settings = LossSettings(Shape("window"), estimator, weighted, 1.0)
    shifted = leaf - leaf.detach() + log_ratio
    loss = formula.kl_loss(settings, leaf, shifted, torch.zeros((), dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss, leaf)
    return {"native": native, "torch": (loss.item(), slope.item())}


def boundaries(shape: Shape) -> list[float]:
    """Log-ratios where a shape has no derivative."""
    ends = [shape.cap, -shape.cap]
    if shape.kind == "window":
        ends += [getattr(shape, f"{end}_{sign}") for end in ("low", "high") for sign in SIGNS]
    return [end for end in ends if math.isfinite(end)]


SIGNS = ("positive", "negative")


def on_a_boundary(shape: Shape, log_ratio: float) -> bool:
    return any(math.isclose(log_ratio, end, rel_tol=1e-6) for end in boundaries(shape))


def problem_of(row: dict[str, Any], shape: Shape, got: Term, *, near: float = 1e-6) -> str:
    """What is wrong with a term that was computed in float32, or "".

    The table is float64. Rounded to float32, a log-ratio on a boundary may land on either side
    of it: there the derivative is that of one side or the other.
    """
    x, a = row["log_ratio"], row["advantage"]
    wanted = [(row["loss"], row["dlogp"])]
    if on_a_boundary(shape, x):
        wanted += [native_term(shape, x + step, a, logp=row["logp"]) for step in (-3e-7, 3e-7)]
    for loss, dlogp in wanted:
        allowed = 2e-5 if len(wanted) > 1 else near * max(1.0, abs(x))
        if got[0] == pytest.approx(loss, rel=allowed, abs=allowed) and got[1] == pytest.approx(
            dlogp, rel=max(allowed, 2e-6), abs=2 * near
        ):
            return ""
    return f"{row['note']}: got {got}, want {wanted}"
