"""Losses of preference pairs, against values at hand and naive formulas in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from mpmath import mp, mpf  # torch needs it
from plain_torch import Refusal, check_refused, planted, refused, run_examples, works_everywhere
from repository import GOLDEN as TABLES
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import preference
from cfpo_kernels.preference import chi_po_loss, dpo_loss, fpo_loss, ipo_loss

GOLDEN = json.loads((TABLES / "preference.json").read_text())["rows"]


def check_golden(function: Callable[..., Tensor]) -> None:
    for row in GOLDEN:
        z = [
            torch.tensor([row[name]], dtype=torch.float64, requires_grad=True)
            for name in ("z_chosen", "z_rejected")
        ]
        loss = function(*z, beta=row["beta"], r_max=row["r_max"])
        loss.sum().backward()
        got = [loss.item(), *(x.grad.item() for x in z if x.grad is not None)]
        want = [row["loss"], row["dchosen"], row["drejected"]]
        assert got == pytest.approx(want, rel=1e-13, abs=1e-16), row


def test_golden_rows() -> None:
    check_golden(chi_po_loss)
    assert len(GOLDEN) == 5


def pairs(n: int = 200, seed: int = 0) -> list[Tensor]:
    """Log ratios of both responses, then feature distances of both."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, n, generator=g, dtype=torch.float64)
    return [*z.requires_grad_().unbind(), *torch.rand(2, n, generator=g, dtype=torch.float64)]


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def naive_dpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    return -log_sigmoid(beta * (chosen - rejected))


def naive_ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def naive_chi_po(chosen: Tensor, rejected: Tensor, *, beta: float, r_max: float) -> Tensor:
    link = [beta * (torch.exp(z) + z) for z in (chosen, rejected)]
    return -log_sigmoid(torch.clip(link[0] - link[1], -2 * r_max, 2 * r_max))


def naive_fpo(
    chosen: Tensor, rejected: Tensor, mse_chosen: Tensor, mse_rejected: Tensor, *, beta: float,
    alpha: float,
) -> Tensor:  # fmt: skip
    margin = chosen - rejected - alpha * (mse_rejected - mse_chosen.detach())
    return -log_sigmoid(beta * margin)


OPTIONS: dict[str, dict[str, float]] = {
    "dpo_loss": {"beta": 0.7},
    "ipo_loss": {"beta": 0.3},
    "chi_po_loss": {"beta": 0.4, "r_max": 0.5},
    "fpo_loss": {"beta": 1.3, "alpha": 0.8},
}
NAIVE = {
    "dpo_loss": naive_dpo,
    "ipo_loss": naive_ipo,
    "chi_po_loss": naive_chi_po,
    "fpo_loss": naive_fpo,
}


def arguments(name: str, seed: int = 0) -> list[Tensor]:
    given = pairs(seed=seed) if name == "fpo_loss" else pairs(seed=seed)[:2]
    return [x.detach().requires_grad_() for x in given]


def gradients(name: str, function: Callable[..., Tensor]) -> list[Tensor]:
    """The losses and the gradient of each argument; None counts as zero."""
    given = arguments(name)
    losses = function(*given, **OPTIONS[name])
    weights = torch.linspace(-1, 2, losses.numel(), dtype=torch.float64)
    (losses * weights).sum().backward()
    return [losses.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in given)]


def check_against_formula(name: str, function: Callable[..., Tensor]) -> None:
    got, want = gradients(name, function), gradients(name, NAIVE[name])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    if name == "chi_po_loss":
        clipped = (want[1] == 0).double().mean()
        assert 0.2 < clipped < 0.8
    if name == "fpo_loss":
        assert not got[3].any() and got[4].all()


@pytest.mark.parametrize("name", NAIVE)
def test_against_the_formula(name: str) -> None:
    check_against_formula(name, getattr(preference, name))


@pytest.mark.parametrize("name", NAIVE)
def test_twice_differentiable(name: str) -> None:
    given = [x[:6].detach().requires_grad_() for x in arguments(name)]
    if name == "fpo_loss":
        given[2].requires_grad_(False)

    def loss(*x: Tensor) -> Tensor:
        return getattr(preference, name)(*x, **OPTIONS[name])

    assert torch.autograd.gradcheck(loss, given) and torch.autograd.gradgradcheck(loss, given)


