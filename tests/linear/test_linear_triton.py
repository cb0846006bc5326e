"""Losses from hidden states over the Triton kernels, interpreted: `make test-triton` runs these.

The rest of this folder is of schedules and products, which are the same over any kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from heads import HeadCase, check, linear, logps64, make, regularizers, whole
from targets import Target

import cfpo_kernels
from cfpo_kernels import CFPO, PPOClip

pytestmark = [
    pytest.mark.only_on("triton-interpreted", reason="of the Triton kernels"),
    pytest.mark.usefixtures("small_slices", "one_thread", "target"),
]

# How the loss is reached: rows by rows, and over the vocabulary in slices, which are shards.
WAYS: dict[str, dict[str, Any]] = {
    "rows": {"chunk_tokens": 16},
    "slices": {"chunk_tokens": 16, "low_memory": True},
    "none": {"chunk_tokens": 16, "reduction": "none"},
    "sequences": {"chunk_tokens": 16, "ratio_level": "sequence"},
    "long sequences": {"chunk_tokens": 8, "ratio_level": "sequence"},
}


def everything() -> HeadCase:
    g = torch.Generator().manual_seed(3)
    case = make(
        mask_every=6, bias=True, rank=2, temperature=0.7 + 0.6 * torch.rand(37, generator=g)
    )
    case.options |= regularizers(case, g) | {"cu_seqlens": torch.tensor([0, 12, 21, 37])}
    return case


@pytest.mark.parametrize("way", WAYS)
def test_with_everything(way: str) -> None:
    upstream: Any = torch.linspace(-2, 3, 37) if way == "none" else -1.7
    how = WAYS[way] | {"objective": PPOClip(0.1, 0.1), "upstream": upstream}
    check(linear(everything(), stats=True, **how), whole(everything(), **how), 4e-6)


@pytest.mark.parametrize(
    "how", [{"softcap": 3.0}, {"frozen": ("weight",), "low_memory": True}], ids=str
)
def test_heads(how: dict[str, Any]) -> None:
    case = make(mask_every=6)
    check(linear(case, stats=True, chunk_tokens=16, **how), whole(case, **how), 4e-6)


def test_bfloat16_that_was_scored_has_ratios_of_1() -> None:
    case = make(dtype=torch.bfloat16)
    arguments = (case.hidden, case.weight, case.token_ids)
    scored = cfpo_kernels.linear_token_logps(*arguments, chunk_tokens=16)
    assert isinstance(scored, torch.Tensor)
    assert (scored.double() - logps64(case)).abs().max() < 0.1
    again = replace(case, old_logps=scored)
    for low_memory in (False, True):
        stats = linear(
            again, stats=True, objective=CFPO(), chunk_tokens=16, low_memory=low_memory
        ).stats
        assert stats is not None and stats.ratio_max == 1 and torch.equal(stats.logps, scored)


def test_they_are_the_triton_kernels(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the Triton kernels ran")

    monkeypatch.setattr(target.backend, "policy_loss", refuse)
    with pytest.raises(AssertionError, match="the Triton kernels ran"):
        linear(make())
