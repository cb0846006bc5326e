"""The snippets of docs/add-an-objective.md run as they stand there, and are what they say.

Each is held to its formula in float64, written with loops or plain ratios and apart from the page.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_bapo import OPTIONS, naive_bapo
from naive_objectives import Given
from objective_page import MASK, B, T, assert_same, naive, run, snippets, tokens
from oracle import logps64
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import objectives

Formula = Callable[[Given], Tensor]


def ppo(t: Given, low: Any, high: Any) -> Tensor:
    clipped = torch.where(t.r < low, low, torch.where(t.r > high, high, t.r))
    return -torch.minimum(t.r * t.advantages, clipped * t.advantages)


def gmpo(t: Given) -> Tensor:
    losses = torch.zeros_like(t.logps)
    for i in range(B):
        up = t.advantages[i] > 0
        x = torch.where(up, t.log_ratio[i].clamp(max=0.4), t.log_ratio[i].clamp(min=-0.4))
        losses[i] = -x[MASK[i]].mean().exp() * t.advantages[i]
    return losses


def band_po(t: Given) -> Tensor:
    """The roots of the KL divergence by bisection."""

    def root(p: float, q: float) -> float:
        """The last ratio on the way from p to q whose divergence is at most 0.05."""
        near, far = p, q
        for _ in range(100):
            half = (near + far) / 2
            kl = p * math.log(p / half) + (1 - p) * math.log((1 - p) / (1 - half))
            near, far = (half, far) if kl < 0.05 else (near, half)
        return near / p

    p = torch.where(MASK, (t.logps - t.log_ratio).exp(), 0.5)
    low = torch.tensor([[root(x, 1e-300) for x in row] for row in p.tolist()]).double()
    high = torch.tensor([[min(root(x, 1 - 1e-12), 10) for x in row] for row in p.tolist()]).double()
    return ppo(t, low, high)


def dppo(t: Given) -> Tensor:
    moved = (t.logps.exp() - (t.logps - t.log_ratio).exp()).detach()
    dropped = torch.where(t.advantages > 0, moved > 0.1, moved < -0.1)
    return -torch.where(dropped, 0.0, t.r.clamp(max=20).detach()) * t.advantages * t.logps


def bapo(t: Given) -> Tensor:
    rows = (x[MASK].tolist() for x in (t.log_ratio, t.advantages, MASK))
    low, high = naive_bapo(*rows, target=0.5, **OPTIONS)
    loss = ppo(t, low, high)
    return torch.where(t.advantages < 0, torch.minimum(loss, -3 * t.advantages), loss)


def acpo(t: Given) -> Tensor:
    return ppo(t, 0.8, 1.2 + 0.2 / (1 + (-t.advantages).exp()))


def grpo(t: Given) -> Tensor:
    return ppo(t, 0.8, 1.2)


FORMULAS: dict[str, Formula] = {
    "GMPO": gmpo, "BandPO": band_po, "DPPO": dppo, "BAPO": bapo, "ACPO": acpo,
}  # fmt: skip


def check(name: str, text: str, **options: float) -> None:
    given = tokens(**options)
    want = naive(FORMULAS[name], given, MASK)
    assert_same(run(name, text, given), want, given, MASK)


@pytest.mark.parametrize("name", FORMULAS)
def test_snippets(name: str) -> None:
    check(name, snippets()[name])


GAINS = {1.0: (0.8, 1.2), 0.72: (0.95, 1.55), 0.1: (0.95, 2.0)}


@pytest.mark.parametrize("gain", GAINS)
def test_bapo_left_alone_and_raised(gain: float) -> None:
    check("BAPO", snippets()["BAPO"], gain=gain)
    given = tokens(gain)
    log_ratio = logps64(given["logits"], given["token_ids"]) - given["old_logps"]
    rows = (x[MASK].tolist() for x in (log_ratio, given["advantages"], MASK))
    assert naive_bapo(*rows, target=0.5, **OPTIONS) == pytest.approx(GAINS[gain])


# CAPO's mask, from what it stands for.


def derivatives(row: Tensor, token: int, h: Tensor, a: float) -> tuple[float, float, float]:
    """Of r A along the gradient of A log p by a head's weight, twice, and of log p; by autograd.

    Any head that makes these logits of h has the same.
    """
    weight = torch.outer(row, h / h.square().sum())

    def logp(w: Tensor) -> Tensor:
        return torch.log_softmax(w @ h, -1)[token]

    direction = torch.func.grad(lambda w: a * logp(w))(weight)

    def along(t: Tensor) -> Tensor:
        return logp(weight + t * direction)

    def objective(t: Tensor) -> Tensor:
        return a * (along(t) - logp(weight)).exp()

    zero = torch.zeros((), dtype=torch.float64)
    slope, score = torch.func.grad(objective)(zero), torch.func.grad(along)(zero)
    return float(slope), float(torch.func.grad(torch.func.grad(objective))(zero)), float(score)


@functools.cache
def all_derivatives() -> dict[tuple[int, int], tuple[float, float, float]]:
    given = tokens()
    return {
        (i, t): derivatives(
            given["logits"][i, t].double(),
            int(given["token_ids"][i, t]),
            given["hidden"][i, t].double(),
            float(given["advantages"][i, t]),
        )
        for i, t in MASK.nonzero().tolist()
    }


def naive_capo(lr: float, most: float, divergence: float) -> tuple[Tensor, set[str]]:
    """The tokens kept, and what each of the others fails by itself."""
    kept, failed = torch.zeros(B, T, dtype=torch.bool), set()
    for at, (slope, curvature, score) in all_derivatives().items():
        gain, kl = lr * slope + lr**2 / 2 * curvature, (lr * score) ** 2 / 2
        # None is so near a limit that float32 may decide otherwise.
        assert abs(gain / most - 1) > 1e-4 and abs(kl / divergence - 1) > 1e-4
        assert abs(gain) > 1e-4 * lr * slope
        fails = {"lowers": gain < 0, "raises": gain >= most, "moves": kl >= divergence}
        kept[at] = not any(fails.values())
        if sum(fails.values()) == 1:
            failed |= {name for name, yes in fails.items() if yes}
    return kept, failed


def check_capo(text: str) -> None:
    given = tokens()
    kept, failed = naive_capo(1e-3, 1e-2, 1e-4)  # as on the page
    assert failed == {"raises", "moves"}
    *got, names = run("CAPO", text, given)
    assert_same((*got, names), naive(grpo, given, kept), given, kept)
    # Steps so large that curvature counts.
    arguments = [given[name] for name in ("logits", "token_ids", "hidden", "advantages")]
    seen = set()
    for lr in (0.1, 0.3, 1.0, 3.0, 10.0):
        for most, divergence in ((1e9, 1e9), (10 * lr, 1e9), (1e9, 0.5)):
            kept, failed = naive_capo(lr, most, divergence)
            seen |= failed
            assert torch.equal(names["capo"](*arguments, lr, most, divergence) & MASK, kept)
    assert seen == {"lowers", "raises", "moves"}


def test_capo() -> None:
    check_capo(snippets()["CAPO"])


# The class of section 2, as the module that it would be.


def check_tis(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, path = "cfpo_kernels.objectives.tis", folder / "tis.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    given = tokens()
    for high in (2.0, 1.1):
        leaf = given["logits"].clone().requires_grad_()
        loss = cfpo_kernels.policy_loss(
            leaf,
            *(given[x] for x in ("token_ids", "advantages", "old_logps")),
            objective=module.TIS(high=high),
            mask=MASK,
        )
        loss.backward()

        def formula(t: Given, high: float = high) -> Tensor:
            return -t.r.clamp(max=high).detach() * t.advantages * t.logps

        want = naive(formula, given, MASK)
        assert loss.item() == pytest.approx(want[0].item(), rel=1e-5)
        norm = want[1].norm(dim=-1)
        assert ((leaf.grad.double() - want[1]).norm(dim=-1) <= 2e-5 * norm).all()
    with pytest.raises(ValueError, match="high must be a positive"):
        module.TIS(high=-1.0)


def test_tis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tis(snippets()["TIS"], tmp_path, monkeypatch)
    assert "tis" not in objectives.OBJECTIVES


def test_every_snippet_is_run() -> None:
    assert set(snippets()) == {*FORMULAS, "CAPO", "TIS"}


PLANTED = {
    "GMPO": [
        ("clamp(-0.4, 0.4)", "clamp(-0.4, 0.3)"),
        ("x = terms.advantages.sign() * torch.minimum", "x = torch.minimum"),
        ("return -", "return "),
    ],
    "BandPO": [
        ("bounds.band(old_logps)", "bounds.band(old_logps)[::-1]"),
        ("bounds.band(old_logps)", "bounds.band(old_logps, 0.06)"),
        ("bounds.band(old_logps)", 'bounds.band(old_logps, divergence="chi_squared")'),
    ],
    "DPPO": [
        ("0.1)", "0.1)[::-1]"),
        ("0.1)", "0.15)"),
        ("total_variation", "kl"),
        ("DPPO()", "PPOClip()"),
    ],
    "BAPO": [
        ("raised, mask", "raised[::-1], mask"),
        ("advantages, mask)\n", "-advantages, mask)\n"),
        ("- old_logps\n", "+ old_logps\n"),
        ("dual_clip=3.0", ""),
    ],
    "ACPO": [
        ("(low, high)", "(high, low)"),
        ("1.2 + 0.2", "1.2 - 0.2"),
        ("sigmoid(advantages)", "sigmoid(-advantages)"),
        ("0.8", "0.7"),
    ],
    "CAPO": [
        ("mask & capo", "mask & ~capo"),
        ("mask=keep", "mask=keep, normalizer=mask.sum()"),
        ("lr * advantages *", "-lr * advantages *"),
        ("gain >= 0", "gain == gain"),
        ("gain < most", "gain == gain"),
        ("kl < divergence", "kl == kl"),
        ("norm.square() - variance", "norm.square() + variance"),
        ("+ cubes", "- cubes"),
        ("step.square() / 2", "step.square()"),
        ("(step * norm).square() / 2", "(step * norm).square()"),
    ],
    "TIS": [
        ("high_negative=high", "high_negative=math.inf"),
        ("above_positive=1.0", "above_positive=0.0"),
        ("value=SCORE", "value=1.0"),
    ],
}


@pytest.mark.parametrize(
    ("name", "right", "wrong"), [(n, *pair) for n, pairs in PLANTED.items() for pair in pairs]
)
def test_planted_mistakes_are_found(
    name: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = snippets()[name]
    assert text.count(right) == 1
    text = text.replace(right, wrong)
    with pytest.raises(AssertionError):
        if name == "CAPO":
            check_capo(text)
        elif name == "TIS":
            check_tis(text, tmp_path, monkeypatch)
        elif name == "BAPO":
            for gain in GAINS:
                check(name, text, gain=gain)
        else:
            check(name, text)
