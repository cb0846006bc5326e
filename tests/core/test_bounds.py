"""Bounds on log r, against values at 60 digits and against roots found by bisection at 50."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from mpmath import mp, mpf  # torch needs it
from naive_bapo import OPTIONS, naive_bapo
from plain_torch import Refusal, check_refused, planted, refused, run_examples, works_everywhere
from ranks import found_by_ranks
from repository import GOLDEN

from cfpo_kernels import bounds

ROWS = json.loads((GOLDEN / "bounds.json").read_text())["rows"]
BY_TOKEN = ("total_variation", "kl", "chi_squared")
Bounds = tuple[torch.Tensor, torch.Tensor]


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def solved(name: str, solve: Callable[..., Any], row: dict[str, Any]) -> tuple[float, float]:
    if row["old_logp"] is None:
        return solve(row["delta"])
    deltas = row["delta"] if isinstance(row["delta"], list) else [row["delta"]]
    low, high = solve(double(row["old_logp"]), *deltas)
    return low.item(), high.item()


def check_golden(**replaced: Callable[..., Any]) -> int:
    """How many rows were compared."""
    compared = 0
    for row in ROWS:
        name = row["divergence"]
        if replaced and name not in replaced:
            continue
        got = solved(name, replaced.get(name, getattr(bounds, name)), row)
        assert got == pytest.approx((float(row["low"]), float(row["high"])), rel=2e-13), row
        compared += 1
    return compared


def test_golden_rows() -> None:
    assert check_golden() == len(ROWS) == 51


def exact_divergence(name: str, p: mpf, x: mpf) -> mpf:
    q = p * mp.exp(x)
    if name == "total_variation":
        return abs(q - p)
    if name == "chi_squared":
        return (q - p) ** 2 / (p * (1 - p))
    if q >= 1:
        return mp.inf
    return -p * x + (1 - p) * (mp.log1p(-p) - mp.log1p(-q))


def bisected(name: str, logp: float, delta: float, sign: int) -> float:
    """The root on one side of 0, or an infinity where there is none that float64 holds."""
    p, delta, outside = mp.exp(mpf(logp)), mpf(delta), mpf(sign)
    while exact_divergence(name, p, outside) <= delta:
        outside *= 2
        if abs(outside) > 1e308:
            return sign * math.inf
    inside = mpf(0)
    while abs(outside - inside) > abs(outside) * mpf(10) ** -20:
        middle = (inside + outside) / 2
        if exact_divergence(name, p, middle) > delta:
            outside = middle
        else:
            inside = middle
    return float(inside)


LOGPS = (-1e-9, -1e-4, -0.05, -0.6, -1.3, -3.0, -8.0, -30.0, -200.0, -700.0)


@pytest.mark.parametrize("name", BY_TOKEN)
def test_roots_by_bisection(name: str) -> None:
    mp.dps = 50
    for delta in (1e-6, 1e-3, 0.05, 0.3, 4.0):
        low, high = getattr(bounds, name)(double(*LOGPS), delta)
        for i, logp in enumerate(LOGPS):
            want = (bisected(name, logp, delta, -1), bisected(name, logp, delta, 1))
            assert (low[i].item(), high[i].item()) == pytest.approx(want, rel=1e-12), (logp, delta)


def test_kl3_by_bisection() -> None:
    mp.dps = 50
    for delta in (1e-8, 1e-3, 0.1, 2.0, 1e5):
        for sign, got in zip((-1, 1), bounds.kl3(delta), strict=True):
            inside, outside = mpf(0), mpf(sign) * (2 + 2 * delta)
            for _ in range(150):
                middle = (inside + outside) / 2
                above = mp.expm1(middle) - middle > delta
                inside, outside = (inside, middle) if above else (middle, outside)
            assert got == pytest.approx(float(inside), rel=1e-11)
        assert [x.item() for x in bounds.kl3(double(delta)[0])] == list(bounds.kl3(delta))


def falls(x: torch.Tensor) -> bool:
    """Of negative numbers, but for rounding; what is infinite stays so."""
    return bool((x[1:] <= x[:-1] * (1 - 1e-12)).all())


@pytest.mark.parametrize("name", BY_TOKEN)
def test_order_and_monotonicity(name: str) -> None:
    logp = -torch.logspace(-12, 2.8, 3000, dtype=torch.float64)
    deltas = (1e-6, 1e-4, 0.01, 0.05, 0.2, 0.9)
    lows, highs = zip(*(getattr(bounds, name)(logp, delta) for delta in deltas), strict=True)
    for low, high in zip(lows, highs, strict=True):
        assert (low < 0).all() and (high > 0).all()
        assert name != "kl" or ((high <= -logp).all() and low.isfinite().all())
        # The rarer the token, the wider its bounds; logp falls along the tensor.
        assert falls(low) and falls(-high) and low[-1] < low[0] and high[-1] > high[0]
    assert falls(torch.stack(lows)) and falls(-torch.stack(highs))
    likely = logp > -1e-3
    assert (torch.stack(lows).diff(dim=0) < 0)[:, likely].all()


def bernoulli(name: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    if name == "total_variation":
        return (q - p).abs()
    if name == "chi_squared":
        return (q - p) ** 2 / (p * (1 - p))
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


@pytest.mark.parametrize("name", BY_TOKEN)
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2])
def test_outside_the_bounds_is_beyond_the_divergence(name: str, delta: float) -> None:
    g = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 100_000, generator=g, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    low, high = getattr(bounds, name)(p.log(), delta)
    x, beyond = (q / p).log(), bernoulli(name, p, q)
    far = (beyond - delta).abs() > 1e-9
    outside = (x < low) | (x > high)
    assert torch.equal(outside[far], (beyond > delta)[far])
    assert 0.02 < outside.double().mean() < 0.99 and far.double().mean() > 0.99


def test_edges() -> None:
    logp = double(0.0, 1e-7, -1e-9, -30.0, -700.0, -1e5, -math.inf)
    p = logp.clamp(max=0).exp()
    low, high = bounds.total_variation(logp, 0.1)
    assert low[:3].tolist() == pytest.approx([math.log(0.9)] * 3, rel=1e-8)
    assert high[:3].tolist() == pytest.approx([math.log(1.1)] * 3, rel=1e-8)
    assert low[3:].tolist() == [-math.inf] * 4
    assert high[3:].tolist() == pytest.approx((math.log(0.1) - logp[3:]).tolist(), rel=1e-11)
    low, high = bounds.kl(logp, 0.1)
    assert low[:2].tolist() == pytest.approx([-0.1] * 2) and high[:2].tolist() == [0, 0]
    assert low[3:5].tolist() == pytest.approx((-0.1 / p[3:5]).tolist(), rel=1e-10)
    assert low[5:].tolist() == [-math.inf] * 2 and high[6] == math.inf
    assert high[3:6].tolist() == pytest.approx(
        (math.log(-math.expm1(-0.1)) - logp[3:6]).tolist(), rel=1e-11
    )
    low, high = bounds.chi_squared(logp, 0.1)
    assert low[:2].tolist() == high[:2].tolist() == [0, 0]
    assert low[3:].tolist() == [-math.inf] * 4 and high[6] == math.inf
    # p = delta exactly: q = 0 is a divergence of delta, on the bound and so inside.
    assert bounds.total_variation(double(0.25).log(), 0.25)[0].item() == -math.inf
    low, high = bounds.dac(logp, 0.16, 0.2, cap=math.inf)
    assert low[3:].tolist() == [math.log(0.5)] * 4
    assert high[3:5].tolist() == pytest.approx((0.5 * (math.log(0.2) - logp[3:5])).tolist(), 1e-5)
    for solve in (bounds.band, lambda x: bounds.dac(x, 0.16, 0.2)):
        low, high = solve(logp)
        assert (low <= 0).all() and (high >= 0).all() and high[3:].tolist() == [math.log(10)] * 4


def test_band() -> None:
    logp = double(-1e-3, -0.1, -0.7, -2.0, -2.5, -6.0)
    for name in BY_TOKEN:
        low, high = getattr(bounds, name)(logp, 0.3)
        got = bounds.band(logp, 0.3, 4.0, name)
        assert torch.equal(got[0], low)
        want = [
            min(h, -lp, math.log(4)) for h, lp in zip(high.tolist(), logp.tolist(), strict=True)
        ]
        assert got[1].tolist() == pytest.approx(want, rel=1e-15)
        assert (got[1] < high).any() and got[1][-1] < high[-1]
    assert torch.equal(bounds.band(logp)[0], bounds.kl(logp, 0.05)[0])
    assert bounds.band(logp)[1][-1].item() == pytest.approx(math.log(10))


EVERY = {
    "total_variation": lambda x: bounds.total_variation(x, 0.1),
    "kl": lambda x: bounds.kl(x, 0.1),
    "chi_squared": lambda x: bounds.chi_squared(x, 0.1),
    "band": lambda x: bounds.band(x, 0.1),
    "dac": lambda x: bounds.dac(x, 0.1, 0.2),
}


@pytest.mark.parametrize("name", EVERY)
def test_dtypes_and_masked_numbers(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    anchors = -8 * torch.rand(3, 50, generator=g, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = anchors.to(dtype)
        got, want = EVERY[name](given), EVERY[name](given.double())
        for one, other in zip(got, want, strict=True):
            assert one.dtype == torch.float32 and other.dtype == torch.float64
            assert not one.requires_grad and torch.equal(one, other.float())
    spoilt = anchors.detach().clone()
    spoilt[1, ::2] = torch.nan
    spoilt[2, ::2] = torch.inf
    for one, other in zip(EVERY[name](anchors), EVERY[name](spoilt), strict=True):
        assert other[1, ::2].isnan().all()
        assert torch.equal(one[:, 1::2], other[:, 1::2]) and torch.equal(one[0], other[0])


def test_works_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    logp = torch.tensor([[0.0, -1e-3, -0.5], [-3.0, -30.0, -700.0]])
    works_everywhere(monkeypatch, lambda x: [solve(x) for solve in EVERY.values()], logp)


def test_numbers_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    logp = double(-0.1, -3.0)
    want = torch.stack(bounds.band(logp, 0.25, 8.0))
    for kind in (Fraction, np.float32, np.float64, torch.tensor, lambda x: torch.tensor(x).half()):
        got = bounds.band(logp, kind(0.25), kind(8.0))
        assert torch.equal(torch.stack(got), want)

    def solve(delta: torch.Tensor, cap: torch.Tensor) -> list[Bounds]:
        assert bounds.kl3(0.3)[1] > 0.3
        return [bounds.band(logp.to(cap.device), delta, cap, "chi_squared"), bounds.kl3(delta)]

    works_everywhere(monkeypatch, solve, torch.tensor(0.25), torch.tensor(8))


# BAPO.


def check_bapo(solve: Callable[..., Bounds]) -> None:
    ends = set()
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        x = 0.7 * torch.randn(40, generator=g, dtype=torch.float64)
        advantages = torch.randn(40, generator=g, dtype=torch.float64)
        mask = torch.rand(40, generator=g) < 0.8
        target = random.Random(seed).uniform(0.3, 1.6)
        options = OPTIONS if seed % 2 else OPTIONS | {"low": (0.6, 0.6), "high_step": 0.3}
        want = naive_bapo(x.tolist(), advantages.tolist(), mask.tolist(), target, **options)
        x[~mask], advantages[~mask] = torch.nan, torch.inf
        got = solve(x, advantages, mask, target=target, **options)
        assert [b.exp().item() for b in got] == pytest.approx(want, rel=1e-12), seed
        ends.add((want[0] > options["low"][0], want[1] > 1.2, want[1] < 2.0))
    assert len(ends) >= 4  # left alone, raised, widened, widened to the end


def test_bapo_is_the_search_of_its_authors() -> None:
    check_bapo(bounds.bapo)


def test_bapo_edges() -> None:
    x, one = double(0.0, 3.0, 100.0), torch.ones(())
    # Nothing to weigh against, nothing at all, and nothing to gain.
    assert [b.exp().item() for b in bounds.bapo(x, double(1, 0, 1))] == pytest.approx([0.8, 1.2])
    assert [b.exp().item() for b in bounds.bapo(x, x, x * 0)] == pytest.approx([0.8, 1.2])
    assert [b.exp().item() for b in bounds.bapo(x, -x - 1)] == pytest.approx([0.95, 2.0])
    # Met exactly is met: gains 1.5, losses 0.75.
    given = (double(0.5, 2.0).log(), double(-1, 1))
    ends = {"low": (0.75, 0.75), "high": (1.5, 2.0)}
    assert bounds.bapo(*given, target=2.0, **ends)[1].exp().item() == pytest.approx(1.5)
    assert bounds.bapo(*given, target=2.01, **ends)[1].exp().item() == pytest.approx(1.55)
    got = bounds.bapo(torch.zeros(2, 3), one.expand(2), target=one)
    assert torch.equal(
        torch.stack(got), torch.stack(bounds.bapo(torch.zeros(2, 3), one.expand(2, 1)))
    )


def test_bapo_takes_numbers_of_every_kind() -> None:
    given = (double(0.5, 2.0).log(), double(-1, 1))
    want = bounds.bapo(*given, target=2.5, low=(0.5, 0.75), high=(1.25, 2.0), low_step=0.125)
    for kind in (Fraction, np.float32):
        ends = {"low": (kind(0.5), kind(0.75)), "high": [kind(1.25), 2]}
        got = bounds.bapo(*given, target=kind(2.5), low_step=kind(0.125), **ends)
        assert got == want and all(b.dtype == torch.float64 for b in got)


def test_bapo_works_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    x, advantages = torch.randn(2, 3, 20, generator=g)
    works_everywhere(monkeypatch, bounds.bapo, x, advantages, x > -1, target=torch.tensor(1.3))


def _on_rank(rank: int) -> list[float]:
    x, advantages = _halves()[rank]
    both = torch.distributed.group.WORLD
    return [b.item() for b in bounds.bapo(x, advantages, target=0.75, group=both)]


def _halves() -> list[Any]:
    g = torch.Generator().manual_seed(3)
    x, advantages = torch.randn(2, 2, 30, generator=g, dtype=torch.float64)
    return list(zip(0.5 * x, advantages + double(0.3, -0.5)[:, None], strict=True))


def test_bapo_over_two_processes() -> None:
    got = found_by_ranks(_on_rank, n=2)
    halves = _halves()
    whole = bounds.bapo(*(torch.cat(both) for both in zip(*halves, strict=True)), target=0.75)
    assert got[0] == got[1] == [b.item() for b in whole]
    alone = [[b.item() for b in bounds.bapo(*half, target=0.75)] for half in halves]
    assert alone[0] != alone[1] and got[0] not in alone


# Mistakes that the comparisons above have to find.


def _reverse_kl(logp: torch.Tensor, delta: float) -> Bounds:
    """Roots of KL(q || p), by bisection."""
    p, ends = logp.exp(), []
    for sign in (-1, 1):
        inside = torch.zeros_like(logp)
        outside = torch.full_like(logp, -40.0) if sign < 0 else -logp
        for _ in range(80):
            middle = (inside + outside) / 2
            above = bernoulli("kl", p * middle.exp(), p) > delta
            inside, outside = (
                torch.where(above, inside, middle),
                torch.where(above, middle, outside),
            )
        ends.append(inside)
    return ends[0], ends[1]


def _few_steps(logp: torch.Tensor, delta: float) -> Bounds:
    kept, bounds.NEWTON_STEPS = bounds.NEWTON_STEPS, 2
    try:
        return bounds.kl(logp, delta)
    finally:
        bounds.NEWTON_STEPS = kept


PLANTED: dict[str, dict[str, Callable[..., Any]]] = {
    "KL the other way": {"kl": _reverse_kl},
    "too few steps": {"kl": _few_steps},
    "half the delta": {"kl": lambda x, d: bounds.kl(x, d / 2)},
    "bounds on r": {"kl": lambda x, d: tuple(b.exp() for b in bounds.kl(x, d))},
    "1 - p that cancels": {
        "chi_squared": lambda x, d: tuple(
            torch.log1p(s * (d * (1 - x.exp()) / x.exp()).sqrt()) for s in (-1, 1)
        )
    },
    "TV as twice itself": {"total_variation": lambda x, d: bounds.total_variation(x, 2 * d)},
    "TV at most 1 / p": {
        "total_variation": lambda x, d: bounds.band(x, d, 1e99, "total_variation")
    },
    "TV that overflows": {
        "total_variation": lambda x, d: (
            bounds.total_variation(x, d)[0],
            torch.log1p(d / x.float().exp()).double(),
        )
    },
    "chi-squared without 1 - p": {
        "chi_squared": lambda x, d: bounds.total_variation(x, (d * x.exp()).sqrt().squeeze())
    },
    "the sides exchanged": {"dac": lambda x, a, b: bounds.dac(x, b, a)},
    "dac without its floor": {
        "dac": lambda x, a, b: (
            (0.5 + 0.5 * (1 - 4 * a / x.exp()).sqrt()).log().nan_to_num(-math.inf),
            bounds.dac(x, a, b)[1],
        )
    },
    "k3 of the inverse ratio": {"kl3": lambda d: tuple(-b for b in reversed(bounds.kl3(d)))},
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(name: str) -> None:
    with pytest.raises(AssertionError):
        check_golden(**PLANTED[name])


LOSSES, STEPS = "(ratio.clamp(min=bound) * loss).sum()", "unmet.double().cumprod(0).sum()"
PLANTED_BAPO = {
    "strict": ("gains < scalars", "gains <= scalars"),
    "upper bound first": (
        "steps.clamp(max=len(lows) - 1)",
        "(steps - len(highs) + 1).clamp(min=0)",
    ),
    "masked tokens count": ("active_rows(mask, tokens)", "active_rows(None, tokens)"),
    "not clamped from above": ("ratio.clamp(max=bound) * gain", "ratio * gain"),
    "mean of the losses": (LOSSES, LOSSES.replace("sum", "mean")),
    "one step more": (STEPS, STEPS + " + 1"),
    "a clip at 1, not 20": ("x.clamp(-20, 20)", "x.clamp(-1, 1)"),
}


@pytest.mark.parametrize("name", PLANTED_BAPO)
def test_planted_mistakes_of_bapo_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "bapo", planted(bounds.bapo, *PLANTED_BAPO[name]))
    with pytest.raises(AssertionError):
        check_bapo(bounds.bapo)
        test_bapo_edges()


X = torch.full((2, 3), -1.0)
REFUSED: list[Refusal] = [
    ("anchor_logps", lambda: bounds.kl([-1.0], 0.1), TypeError, "list"),
    ("anchor_logps", lambda: bounds.dac(X.long(), 0.1, 0.1), TypeError, "torch.int64"),
    ("anchor_logps", lambda: bounds.band(X.to_sparse()), TypeError, "sparse"),
    ("delta", lambda: bounds.kl(X, 0.0), ValueError, r"positive finite number, got 0\.0"),
    ("delta", lambda: bounds.kl(X, math.nan), ValueError, "nan"),
    ("delta", lambda: bounds.kl3(-1), ValueError, "-1"),
    ("delta", lambda: bounds.chi_squared(X, "0.1"), TypeError, "str"),
    ("delta", lambda: bounds.chi_squared(X, True), TypeError, "bool"),
    ("delta", lambda: bounds.total_variation(X, torch.ones(2)), ValueError, r"\(2,\)"),
    ("delta", lambda: bounds.total_variation(X, torch.tensor(-1.0)), ValueError, "-1.0"),
    ("delta", lambda: bounds.total_variation(X, torch.tensor(True)), TypeError, "torch.bool"),
    ("cap", lambda: bounds.band(X, cap=1.0), ValueError, "above 1, got 1.0"),
    ("divergence", lambda: bounds.band(X, divergence="tv"), ValueError, "'total_variation'"),
    ("epsilon_low", lambda: bounds.dac(X, 0, 0.2), ValueError, "0"),
    ("epsilon_high", lambda: bounds.dac(X, 0.2, None), TypeError, "NoneType"),
    ("log_ratio", lambda: bounds.bapo(0.1, X), TypeError, "float"),
    ("advantages", lambda: bounds.bapo(X, torch.ones(3)), ValueError, r"\(2,\) or \(2, 1\)"),
    ("mask", lambda: bounds.bapo(X, X, X[0]), ValueError, r"\(3,\)"),
    ("target", lambda: bounds.bapo(X, X, target=-0.1), ValueError, "-0.1"),
    ("low", lambda: bounds.bapo(X, X, low=(0.9, 0.8)), ValueError, r"\(0.9, 0.8\)"),
    ("low", lambda: bounds.bapo(X, X, low=0.8), TypeError, "pair"),
    (
        "high",
        lambda: bounds.bapo(X, X, high=(1.2, torch.ones((), device="meta"))),
        TypeError,
        "a tensor",
    ),
    ("high_step", lambda: bounds.bapo(X, X, high_step=0.0), ValueError, "0.0"),
]


@refused(REFUSED)
def test_refused(case: Refusal) -> None:
    check_refused(case)


def test_examples() -> None:
    run_examples(bounds)
