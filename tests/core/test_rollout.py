"""Rollout weights, against loops and against what verl and TRL compute."""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plain_torch import check_refused, planted, refused, run_examples, works_everywhere
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import rollout_weights

MODULE = sys.modules[rollout_weights.__module__]
MODES = [
    f"{level}_{action}"
    for level in ("token", "sequence", "geometric")
    for action in ("truncate", "mask")
]
LENGTHS = (6, 1, 9, 4, 0)


def batch(seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """(old_logps, rollout_logps, mask) of five sequences, (5, 9), float64; garbage where masked."""
    g = torch.Generator().manual_seed(seed)
    rollout = -3 * torch.rand(5, 9, generator=g, dtype=torch.float64)
    old = rollout + spread * torch.randn(5, 9, generator=g, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    mask[2, 3] = False
    old[~mask], rollout[~mask] = torch.nan, -1e10
    return old, rollout, mask


def naive(
    old: list[float], rollout: list[float], mask: list[bool], mode: str, low: Any, high: Any
) -> tuple[list[float], list[bool]]:
    """One sequence."""
    level, action = mode.split("_")
    differences = [
        0.0 if math.isnan(mu) else lp - mu
        for lp, mu, m in zip(old, rollout, mask, strict=True)
        if m
    ]
    every = iter(differences)
    weights, kept = [], []
    for active in mask:
        if not active:
            weights.append(0.0)
            kept.append(False)
            continue
        x = next(every)
        if level != "token":
            x = math.fsum(differences) / (len(differences) if level == "geometric" else 1)
        ratio = math.exp(min(max(x, -20.0), 20.0))
        inside = (low is None or ratio >= low) and (high is None or ratio <= high)
        if action == "truncate":
            ratio = max(ratio, low or 0.0)
            ratio = min(ratio, math.inf if high is None else high)
            inside = True
        weights.append(ratio if inside else 0.0)
        kept.append(inside)
    return weights, kept


def check_against_loops(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    for seed in range(4):
        old, rollout, mask = batch(seed)
        rollout[0, 1] = torch.nan
        old[2, 0] = rollout[2, 0] + (30, -30, -math.inf, 0)[seed]
        # Exactly on a bound. Binary fractions, so that no difference is rounded.
        rollout[3, :4] = torch.tensor([-1.0, -1.0, -2.0, -1.0])
        old[3, :4] = rollout[3, :4] + torch.tensor([0.5, -0.25, 0.25, 0.0])
        edge = math.exp(0.5)
        for mode in MODES:
            for low, high in ((0.5, 2.0), (None, edge), (math.exp(-0.25), None), (None, None)):
                rows = zip(old.tolist(), rollout.tolist(), mask.tolist(), strict=True)
                want = [naive(*row, mode, low, high) for row in rows]
                for packed in (False, True):
                    options: dict[str, Any] = {"mode": mode, "low": low, "high": high}
                    given = [old, rollout, mask]
                    if packed:
                        keep = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
                        given = [x[keep] for x in given]
                        options["cu_seqlens"] = torch.tensor([0, 6, 7, 16, 20, 20])
                    weights, kept = function(*given, **options)
                    wanted = torch.tensor([w for w, _ in want], dtype=torch.float64)
                    wanted_mask = torch.tensor([m for _, m in want])
                    if packed:
                        wanted, wanted_mask = wanted[keep], wanted_mask[keep]
                    assert kept.dtype == torch.bool and torch.equal(kept, wanted_mask), options
                    assert weights.flatten().tolist() == pytest.approx(
                        wanted.flatten().tolist(), rel=1e-13
                    ), options


def test_against_loops() -> None:
    check_against_loops(rollout_weights)


# Both trainers in float64, so that no ratio lies between their rounding and ours.


@pytest.mark.parametrize("of", ["token", "sequence"])
def test_weights_of_verl(of: str) -> None:
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    found = set()
    for spread, threshold, action, low, high, seed in (
        (0.6, 2.0, "truncate", None, 2.0, 0),
        (15.0, 1e6, "truncate", None, 1e6, 0),
        (15.0, 1e6, "truncate", None, 1e6, 1),
        (0.1, "0.5_3.0", "mask", 0.5, 3.0, 0),
        (0.6, "0.5_3.0", "mask", 0.5, 3.0, 0),
    ):
        old, rollout, mask = batch(seed, spread)
        want, _ = helper.compute_rollout_correction_weights(
            torch.where(mask, old - rollout, 0.0),
            mask.double(),
            rollout_is=of,
            rollout_is_threshold=threshold,
        )
        got, _ = rollout_weights(old, rollout, mask, mode=f"{of}_{action}", low=low, high=high)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        found |= set(got[mask].tolist())
    # Truncated above, clamped at e^-20, dropped, and others.
    assert {1e6, 0.0} <= found and min(found - {0.0}) < 1e-8 and len(found) > 10


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        ("token_mask", "token_k1"),
        ("sequence_mask", "seq_sum_k1"),
        ("geometric_mask", "seq_mean_k1"),
    ],
)
def test_masks_of_verl(mode: str, option: str) -> None:
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    found = []
    for seed in range(8):
        old, rollout, mask = batch(seed, spread=0.8)
        # verl bounds the inverse ratio, which is the same where the bounds are inverse to each
        # other, and wants a token in each sequence to take means over.
        want, _ = helper.compute_rollout_rejection_mask(
            torch.where(mask, old - rollout, 0.0)[:4], mask[:4].double(), option, "0.6666666_1.5"
        )
        _, got = rollout_weights(old, rollout, mask, mode=mode, low=1 / 1.5, high=1.5)
        assert torch.equal(got[:4], want.bool() & mask[:4])
        found += got[mask].tolist()
    assert 0.1 < sum(found) / len(found) < 0.9


def trl_correction() -> Callable[..., Tensor]:
    """The branch of GRPOTrainer that computes the ratios, cut out of its source."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    method = trainer._generate_and_score_completions
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    (branch,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and "vllm_importance_sampling_correction" in ast.unparse(node.test)
        and ast.unparse(node.body[0]).startswith("mask = ")
    ]
    code = compile(ast.unparse(ast.Module(branch.body, [])), "trl", "exec")

    def run(old: Tensor, sampling: Tensor, mask: Tensor, mode: str, low: Any, high: Any) -> Tensor:
        own = SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
        )
        names = {"self": own, "torch": torch, "math": math, "tool_mask": None}
        names |= {"old_per_token_logps": old, "sampling_per_token_logps": sampling}
        names["completion_mask"] = mask
        exec(code, names)
        return names["vllm_importance_sampling_ratio"]

    return run


@pytest.mark.parametrize("mode", MODES[:4])
def test_weights_of_trl(mode: str) -> None:
    trl = trl_correction()
    kinds = set()
    for seed in range(6):
        old, rollout, mask = batch(seed)
        rollout[0, 2] = torch.nan  # a token that vLLM did not score
        want = trl(torch.where(mask, old, 0.0), torch.where(mask, rollout, 0.0), mask, mode, 0.6, 2)
        got, kept = rollout_weights(old, rollout, mask, mode=mode, low=0.6, high=2)
        torch.testing.assert_close(got, want * mask, rtol=1e-12, atol=0)
        assert mode.endswith("truncate") or torch.equal(kept, (want != 0) & mask)
        kinds |= {got[mask].min().item() < 0.6, got[mask].max().item() == 2}
    assert True in kinds


def test_nan_and_infinities() -> None:
    old = torch.tensor([[-1.0, torch.nan, -1.0, -torch.inf], [-1.0, -1.0, -1.0, -1.0]])
    rollout = torch.tensor([[torch.nan, -1.0, -torch.inf, -1.0], [-1.0, -1.5, -1.0, -1.0]])
    for mode in MODES[:2]:
        weights, kept = rollout_weights(old, rollout, mode=mode, low=0.5, high=2.0)
        assert weights[0, 0] == 1 and weights[0, 1].isnan() and kept[0, :2].all()
        assert weights[0, 2:].tolist() == ([2, 0.5] if mode == "token_truncate" else [0, 0])
    for mode in MODES[2:]:
        weights, _ = rollout_weights(old, rollout, mode=mode, low=0.5, high=2.0)
        assert weights[0].isnan().all() and not weights[1].isnan().any()
    weights, _ = rollout_weights(old, rollout, mode="token_truncate", low=None, high=None)
    assert weights[0, 2:].tolist() == pytest.approx([math.exp(20), math.exp(-20)])


def test_dtypes_shapes_and_numbers() -> None:
    old, rollout, mask = batch()
    old.requires_grad_()
    want = rollout_weights(old, rollout, mask, mode="token_mask", low=0.5, high=2.0)
    assert not want[0].requires_grad and want[0].dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = [torch.where(mask, x, 0.0).to(dtype) for x in (old, rollout)]
        got = rollout_weights(*given, mask, mode="sequence_truncate", low=0.5, high=2.0)
        wide = [x.double() for x in given]
        exact = rollout_weights(*wide, mask, mode="sequence_truncate", low=0.5, high=2.0)
        assert got[0].dtype == torch.float32 and torch.equal(got[0], exact[0].float())
    kinds = (Fraction, np.float32, torch.tensor, lambda x: torch.tensor(x, dtype=torch.float16))
    for kind in kinds:
        got = rollout_weights(old, rollout, mask, mode="token_mask", low=kind(0.5), high=kind(2.0))
        assert torch.equal(got[0], want[0])
    for shape in ((), (3,), (0,), (2, 0), (2, 3, 4)):
        x = torch.zeros(shape)
        got = rollout_weights(x, x, mode="token_mask", low=1.0, high=1.0)
        assert torch.equal(got[0], torch.ones(shape)) and got[1].all() and got[1].shape == shape
    x = torch.zeros(2, 3, 4)
    assert torch.equal(rollout_weights(x, x, mode="geometric_mask", low=1, high=1)[0], x + 1)


def test_works_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def every(old: Tensor, rollout: Tensor, mask: Tensor, cu: Tensor, low: Tensor) -> list[Any]:
        found: list[Any] = []
        for mode in MODES:
            found += rollout_weights(old, rollout, mask, mode=mode, low=low, high=2.0)
        flat = (x.flatten() for x in (old, rollout, mask))
        return found + list(
            rollout_weights(*flat, mode="geometric_mask", low=None, high=1.5, cu_seqlens=cu)
        )

    old, rollout, mask = batch()
    cu_seqlens = torch.tensor([0, 9, 20, 45])
    works_everywhere(
        monkeypatch, every, old.float(), rollout.float(), mask, cu_seqlens, torch.tensor(0.5)
    )


TRUNCATED = "ratio.clamp(least, most)"
SCORED = "active & ~engine.isnan(), log_ratio"
CLAMPED = "log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)"
PLANTED = {
    "strict above": ("log_ratio > most", "log_ratio >= most"),
    "strict below": ("log_ratio < least", "log_ratio <= least"),
    "the inverse ratio": ("log_ratio.exp()", "(-log_ratio).exp()"),
    "the log ratio truncated": (TRUNCATED, "log_ratio.clamp(least, most).exp()"),
    "a mask by the log ratio": ("most.log()", "most"),
    "no lower bound": (TRUNCATED, "ratio.clamp(max=most)"),
    "a mean over padding": ("counts.clamp(min=1)", "source.shape[-1]"),
    "the mean is a sum": ('if level == "geometric":', "if False:"),
    "a NaN of the engine": (SCORED, "active, log_ratio"),
    "masked tokens": (f"torch.where({SCORED}, 0.0)", "log_ratio"),
    "no clamp at 20": (CLAMPED, "log_ratio * 1"),
    "dropped tokens keep a weight": ("torch.where(active, ratio, 0.0)", "ratio"),
    "the mask as it was": ("active = active & ~(", "dropped = active & ~("),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(name: str) -> None:
    wrong = planted(rollout_weights, *PLANTED[name])
    with pytest.raises(AssertionError):
        check_against_loops(wrong)


X = torch.zeros(2, 3)
GIVEN: dict[str, Any] = {
    "old_logps": X, "rollout_logps": X, "mode": "token_mask", "low": 0.5, "high": 2.0,
}  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("old_logps", {"old_logps": 0.1}, TypeError, "float"),
    ("old_logps", {"old_logps": X.int()}, TypeError, "torch.int32"),
    ("old_logps", {"old_logps": X[0], "rollout_logps": X[0], "mode": "geometric_mask"},
     ValueError, r"with cu_seqlens, got shape \(3,\)"),
    ("rollout_logps", {"rollout_logps": X[0]}, ValueError, r"shape of old_logps, \(2, 3\)"),
    ("rollout_logps", {"rollout_logps": None}, TypeError, "NoneType"),
    ("mask", {"mask": X[0]}, ValueError, r"\(3,\)"),
    ("mode", {"mode": "icepop"}, ValueError, "'token_mask'.*got 'icepop'"),
    ("low", {"low": -0.1}, ValueError, "0 or more, or None, got -0.1"),
    ("low", {"low": math.nan}, ValueError, "nan"),
    ("low", {"low": 3.0}, ValueError, "low=3.0, high=2.0"),
    ("high", {"high": "2"}, TypeError, "str"),
    ("high", {"high": torch.ones(2)}, ValueError, r"\(2,\)"),
    ("high", {"high": torch.tensor(-1.0)}, ValueError, "-1.0"),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"packed old_logps \(N,\)"),
]  # fmt: skip


@refused(REFUSED)
def test_refused(case: tuple[str, dict[str, Any], type[Exception], str]) -> None:
    name, changes, *said = case
    check_refused((name, lambda: rollout_weights(**(GIVEN | changes)), *said))


def test_examples() -> None:
    run_examples(MODULE)
    assert cfpo_kernels.rollout_weights is rollout_weights
