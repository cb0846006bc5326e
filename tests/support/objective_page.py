"""docs/add-an-objective.md: its snippets, a batch for them, and the comparison with float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive_objectives import Given
from oracle import logps64
from repository import ROOT
from torch import Tensor

PAGE = ROOT / "docs" / "add-an-objective.md"
B, T, V = 6, 24, 40
MASK = torch.arange(T) < torch.tensor([24, 17, 1, 20, 24, 9])[:, None]


def snippets() -> dict[str, str]:
    """By what their first line says."""
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    named = {re.split(r"[ ,\n]", text)[1]: text for text in found if text.startswith("# ")}
    assert len(named) == len(found) == PAGE.read_text().count("\n```") / 2
    return named


def tokens(gain: float = 1.0) -> dict[str, Any]:
    """`gain` scales the positive advantages. Masked tokens hold what nobody may look at."""
    g = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(B, T, V, generator=g)
    token_ids = torch.randint(0, V, (B, T), generator=g)
    log_ratio = 0.7 * torch.randn(B, T, generator=g)
    log_ratio[:, 0] = 1.5  # beyond the dual clip
    advantages = torch.randn(B, T, generator=g)
    hidden = torch.randn(B, T, 8, generator=g) * (1 + 2 * torch.rand(B, T, 1, generator=g))
    # Some tokens are likely: of all odds, so that bounds differ.
    likely = torch.nn.functional.one_hot(token_ids[:, 1::3], V)
    logits[:, 1::3] += 10 * torch.rand(B, T // 3, 1, generator=g) * likely
    old_logps = (logps64(logits, token_ids) - log_ratio).clamp(max=-1e-3).float()
    given = {
        "logits": logits,
        "token_ids": token_ids,
        "advantages": torch.where(advantages > 0, gain * advantages, advantages),
        "old_logps": old_logps,
        "hidden": hidden,
    }
    for name in ("logits", "old_logps", "hidden"):
        given[name][~MASK] = torch.nan
    given["advantages"][~MASK] = torch.inf
    return given | {"mask": MASK.clone()}


def run(name: str, text: str, given: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Loss, gradient and names of a snippet, run after those above it on the page."""
    leaf = given["logits"].clone().requires_grad_()
    names: dict[str, Any] = {**given, "logits": leaf}
    for above, source in snippets().items():
        if above == name:
            break
        exec(compile(source, str(PAGE), "exec"), names)
    exec(compile(text, str(PAGE), "exec"), names)
    names["loss"].backward()
    assert leaf.grad is not None
    return names["loss"].detach(), leaf.grad, names


def naive(
    formula: Callable[[Given], Tensor], given: dict[str, Any], kept: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean over the tokens kept, in float64."""
    clean = {
        name: torch.where(MASK, given[name].double(), 0.0) for name in ("advantages", "old_logps")
    }
    leaf = torch.where(MASK[..., None], given["logits"].double(), 0.0).requires_grad_()
    logps = logps64(leaf, given["token_ids"])
    losses = formula(Given(logps, logps - clean["old_logps"], clean["advantages"], None, None))
    loss = torch.where(kept, losses, 0.0).sum() / kept.sum()
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def assert_same(
    got: tuple[Tensor, Tensor, Any],
    want: tuple[Tensor, Tensor],
    given: dict[str, Any],
    kept: Tensor,
) -> None:
    """The same tokens have no gradient, some of each sign of A, and so have others one."""
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-5)
    norm = want[1].norm(dim=-1)
    assert ((got[1].double() - want[1]).norm(dim=-1) <= 2e-5 * norm).all()
    for side in (given["advantages"] > 0, given["advantages"] < 0):
        assert (norm[kept & side] > 0).any() and (norm[kept & side] == 0).any()
