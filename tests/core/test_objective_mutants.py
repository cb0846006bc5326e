"""Mistakes planted in the shapes, in C++ and torch, that the golden table must find.

Each mutant is the source with one line changed. If a change of the formulas makes a line unknown
here, the test says so: plant the same mistake in the new code.
"""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from emulation import CXX, compile_cpp
from golden_shapes import SHAPES, kl_of, row_shape, shape_of, torch_term
from repository import ROOT

from cfpo_kernels import formula
from cfpo_kernels.shapes import Shape

KINDS = ("window", "quadratic", "sigmoid")
ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")
# Beside the table: what has no weight, or no advantage, counts 0 wherever r is.
SILENT = [
    (Shape("window", cap=5.0), (-1.0, 1000.0, 0.0, 1.0)),
    (Shape("quadratic", high_positive=0.2, high_negative=0.2), (-1.0, 1000.0, 1.0, 0.0)),
    (Shape("window", drift=0.1), (-1.0, math.inf, 1.0, 0.0)),
    (Shape("quadratic", high_positive=0.2, high_negative=0.2), (-1.0, math.nan, 0.0, math.nan)),
]
# r is a number where a bound makes it one, and stays NaN where it is.
FAR = [
    (Shape("window", high_positive=0.2), (-1.0, 1000.0, 1.0, 1.0), True),
    (
        Shape("window", low_positive=-1.0, below_positive=1.0, power_positive=-1.0),
        (-1.0, -1000.0, 1.0, 1.0),
        True,
    ),
    (Shape("sigmoid", cap=80.0), (-1.0, 1000.0, 1.0, 1.0), True),
    (Shape("window", low_positive=-0.1, high_positive=0.1), (-1.0, math.nan, 1.0, 1.0), False),
    (
        Shape("window", low_positive=-0.1, high_positive=0.1, value=2.0),
        (-1.0, math.nan, 1.0, 1.0),
        False,
    ),
    (
        Shape("quadratic", high_positive=0.2, high_negative=0.2, drift=0.1),
        (-1.0, 1000.0, 0.0, 1.0),
        True,
    ),
    (Shape("window", power_positive=0.0, value=1.0), (-1.0, math.inf, 1.0, 1.0), True),
    (Shape("window", high_positive=0.2, value=2.0), (-math.inf, 1.0, 1.0, 1.0), True),
]  # fmt: skip


