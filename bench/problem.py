"""The inputs of one case: logits with realistic targets, ratios on both sides of the bound."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case

# Rows converted to float64 at once: bounds the memory of the exact computations.
ROWS_PER_CHUNK = 16


@dataclass
class Problem:
    """Inputs of every implementation. `logits` is the master copy, which nothing may write to."""

    case: Case
    logits: Tensor  # (N, V)
    token_ids: Tensor  # (N,) int64
    advantages: Tensor  # (N,) float32
    old_logps: Tensor  # (N,) float32
    logps: Tensor | None  # (N,) float64, exact; None where only the shapes matter


def make_problem(case: Case, *, exact: bool = True, seed: int = 0) -> Problem:
    """Random inputs for `case`; `exact=False` skips the float64 log-probs (memory needs none)."""
    device = torch.device(case.device)
    generator = torch.Generator(device).manual_seed(seed)
    n, v = case.rows, case.vocabulary

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, device=device).uniform_(low, high, generator=generator)

    logits = torch.empty(n, v, dtype=case.dtype, device=device)
    logits.normal_(generator=generator)
    token_ids = torch.randint(v, (n, 1), device=device, generator=generator)
    # Lifts the sampled token by 0 to log V + 4, so that its probability runs from 1/V to about 0.98
    # as it does in training. With plain noise every target would be improbable.
    logits.scatter_add_(1, token_ids, uniform(0, math.log(v) + 4).to(case.dtype)[:, None])
    token_ids = token_ids.squeeze(1)

    logps = target_logps(logits, token_ids) if exact else None
    # Ratios between 0.6 and 1.65: below, inside and above 1 +- epsilon. An independent draw of
    # old_logps would give ratios near 0 and exercise nothing.
    base = torch.full((n,), -math.log(v), device=device) if logps is None else logps
    old_logps = (base + uniform(-0.5, 0.5)).float()
    advantages = torch.randn(n, device=device, generator=generator)
    return Problem(case, logits, token_ids, advantages, old_logps, logps)


def target_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    """float64 log-probs (N,) of the targets, a few rows at a time."""
    chunks = zip(logits.split(ROWS_PER_CHUNK), token_ids.split(ROWS_PER_CHUNK), strict=True)
    return torch.cat([selected_logps(rows.double(), ids) for rows, ids in chunks])


def selected_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log p of the targets by log_softmax and gather, in the dtype of the logits."""
    return torch.log_softmax(logits, dim=-1).gather(-1, token_ids[:, None]).squeeze(-1)
