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
    """log p of each row's token, the row's entropy and lse; zeros where not active.

    Args:
        logits: (N, V); token_ids: (N,) int64; active: (N,) bool; temperature: (N,) or (1,).
        sharded, softcap: see backends.base.KernelRows.

    Returns:
        logps: (N,), in nats; a token outside [0, V) gives NaN, or -inf where sharded. entropy:
        (N,), or (0,) if not asked for. lse: (N, 2) float64, see lse.py, or (0,) likewise; detached,
        unless sharded: what shards merge to depends on it.
    """
    n_cols = logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=logits.device)
    # Where rows are not active their logits may be anything, and must not reach the gradient.
    x = torch.where(active[:, None], logits.to(dtype), zero)
    y = capped(x, softcap)
    empty = torch.zeros_like(active)
    if sharded:
        empty = (y == -torch.inf).all(-1)
        y = torch.where(empty[:, None], zero, y)
    x = y / torch.where(active, temperature.to(dtype), 1.0)[:, None]
    log_p = torch.log_softmax(x, dim=-1)
    known = (token_ids >= 0) & (token_ids < n_cols)
    picked = torch.where(known, token_ids, 0)
    logps = log_p.gather(-1, picked[:, None]).squeeze(-1)
    absent = -torch.inf if sharded else torch.nan
    logps = torch.where(active, torch.where(known & ~empty, logps, absent), zero)
    entropy = lse = logps.new_empty(0)
    if with_entropy or with_lse:
        top, mass, weighted = _beside_the_likeliest(x)
    if with_entropy:
        # Two positive terms. log p of the likeliest token would be a small difference.
        entropy = torch.where(active & ~empty, mass.log1p() - weighted / (1 + mass), zero)
    if with_lse:
        lse = torch.stack([y.gather(-1, top).squeeze(-1), mass.log1p() * temperature], -1).double()
        nothing = torch.stack([zero, zero - torch.inf]).double()
        lse = torch.where(active[:, None], torch.where(empty[:, None], nothing, lse), 0.0)
        lse = lse if sharded else lse.detach()
    return logps, entropy, lse


def _beside_the_likeliest(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its column (N, 1), and over all others sum w and sum w log w, (N,), with w_v = p_v / max p:
    the relative accuracy of H and lse holds for confident rows.
    """
    at = x.detach().argmax(-1, keepdim=True)
    log_w = x - x.gather(-1, at)
    banned = log_w == -torch.inf  # w log w is 0 there
    log_w = torch.where(banned, 0.0, log_w)
    w = torch.where(banned, 0.0, log_w.exp()).scatter(-1, at, 0.0)
    return at, w.sum(-1), (w * log_w).sum(-1)


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
    log_p = ((x.double() - lse[:, :1] - lse[:, 1:]) / temperature[:, None]).to(dtype)
    p = log_p.exp()
    here = (rows.token_ids >= 0) & (rows.token_ids < n_cols)
    column = torch.where(here, rows.token_ids, 0)[:, None]
    complement = -log_p.gather(1, column).expm1()
    own = torch.where(here[:, None], complement, complement - 1)
    gradient = dlogps[:, None] * (-p).scatter(1, column, own)
    if dentropy is not None:
        assert entropy is not None  # its caller
        of_entropy = torch.where(p == 0, 0.0, p * (log_p + entropy[:, None]))
        gradient = gradient - dentropy[:, None] * of_entropy
    gradient = gradient / temperature[:, None]
    if rows.softcap:
        gradient = gradient * (1 - (x / rows.softcap) ** 2)
    logits.copy_(torch.where(idle[:, None], 0.0, gradient))
