"""Stage 1 in plain torch: any device, any float, differentiable by autograd itself.

Computes in float32, or in float64 for float64 logits. Tests compare the kernels with this module on
float64 copies of their inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logps(
    logits: Tensor,
    token_ids: Tensor,
    active: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each row's token, the row's entropy and T * logsumexp; zeros where not active.

    Args:
        logits: (N, V); token_ids: (N,) int64; active: (N,) bool; temperature: (N,) or (1,).

    Returns:
        logps: (N,), in nats; a token outside [0, V) gives NaN. entropy: (N,), or (0,) if not asked
        for. lse: (N,), or (0,) likewise; detached.
    """
    n_cols = logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=logits.device)
    # Where rows are not active their logits may be anything, and must not reach the gradient.
    x = torch.where(active[:, None], logits.to(dtype), zero)
    x = x / torch.where(active, temperature.to(dtype), 1.0)[:, None]
    log_p = torch.log_softmax(x, dim=-1)
    known = (token_ids >= 0) & (token_ids < n_cols)
    picked = torch.where(known, token_ids, 0)
    logps = log_p.gather(-1, picked[:, None]).squeeze(-1)
    logps = torch.where(active, torch.where(known, logps, torch.nan), zero)
    lse = logps.new_empty(0)
    if with_lse:
        lse = torch.where(active, x.detach().logsumexp(-1) * temperature, zero)
    if not with_entropy:
        return logps, logps.new_empty(0), lse
    return logps, torch.where(active, _entropy(x), zero), lse


def _entropy(x: Tensor) -> Tensor:
    """H of softmax(x), (N,). Its relative accuracy holds for confident rows.

    With w_v = p_v / max p of all but the likeliest: H = log(1 + sum w) - sum w log w / (1 + sum w),
    where both terms are positive. log p of the likeliest token would be a small difference.
    """
    at = x.detach().argmax(-1, keepdim=True)
    log_w = x - x.gather(-1, at)
    banned = log_w == -torch.inf  # w log w is 0 there
    log_w = torch.where(banned, 0.0, log_w)
    w = torch.where(banned, 0.0, log_w.exp()).scatter(-1, at, 0.0)
    mass = w.sum(-1)
    return mass.log1p() - (w * log_w).sum(-1) / (1 + mass)