@pytest.mark.parametrize("name", NAIVE)
def test_dtypes(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = [x.detach().to(dtype).requires_grad_() for x in arguments(name)]
        wide = [x.detach().double() for x in given]
        got = getattr(preference, name)(*given, **OPTIONS[name])
        want = getattr(preference, name)(*wide, **OPTIONS[name])
        assert got.dtype == torch.float32 and torch.equal(got, want.float())
        got.sum().backward()
        assert given[0].grad is not None and given[0].grad.dtype == dtype


def test_responses_beyond_the_range_of_exp() -> None:
    """e^z of a long response overflows; the pair is then beyond the clip, by its order."""
    z = torch.tensor([5000.0, 800.0, 90.0, 3.0, -5000.0, 5000.0], requires_grad=True)
    other = torch.tensor([4999.0, 900.0, 89.0, -math.inf, -5001.0, 100.0], requires_grad=True)
    loss = chi_po_loss(z, other, beta=0.05, r_max=1.0)
    limit = [math.log1p(math.exp(-2)), math.log1p(math.exp(2))]
    assert loss.tolist() == pytest.approx(
        [limit[0], limit[1], limit[0], limit[0], math.log1p(math.exp(-0.05)), limit[0]]
    )
    loss.sum().backward()
    for x in (z, other):
        assert x.grad is not None
        assert (x.grad == 0).tolist() == [True, True, True, True, False, True]
    equal = chi_po_loss(torch.tensor([1000.0]), torch.tensor([1000.0]), beta=0.05, r_max=1.0)
    assert equal.item() == pytest.approx(math.log(2))
    assert chi_po_loss(torch.tensor([math.nan]), other[:1].detach(), beta=1, r_max=1).isnan().all()
    assert dpo_loss(torch.tensor([-1e4]), torch.zeros(1), beta=1).item() == 1e4


def test_digits_of_either_log_ratio_are_kept() -> None:
    exact = torch.tensor([1000.0 + 1e-6], dtype=torch.float64)
    got = ipo_loss(torch.tensor([1000.0]), exact, beta=1e9)
    assert got.item() == pytest.approx(1e-12, rel=1e-2)


def test_small_losses_keep_their_digits() -> None:
    mp.dps = 40
    got = dpo_loss(torch.tensor([60.0]).double(), torch.zeros(1).double(), beta=1)
    assert got.item() == pytest.approx(float(mp.log1p(mp.exp(-mpf(60)))), rel=1e-14)


def test_numbers_of_every_kind() -> None:
    for name in NAIVE:
        given = [x.detach() for x in arguments(name)]
        want = getattr(preference, name)(*given, **dict.fromkeys(OPTIONS[name], 0.5))
        for kind in (Fraction, np.float32, torch.tensor):
            options = {option: kind(0.5) for option in OPTIONS[name]}
            assert torch.equal(getattr(preference, name)(*given, **options), want)


def test_works_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def every(beta: Tensor, *given: Tensor) -> list[Tensor]:
        return [
            dpo_loss(*given[:2]),
            ipo_loss(*given[:2], beta=beta),
            chi_po_loss(*given[:2], beta=beta, r_max=1),
            fpo_loss(*given, beta=beta, alpha=beta),
        ]

    works_everywhere(monkeypatch, every, torch.tensor(0.5), *(x.detach().float() for x in pairs(8)))


def test_a_step_from_logits() -> None:
    """What a trainer does, in float64 as a whole."""
    g = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 4, 6, 30, generator=g)
    logits.requires_grad_()
    token_ids = torch.randint(0, 30, (4, 6), generator=g)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 5])[:, None]
    ratios = cfpo_kernels.sequences.sequence_logps(logits, token_ids, mask)
    ratios = ratios - cfpo_kernels.sequences.sequence_logps(reference, token_ids, mask)
    dpo_loss(*ratios.chunk(2), beta=0.5).mean().backward()
    leaf = logits.detach().double().requires_grad_()
    logps = [torch.log_softmax(x, -1) for x in (leaf, reference.double())]
    both = [(x.gather(-1, token_ids[..., None])[..., 0] * mask).sum(1) for x in logps]
    naive_dpo(*(both[0] - both[1]).chunk(2), beta=0.5).mean().backward()
    assert logits.grad is not None and leaf.grad is not None
    torch.testing.assert_close(logits.grad, leaf.grad.float(), rtol=1e-5, atol=1e-8)


