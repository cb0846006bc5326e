"""The public functions: check, weigh, run, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import backends, ops, reference, validation
from .autograd import CFPOFunction, TokenLogpsFunction
from .objectives import CFPO, Objective
from .stats import CFPOStats, collect_stats
from .validation import LossTerms, Rows
from .weights import REDUCTIONS

BACKENDS = ("auto", *backends.NAMES)


def _resolve_backend(name: object, logits: object, inplace: bool) -> str:
    chosen = validation.check_choice("backend", name, BACKENDS)
    if not isinstance(logits, Tensor):
        return chosen  # validation says what is wrong with it
    n_cols = logits.shape[-1] if logits.dim() else 0
    resolved = backends.resolve(chosen, logits.device, logits.dtype, n_cols, inplace=inplace)
    if resolved != "reference" and _has_tangent(logits):
        raise RuntimeError(
            "cfpo_kernels: forward-mode AD is not supported by the fused kernels; "
            "backend='reference' supports it"
        )
    if inplace and chosen == "reference":
        raise ValueError(
            "inplace=True needs a backend with kernels, not backend='reference': it keeps "
            "autograd's own buffers; backend='auto' takes it as a permission"
        )
    return resolved


def _has_tangent(logits: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return forward_ad.unpack_dual(logits).tangent is not None


def policy_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    *,
    objective: Objective,
    mask: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
    grad_scale: float | Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CFPOStats]:
    """:func:`cfpo_loss` with any objective.

    Args:
        objective: ``CFPO(epsilon=0.2, log_ratio_clip=None)`` or
            ``PPOClip(epsilon_low=0.2, epsilon_high=0.2, dual_clip=None)``.
        others: see :func:`cfpo_loss`.

    Returns, raises, memory: see :func:`cfpo_loss`.
    """
    chosen = validation.check_objective(objective)
    validation.check_flag("return_stats", return_stats)
    resolved = _resolve_backend(backend, logits, inplace)
    rows = validation.check_rows(
        logits, token_ids, mask=mask, temperature=temperature, inplace=inplace, backend=resolved
    )
    with torch.no_grad():
        terms = validation.check_loss_terms(
            rows,
            advantages,
            old_logps,
            reduction=reduction,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            ref_logps=ref_logps,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            entropy_coef=entropy_coef,
            grad_scale=grad_scale,
        )
    coefficients = (kl_estimator, float(kl_coef), float(entropy_coef))
    if resolved == "reference":
        loss, logps, entropy = _reference_rows(rows, terms, chosen, *coefficients, return_stats)
    else:
        loss, logps, entropy = _kernel_rows(
            rows, terms, chosen, *coefficients, resolved, inplace, return_stats
        )
    loss = loss.reshape(rows.shape) if reduction == "none" else loss.sum()
    if not return_stats:
        return loss
    with torch.no_grad():
        stats = collect_stats(
            logps,
            entropy,
            rows.active,
            terms.old_logps,
            terms.ref_logps,
            chosen,
            kl_estimator,
            rows.shape,
        )
    return loss, stats


def _reference_rows(
    rows: Rows,
    terms: LossTerms,
    objective: Objective,
    kl_estimator: str,
    kl_coef: float,
    entropy_coef: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.policy_loss_rows(
        rows.logits.reshape(-1, rows.logits.shape[-1]),
        rows.token_ids,
        terms.weights,
        rows.temperature,
        terms.advantages,
        terms.old_logps,
        terms.token_weights,
        terms.ref_logps,
        objective,
        kl_estimator,
        kl_coef,
        entropy_coef,
        with_entropy,
    )


def _kernel_rows(
    rows: Rows,
    terms: LossTerms,
    objective: Objective,
    kl_estimator: str,
    kl_coef: float,
    entropy_coef: float,
    backend: str,
    inplace: bool,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel_terms = (
        terms.advantages,
        terms.old_logps,
        terms.token_weights,
        terms.ref_logps,
        terms.grad_scale,
        objective.name,
        objective.parameters(),
        kl_estimator,
        kl_coef,
        entropy_coef,
    )
    inputs = (rows.token_ids, terms.weights, rows.temperature)
    if rows.logits.requires_grad and torch.is_grad_enabled():
        return CFPOFunction.apply(
            rows.logits, inplace, *inputs, with_entropy, backend, *kernel_terms
        )
    loss, logps, entropy, _ = ops.policy_loss(
        rows.logits, *inputs, with_entropy, False, backend, *kernel_terms
    )
    return loss, logps, entropy


def cfpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    epsilon: float = 0.2,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
    grad_scale: float | Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CFPOStats]:
    """The CFPO loss of a batch of tokens, with its gradient computed in the same pass.

    With p = softmax(logits / temperature), y the token and r = p_y / exp(old_logp)::

        loss = sum_i w_i (token_weight_i policy_i + kl_coef KL_i - entropy_coef H_i)
        policy = -(r A - |A| / (2 epsilon) (r - 1)^2)

    Args:
        logits: (..., V) float32, bfloat16 or float16, before the temperature. The last dimension
            has stride 1, leading ones any stride. The only differentiable argument.
        token_ids: (...) int64 or int32, the sampled tokens.
        advantages: (...) float, or one a sequence: (B,) or (B, 1) for (B, T, V) logits, where one
            dimension always means one a sequence, also when B == T.
        old_logps: (...) float, log p of the tokens when they were sampled, in nats, at the same
            temperature. None: on-policy, r = 1 and the gradient is that of -A log p.
        mask: (...) bool or number; where it is 0 the token is not part of the loss, and neither
            its logits nor its other numbers are looked at. Not a weight: all else counts as 1.
        epsilon: the distance of r from 1 at which a token's gradient vanishes.
        reduction: "token-mean" divides by the number of unmasked tokens; "seq-mean-token-mean" is
            the mean over sequences of their token means; "seq-mean-token-sum" that of their sums;
            "sum"; "none" returns a loss a token. A sequence without unmasked tokens is not counted.
        normalizer: number or 0-d tensor that replaces the denominator: of tokens, of sequences for
            the seq-* reductions, 1 otherwise. For global token counts or a constant B * L_max.
        cu_seqlens: (B + 1,) int, bounds of the sequences in packed (N, V) logits, for seq-*.
        token_weights: (...) float, detached factors of the policy term (rollout correction).
        ref_logps: (...) float, log p under the reference model, in nats.
        kl_coef: factor of the KL estimate against ref_logps.
        kl_estimator: with d = ref_logp - logp, "k1": -d, "k2": d^2 / 2, "k3": e^d - d - 1.
        entropy_coef: factor of the entropy bonus.
        temperature: number, 0-d tensor, or (...) float for one a row.
        inplace: the gradient overwrites the logits, so that no V-sized memory is allocated; their
            old values are gone when this returns, and autograd refuses to use them. The gradient of
            a leaf is then the leaf's own memory. With backend="auto" it is a permission: where only
            plain torch can run, it is not used, and one warning says so.
        grad_scale: number or 0-d tensor; the loss scale of AMP, where it is known: multiplied into
            the gradient before it is rounded, and divided out of the incoming gradient, so that
            float16 gradients do not underflow. Does not change the result otherwise.
        backend: "auto", "cpu", "reference", "triton" or "cuda"; see :func:`available_backends`.
        return_stats: also return :class:`CFPOStats`.

    Returns:
        A 0-d float32 loss, or (...) for reduction="none" (float64 for float64 logits on the
        reference backend); with return_stats, a pair with the statistics.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value.
        IndexError: a token of an unmasked row is not in [0, V), on a CPU. On a GPU that row's loss
            is NaN, or this raises with CFPO_KERNELS_DEBUG=1.
        BackendUnavailableError: the backend asked for cannot run here; nothing else is tried.

    Memory: one gradient of the logits' shape and dtype, none with inplace=True; O(N) otherwise.
    Without a gradient (no_grad, or logits that need none): O(N). Backward hands over the gradient,
    and so can run once; a second call raises, except in code that torch.compile made.

    Source: CFPO, arXiv 2601.22801; docs/design.md derives the gradient.
    """
    return policy_loss(
        logits,
        token_ids,
        advantages,
        old_logps,
        objective=CFPO(epsilon),
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        token_weights=token_weights,
        ref_logps=ref_logps,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        temperature=temperature,
        inplace=inplace,
        grad_scale=grad_scale,
        backend=backend,
        return_stats=return_stats,
    )


def token_logps(
    logits: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log p of the tokens, differentiable, without a log-softmax in memory.

    ``logp = log softmax(logits / temperature)[token]``, bitwise what :func:`cfpo_loss` computes
    from the same logits.

    Args:
        logits, token_ids, mask, temperature, backend: see :func:`cfpo_loss`.
        return_entropy: also return the rows' entropies, differentiable too.
        inplace: backward overwrites the logits with their gradient.

    Returns:
        logps: (...) float32, in nats, 0 where masked; with return_entropy a pair (logps, entropy).

    Raises: see :func:`cfpo_loss`.

    Memory: O(N) in forward; in backward one gradient of the logits, none with inplace=True.
    """
    validation.check_flag("return_entropy", return_entropy)
    resolved = _resolve_backend(backend, logits, inplace)
    rows = validation.check_rows(
        logits, token_ids, mask=mask, temperature=temperature, inplace=inplace, backend=resolved
    )
    if resolved == "reference":
        flat = rows.logits.reshape(-1, rows.logits.shape[-1])
        logps, entropy = reference.token_logps(
            flat, rows.token_ids, rows.active, rows.temperature, return_entropy
        )
    else:
        inputs = (rows.token_ids, rows.active.to(rows.dtype), rows.temperature)
        if rows.logits.requires_grad and torch.is_grad_enabled():
            logps, entropy = TokenLogpsFunction.apply(
                rows.logits, inplace, *inputs, return_entropy, resolved
            )
        else:
            logps, _, entropy = ops.token_logps(rows.logits, *inputs, return_entropy, resolved)
    logps = logps.reshape(rows.shape)
    return (logps, entropy.reshape(rows.shape)) if return_entropy else logps


