"""Stage 1 in plain torch: any device, any float, differentiable by autograd itself.

Computes in float32, or in float64 for float64 logits. Tests compare the kernels with this module on
float64 copies of their inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.base import KernelRows


def token_logps(
    logits: Tensor,
    token_ids: Tensor,
    active: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    with_lse: bool,
    *,
    sharded: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each row's token, the row's entropy and T * logsumexp; zeros where not active.

    Args:
        logits: (N, V); token_ids: (N,) int64; active: (N,) bool; temperature: (N,) or (1,).
        sharded, softcap: see backends.base.KernelRows.

    Returns:
        logps: (N,), in nats; a token outside [0, V) gives NaN, or -inf where sharded. entropy:
        (N,), or (0,) if not asked for. lse: (N,), or (0,) likewise; detached, unless sharded: what
        shards merge to depends on it.
    """
    n_cols = logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=logits.device)
    # Where rows are not active their logits may be anything, and must not reach the gradient.
    x = torch.where(active[:, None], logits.to(dtype), zero)
    x = capped(x, softcap)
    empty = torch.zeros_like(active)
    if sharded:
        empty = (x == -torch.inf).all(-1)
        x = torch.where(empty[:, None], zero, x)
    x = x / torch.where(active, temperature.to(dtype), 1.0)[:, None]
    log_p = torch.log_softmax(x, dim=-1)
    known = (token_ids >= 0) & (token_ids < n_cols)
    picked = torch.where(known, token_ids, 0)
    logps = log_p.gather(-1, picked[:, None]).squeeze(-1)
    absent = -torch.inf if sharded else torch.nan
    logps = torch.where(active, torch.where(known & ~empty, logps, absent), zero)
    lse = logps.new_empty(0)
    if with_lse:
        lse = (x if sharded else x.detach()).logsumexp(-1) * temperature
        lse = torch.where(active, torch.where(empty, -torch.inf, lse), zero)
    if not with_entropy:
        return logps, logps.new_empty(0), lse
    return logps, torch.where(active & ~empty, _entropy(x), zero), lse


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


def capped(z: Tensor, softcap: float) -> Tensor:
    """Logits as ``KernelRows.softcap`` says, in the dtype of z."""
    return softcap * torch.tanh(z / softcap) if softcap else z


def token_logps_backward_(
    rows: KernelRows,
    lse: Tensor,
    entropy: Tensor | None,
    dlogps: Tensor,
    dentropy: Tensor | None,
) -> None:
    """Overwrites the logits (N, V) with the gradient of sum(dlogps * logps + dentropy * entropy).

    Args:
        rows: with ``sharded`` some columns of rows that the other arguments, all (N,), are of.
    """
    logits, n_cols = rows.logits, rows.logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    idle = (rows.weights == 0) | ((dlogps == 0) & (True if dentropy is None else dentropy == 0))
    x = capped(torch.where(idle[:, None], 0.0, logits.to(dtype)), rows.softcap)
    temperature = torch.where(idle, 1.0, rows.temperature)
    log_p = ((x.double() - lse[:, None]) / temperature[:, None]).to(dtype)
    p = log_p.exp()
    gradient = -dlogps[:, None] * p
    if dentropy is not None:
        assert entropy is not None  # its caller
        of_entropy = torch.where(p == 0, 0.0, p * (log_p + entropy[:, None]))
        gradient = gradient - dentropy[:, None] * of_entropy
    here = (rows.token_ids >= 0) & (rows.token_ids < n_cols)
    column = torch.where(here, rows.token_ids, 0)[:, None]
    at_token = gradient.gather(1, column) + torch.where(here, dlogps, 0.0)[:, None]
    gradient = gradient.scatter(1, column, at_token) / temperature[:, None]
    if rows.softcap:
        gradient = gradient * (1 - (x / rows.softcap) ** 2)
    logits.copy_(torch.where(idle[:, None], 0.0, gradient))