BETA = 'scalars.on_device(scalars.positive("beta", beta), chosen.device) * '
CHI = "scale * (powers + chosen - rejected)"
CLIP = "margin.clamp(-largest, largest)"
DRIFT = "features[1] - features[0].detach()"
PLANTED = {
    "beta dropped": ("dpo_loss", BETA, ""),
    "the pair exchanged": ("dpo_loss", "(chosen - rejected)", "(rejected - chosen)"),
    "IPO with 1 / beta": ("ipo_loss", "0.5 / scalars", "1.0 / scalars"),
    "IPO from below": ("ipo_loss", "** 2", ".clamp(max=0) ** 2"),
    "a link without z": ("chi_po_loss", CHI, "scale * powers"),
    "a link without e^z": ("chi_po_loss", CHI, "scale * (chosen - rejected)"),
    "clip at r_max": ("chi_po_loss", "largest = 2 * ", "largest = "),
    "clip on one side": ("chi_po_loss", CLIP, "margin.clamp(max=largest)"),
    "a clip that keeps its gradient": (
        "chi_po_loss",
        CLIP,
        f"margin + ({CLIP} - margin).detach()",
    ),
    "alpha dropped": ("fpo_loss", "scalars.on_device(weight, chosen.device) * drift", "drift"),
    "features exchanged": ("fpo_loss", DRIFT, f"-({DRIFT})"),
    "a gradient of the chosen features": ("fpo_loss", "features[0].detach()", "features[0]"),
    "no gradient of the rejected": ("fpo_loss", "features[1] - ", "features[1].detach() - "),
    "alpha outside beta": ("fpo_loss", "scale * margin", "margin"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(name: str) -> None:
    function, *replaced = PLANTED[name]
    wrong = planted(getattr(preference, function), *replaced)
    with pytest.raises(AssertionError):
        check_against_formula(function, wrong)


def test_a_planted_mistake_in_the_golden_rows_is_found() -> None:
    with pytest.raises(AssertionError):
        check_golden(planted(chi_po_loss, "largest = 2 * ", "largest = "))


def test_ipo_says_what_it_is_not() -> None:
    assert "prime-rl" in (ipo_loss.__doc__ or "")


Z = torch.zeros(3)
REFUSED: list[Refusal] = [
    ("chosen_log_ratios", lambda: dpo_loss(0.1, Z), TypeError, "float"),
    ("rejected_log_ratios", lambda: dpo_loss(Z, Z[:2]), ValueError, r"\(3,\), got \(2,\)"),
    ("rejected_log_ratios", lambda: ipo_loss(Z, Z.long()), TypeError, "torch.int64"),
    ("rejected_log_ratios", lambda: ipo_loss(Z, Z.to("meta")), ValueError, "cpu, got meta"),
    ("beta", lambda: dpo_loss(Z, Z, beta=0.0), ValueError, "positive finite number, got 0.0"),
    ("beta", lambda: ipo_loss(Z, Z, beta=math.inf), ValueError, "inf"),
    ("beta", lambda: chi_po_loss(Z, Z, beta=Z, r_max=1.0), ValueError, r"\(3,\)"),
    ("beta", lambda: chi_po_loss(Z, Z, r_max=1.0), TypeError, "beta"),
    ("r_max", lambda: chi_po_loss(Z, Z, beta=1.0, r_max=-1.0), ValueError, "-1.0"),
    ("r_max", lambda: chi_po_loss(Z, Z, beta=1.0, r_max="1"), TypeError, "str"),
    ("chosen_feature_distances", lambda: fpo_loss(Z, Z, 0.0, Z), TypeError, "float"),
    ("rejected_feature_distances", lambda: fpo_loss(Z, Z, Z, Z[:1]), ValueError, r"\(1,\)"),
    ("alpha", lambda: fpo_loss(Z, Z, Z, Z, alpha=math.nan), ValueError, "nan"),
]


@refused(REFUSED)
def test_refused(case: Refusal) -> None:
    check_refused(case)


def test_examples() -> None:
    run_examples(preference)