class Compiled:
    """policy_term and kl_term of a copy of core/objective.h."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def policy_term(self, shape: Shape, token: tuple[float, ...]) -> tuple[float, float]:
        term = (ctypes.c_double * 2)()
        numbers = (ctypes.c_double * 13)(*shape.numbers)
        given = (ctypes.c_double * 4)(*token)
        self.library.policy_term(KINDS.index(shape.kind), numbers, given, term)
        return term[0], term[1]

    def kl_term(self, estimator: str, d: float, log_ratio: float) -> tuple[float, float]:
        term = (ctypes.c_double * 2)()
        index = ESTIMATORS.index(estimator.removesuffix("r"))
        weighted = int(estimator.endswith("r"))
        self.library.kl_term(index, weighted, ctypes.c_double(d), ctypes.c_double(log_ratio), term)
        return term[0], term[1]


def problems_of(terms: Any) -> Iterator[str]:
    def differs(got: tuple[float, float], want: tuple[float, float]) -> bool:
        return got != pytest.approx(want, rel=1e-12, abs=1e-14, nan_ok=True)

    for row in SHAPES["policy"]:
        token = (row["logp"], row["log_ratio"], row["advantage"], 1.0)
        if differs(terms.policy_term(row_shape(row), token), (row["loss"], row["dlogp"])):
            yield str(row["note"])
    for row in SHAPES["kl"]:
        got = terms.kl_term(row["estimator"], row["d"], row["log_ratio"])
        if differs(got, (row["loss"], row["dlogp"])):
            yield f"{row['estimator']} at {row['d']}"
    for entry in SHAPES["shapes"]:
        shape = shape_of(entry)
        for advantage, sign in ((1.0, "positive"), (-1.0, "negative")):
            for end, inwards in (("low", 1e-9), ("high", -1e-9)):
                edge = getattr(shape, f"{end}_{sign}")
                if shape.kind == "window" and math.isfinite(edge):
                    on = terms.policy_term(shape, (-1.0, edge, advantage, 1.0))
                    inside = terms.policy_term(shape, (-1.0, edge + inwards, advantage, 1.0))
                    if on != pytest.approx(inside, rel=1e-7):
                        yield f"on the edge {edge} of {entry['source']}"
    for shape, token in SILENT:
        if terms.policy_term(shape, token) != (0.0, 0.0):
            yield f"{token} counts"
    for shape, token, finite in FAR:
        loss, dlogp = terms.policy_term(shape, token)
        if (math.isfinite(loss) and math.isfinite(dlogp)) != finite:
            yield f"{shape.kind} at {token}: {loss}, {dlogp}"


CPP = {
    "a bound is outside": ("token.log_ratio > token.high;", "token.log_ratio >= token.high;"),
    "a lower bound is outside": ("log_ratio < token.low;", "log_ratio <= token.low;"),
    "slopes exchanged": (
        "positive ? below_positive : below_negative",
        "positive ? above_positive : above_negative",
    ),
    "slopes of the other sign": (
        "positive ? above_positive : above_negative",
        "positive ? above_negative : above_positive",
    ),
    "a slope of its own ignored": (
        "double slope = 1;\n    if (below)",
        "double slope = 1;\n    if (false)",
    ),
    "powers of the other sign": (
        "const double power = positive ? power_positive : power_negative;",
        "const double power = positive ? power_negative : power_positive;",
    ),
    "power ignored": ("std::exp(power * x)", "std::exp(x)"),
    "0 * inf": ("power == 0 ? 1.0 : std::exp(power * x)", "std::exp(power * x)"),
    "cap ignored": ("x = x > cap ? cap : x;", ""),
    "cap before the bounds": (
        "above ? token.high : token.log_ratio;",
        "above ? token.high : token.log_ratio > cap ? cap : cap;",
    ),
    "min swallows NaN": ("x = x > cap ? cap : x;", "x = std::fmin(x, std::fmin(cap, token.high));"),
    "a dropped token reports 0": ("slope == 0) reported = weight;", "slope == 0) reported = 0;"),
    "a mask reports its bound": ("value == static_cast<int>(Value::kSurrogate) && slope", "slope"),
    "score without logp": ("reported *= token.logp;", ""),
    "0 * -inf": ("&& gradient != 0) reported", ") reported"),
    "gradient without the slope": (
        "slope == 0 ? 0.0 : slope * weight",
        "slope == 0 ? 0.0 : weight",
    ),
    "width squared": ("abs(advantage) / token.high", "abs(advantage) / (token.high * token.high)"),
    "half missing": ("0.5 * slope * excess", "slope * excess"),
    "clamp keeps its gradient": ("inside ? dlogp : 0.0", "dlogp"),
    "tau of the other sign": (
        "token.advantage > 0 ? power_positive : power_negative;\n    const double ratio",
        "token.advantage > 0 ? power_negative : power_positive;\n    const double ratio",
    ),
    "4 / tau forgotten": (": 1.0) * divisor", ": 1.0) * share"),
    "the gate's wrong half": ("z < 0 ? q : 1.0", "z > 0 ? q : 1.0"),
    "sigmoid without its cap": (
        "exp(token.log_ratio > cap ? cap : token.log_ratio)",
        "exp(token.log_ratio)",
    ),
    "drift doubled": ("0.5 * policy.drift", "policy.drift"),
    "drift without a gradient": ("total.dlogp += policy.drift * token.log_ratio;", ""),
    "drift of tokens without weight": ("token.token_weight != 0 && (", "("),
    "A = 0 is not exactly 0": ("if (token.advantage != 0) total", "total"),
    "k3's root": ("{excess - d, estimator", "{excess, estimator"),
    "k3+ with k3's gradient": ("estimator == KlEstimator::kK3Plus ? -d : -excess", "-excess"),
    "k1+ with k1's gradient": (
        "estimator == KlEstimator::kK1 ? 1.0 : -d",
        "estimator != KlEstimator::kK2 ? 1.0 : -d",
    ),
    "ratio not differentiated": (
        "reg.kl_estimator == KlEstimator::kK3 ? -d : kl.loss + kl.dlogp",
        "kl.dlogp",
    ),
    "ratio upside down": ("std::exp(log_ratio)", "std::exp(-log_ratio)"),
}  # fmt: skip


@pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", [None, *CPP])
def test_the_table_sees_mistakes_in_cpp(name: str | None, tmp_path: Path) -> None:
    text = (ROOT / "csrc" / "core" / "objective.h").read_text()
    if name is not None:
        right, planted = CPP[name]
        assert text.count(right) == 1, f"{right!r} is no longer there once"
        text = text.replace(right, planted)
    core = tmp_path / "csrc" / "core"
    core.mkdir(parents=True)
    (core / "objective.h").write_text(text)
    shutil.copy(ROOT / "csrc" / "core" / "host_device.h", core)
    library = tmp_path / "policy_term.so"
    source = ROOT / "tests" / "cpp" / "policy_term.cpp"
    compile_cpp(source, library, "-shared", "-Wno-error", tree=tmp_path, optimise="-O0")
    found = next(problems_of(Compiled(library)), None)
    assert (found is None) == (name is None), found


TORCH = {
    "a bound is outside": ("below, above = x < low, x > high", "below, above = x < low, x >= high"),
    "clamp swallows NaN": (
        "torch.where(below, low, torch.where(above, high, x))",
        "torch.fmin(torch.fmax(x, low), high)",
    ),
    "cap ignored": ("    bounded = torch.where(bounded > shape.cap, shape.cap, bounded)\n", ""),
    "slopes exchanged": (
        "_by_sign(advantages, shape.above_positive, shape.above_negative)",
        "_by_sign(advantages, shape.below_positive, shape.below_negative)",
    ),
    "0 * inf": (
        "torch.where(power == 0, 1, torch.exp(power * bounded))",
        "torch.exp(power * bounded)",
    ),
    "not detached": ("_sides(shape, x.detach(), advantages", "_sides(shape, x, advantages"),
    "score without its guard": (
        "gradient * torch.where(gradient == 0, 0, logps)",
        "gradient * logps",
    ),
    "a dropped token reports 0": ("reported = torch.where(slope == 0, weight, reported)", "pass"),
    "half missing": ("advantages.abs() / (2 * width)", "advantages.abs() / width"),
    "the gate's derivative at 0": ("torch.exp(torch.where(z < 0, z, -z))", "torch.exp(-z.abs())"),
    "a where without a where": (
        "        zero_where(outside, log_ratio),\n",
        "        log_ratio,\n",
    ),
    "drift doubled": ("0.5 * shape.drift", "shape.drift"),
    "drift of tokens without weight": ("log_ratio = zero_where(ignored, log_ratio)", "pass"),
    "k3+ not straight through": ("value.detach() + (k2 - k2.detach())", "value"),
    "ratio upside down": ("kl * log_ratio.exp()", "kl * (-log_ratio).exp()"),
    "power ignored": ("torch.exp(power * bounded)", "torch.exp(bounded)"),
}  # fmt: skip


class InTorch:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def policy_term(self, shape: Shape, token: tuple[float, ...]) -> tuple[float, float]:
        logp, log_ratio, advantage, weight = token
        return torch_term(shape, log_ratio, advantage, logp=logp, token_weight=weight)

    def kl_term(self, estimator: str, d: float, log_ratio: float) -> tuple[float, float]:
        return kl_of(estimator, d, log_ratio)["torch"]


@pytest.mark.parametrize("name", [None, *TORCH])
def test_the_table_sees_mistakes_in_torch(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert formula.__file__ is not None
    text = Path(formula.__file__).read_text()
    if name is not None:
        right, planted = TORCH[name]
        assert text.count(right) == 1, f"{right!r} is no longer there once"
        text = text.replace(right, planted)
    mutant = ModuleType("cfpo_kernels.formula")
    mutant.__package__ = "cfpo_kernels"
    exec(text, vars(mutant))
    for function in ("policy_loss", "kl_loss"):
        monkeypatch.setattr(formula, function, getattr(mutant, function))
    found = next(problems_of(InTorch(monkeypatch)), None)
    assert (found is None) == (name is None), found