class CFPOLoss(nn.Module):
    """:func:`cfpo_loss` as a module: settings at construction, tensors at the call.

    Args:
        epsilon: see :func:`cfpo_loss`.
        **settings: any keyword argument of :func:`cfpo_loss`; a call may override them.
    """

    def __init__(self, epsilon: float = 0.2, **settings: Any) -> None:
        super().__init__()
        # Refused now rather than at the first step.
        CFPO(epsilon)
        unknown = settings.keys() - _CFPO_KEYWORDS
        if unknown:
            raise TypeError(f"CFPOLoss got unknown arguments: {', '.join(sorted(unknown))}")
        for name, choices in _CHOICES.items():
            if name in settings:
                validation.check_choice(name, settings[name], choices)
        self.settings = {"epsilon": epsilon, **settings}

    def forward(
        self,
        logits: Tensor,
        token_ids: Tensor,
        advantages: Tensor,
        old_logps: Tensor | None = None,
        **overrides: Any,
    ) -> Tensor | tuple[Tensor, CFPOStats]:
        return cfpo_loss(logits, token_ids, advantages, old_logps, **(self.settings | overrides))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


_CHOICES = {
    "reduction": REDUCTIONS,
    "kl_estimator": validation.KL_ESTIMATORS,
    "backend": BACKENDS,
}
_CFPO_KEYWORDS = frozenset(cfpo_loss.__kwdefaults__ or ())
