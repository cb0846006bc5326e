"""The specification in code: plain torch, any device, differentiable by autograd itself.

Every formula of the package stands here once for Python. Computes in float32, or in float64 for
float64 logits. Tests compare the kernels with this module on float64 copies of their inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .objectives import CFPO, Objective


def policy_term(objective: Objective, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """The negated objective of each token, as a function of log r; its gradient is autograd's.

    A == 0 gives exactly 0, also where r overflows.
    """
    inactive = advantages == 0
    # torch.where alone would let an overflowing branch turn the gradient into 0 * inf.
    log_ratio = torch.where(inactive, torch.zeros_like(log_ratio), log_ratio)
    if isinstance(objective, CFPO):
        if objective.log_ratio_clip is not None:
            log_ratio = log_ratio.clamp(-objective.log_ratio_clip, objective.log_ratio_clip)
        excess = torch.expm1(log_ratio)  # r - 1
        penalty = advantages.abs() / (2 * objective.epsilon) * excess
        return -(advantages + excess * (advantages - penalty))

    low, high = objective.epsilon_low, objective.epsilon_high
    excess = torch.expm1(log_ratio.detach())
    clipped_ratio = torch.full_like(log_ratio, torch.nan)  # NaN: not clipped
    if objective.dual_clip is not None:
        dual = (advantages < 0) & (excess + 1 > objective.dual_clip)
        clipped_ratio = torch.where(dual, objective.dual_clip, clipped_ratio)
    clipped_ratio = torch.where((advantages < 0) & (excess < -low), 1 - low, clipped_ratio)
    clipped_ratio = torch.where((advantages > 0) & (excess > high), 1 + high, clipped_ratio)
    clipped = ~clipped_ratio.isnan()
    ratio = 1 + torch.expm1(torch.where(clipped, torch.zeros_like(log_ratio), log_ratio))
    return -torch.where(clipped, clipped_ratio, ratio) * advantages


def kl_term(estimator: str, logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Schulman's estimators of KL(pi || ref) from the sampled token: "k1", "k2" or "k3"."""
    d = ref_logps - logps
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d * d
    return torch.expm1(d) - d


def token_logps(
    logits: Tensor, token_ids: Tensor, active: Tensor, temperature: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """log p of each row's token and the row's entropy; zeros where a row is not active.

    Args:
        logits: (N, V); token_ids: (N,) int64; active: (N,) bool; temperature: (N,) or (1,).

    Returns:
        logps: (N,), in nats; a token outside [0, V) gives NaN. entropy: (N,), or (0,) if not asked
        for.
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
    if not with_entropy:
        return logps, logps.new_empty(0)
    banned = log_p == -torch.inf  # p log p is 0 there
    entropy = -(log_p.exp() * torch.where(banned, zero, log_p)).sum(-1)
    return logps, torch.where(active, entropy, zero)


def policy_loss_rows(
    logits: Tensor,
    token_ids: Tensor,
    weights: Tensor,
    temperature: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None,
    token_weights: Tensor | None,
    ref_logps: Tensor | None,
    objective: Objective,
    kl_estimator: str,
    kl_coef: float,
    entropy_coef: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's weighted loss; rows with weight 0 have loss 0 and gradient 0.

    Args:
        logits: (N, V). All others: (N,), or (1,) for temperature; advantages, old_logps,
            token_weights and ref_logps of a row with weight 0 may be anything.

    Returns:
        loss, logps: (N,); entropy: (N,), or (0,) if neither asked for nor needed.
    """
    with_entropy = with_entropy or entropy_coef != 0
    logps, entropy = token_logps(logits, token_ids, weights != 0, temperature, with_entropy)
    loss = loss_of_logps(
        logps,
        entropy,
        weights,
        advantages,
        old_logps,
        token_weights,
        ref_logps,
        objective,
        kl_estimator,
        kl_coef,
        entropy_coef,
    )
    return loss, logps, entropy


def loss_of_logps(
    logps: Tensor,
    entropy: Tensor | None,
    weights: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None,
    token_weights: Tensor | None,
    ref_logps: Tensor | None,
    objective: Objective,
    kl_estimator: str,
    kl_coef: float,
    entropy_coef: float,
) -> Tensor:
    """Each token's weighted loss (N,), differentiable in logps and entropy.

    Args:
        all tensors: (N,). What a token with weight 0 holds may be anything: it reaches neither the
            loss nor a gradient. entropy is used only where entropy_coef is not 0.
    """
    active = weights != 0

    def of_active(x: Tensor) -> Tensor:
        return torch.where(active, x.to(logps.dtype), torch.zeros_like(logps))

    logps = of_active(logps)
    old = logps.detach() if old_logps is None else of_active(old_logps.detach())
    advantages = of_active(advantages.detach())
    loss = policy_term(objective, logps - old, advantages)
    if token_weights is not None:
        loss = torch.where(advantages == 0, loss, loss * of_active(token_weights.detach()))
    if kl_coef != 0 and ref_logps is not None:
        loss = loss + kl_coef * kl_term(kl_estimator, logps, of_active(ref_logps.detach()))
    if entropy_coef != 0:
        assert entropy is not None  # validation
        loss = loss - entropy_coef * of_active(entropy)
    return torch.where(active, weights * loss, torch.zeros_like(loss))
