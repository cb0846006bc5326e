"""The public functions: check, weigh, run, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import backends, validation
from .formula import loss_of_logps
from .inputs import LogRatioBounds
from .objectives import CFPO
from .runners import Runner, may_overwrite, runner
from .stats import CFPOStats, collect_stats
from .validation import AnyObjective
from .weights import REDUCTIONS

BACKENDS = ("auto", *backends.NAMES)


def _runner(name: object, logits: object, inplace: bool) -> Runner:
    chosen = validation.check_choice("backend", name, BACKENDS)
    if not isinstance(logits, Tensor):
        return runner(chosen)  # validation says what is wrong with them
    n_cols = logits.shape[-1] if logits.dim() else 0
    resolved = backends.resolve(chosen, logits.device, logits.dtype, n_cols, inplace=inplace)
    found = runner(resolved)
    if not found.differentiates_twice and _has_tangent(logits):
        raise RuntimeError(
            "cfpo_kernels: forward-mode AD is not supported by the fused kernels; "
            "backend='reference' supports it"
        )
    if inplace and not may_overwrite(chosen):
        raise ValueError(
            f"inplace=True needs a backend with kernels, not backend={chosen!r}: it keeps "
            "autograd's own buffers; backend='auto' takes it as a permission"
        )
    return found


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
    objective: AnyObjective,
    mask: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    log_ratio_bounds: LogRatioBounds | None = None,
    ratio_level: str = "token",
    sequence_group: Any = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_ratio_weighted: bool = False,
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
    grad_scale: float | Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CFPOStats]:
    """:func:`cfpo_loss` with any objective.

    Args:
        objective: a named one, such as ``CFPO(epsilon=0.2)`` or ``PPOClip(0.2, 0.28)``; or a
            callable that takes :class:`TokenTerms` and returns a loss a token (...), in torch. The
            latter costs a second read of the logits; token_weights, the KL term, the entropy bonus
            and the reduction are applied to what it returns.
        others: see :func:`cfpo_loss`.

    Returns, raises, memory: see :func:`cfpo_loss`.
    """
    chosen = validation.check_objective(objective)
    validation.check_flag("return_stats", return_stats)
    chosen_runner = _runner(backend, logits, inplace)
    validation.check_formula(chosen, chosen_runner.runs_triton and ratio_level == "token")
    rows = validation.check_rows(
        logits,
        token_ids,
        mask=mask,
        temperature=temperature,
        inplace=inplace,
        takes_float64=chosen_runner.takes_float64,
    )
    with torch.no_grad():
        terms = validation.check_loss_terms(
            rows,
            chosen,
            advantages=advantages,
            old_logps=old_logps,
            reduction=reduction,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            ref_logps=ref_logps,
            log_ratio_bounds=log_ratio_bounds,
            ratio_level=ratio_level,
            sequence_group=sequence_group,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_ratio_weighted=kl_ratio_weighted,
            entropy_coef=entropy_coef,
            grad_scale=grad_scale,
        )
    if terms.beyond:
        wanted = return_stats or terms.settings.needs_entropy or terms.beyond.needs_entropy
        logps, entropy, _ = chosen_runner.score(rows, inplace, wanted)
        loss = loss_of_logps(
            logps, entropy, terms.weights, terms.inputs, terms.settings, terms.beyond
        )
    else:
        loss, logps, entropy = chosen_runner.loss(rows, terms, inplace, return_stats)
    loss = loss.reshape(rows.shape) if reduction == "none" else loss.sum()
    if not return_stats:
        return loss
    with torch.no_grad():
        stats = collect_stats(
            logps,
            entropy,
            rows.active,
            terms.inputs,
            terms.settings,
            terms.region,
            rows.shape,
            terms.beyond,
        )
    return loss, stats


def cfpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    log_ratio_bounds: LogRatioBounds | None = None,
    ratio_level: str = "token",
    sequence_group: Any = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_ratio_weighted: bool = False,
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
            dimension always means one a sequence, also when B == T; (B,) with cu_seqlens.
        old_logps: (...) float, log p of the tokens when they were sampled, in nats, at the same
            temperature. None: on-policy, r = 1 and the gradient is that of -A log p.
        mask: (...) bool or number; where it is 0 the token is not part of the loss, and neither
            its logits nor its other numbers are looked at. Not a weight: all else counts as 1.
        epsilon: the distance of r from 1 at which a token's gradient vanishes.
        epsilon_high: that distance for tokens with A > 0; None: epsilon.
        reduction: "token-mean" divides by the number of unmasked tokens; "seq-mean-token-mean" is
            the mean over sequences of their token means; "seq-mean-token-sum" that of their sums;
            "sum"; "none" returns a loss a token. A sequence without unmasked tokens is not counted.
        normalizer: number or 0-d tensor that replaces the denominator: of tokens, of sequences for
            the seq-* reductions, 1 otherwise. For global token counts or a constant B * L_max.
        cu_seqlens: (B + 1,) int, bounds of the sequences in packed (N, V) logits, for seq-*.
        token_weights: (...) float, detached factors of the policy term (rollout correction).
        ref_logps: (...) float, log p under the reference model, in nats.
        log_ratio_bounds: a pair (low, high) of bounds on log r, each a number, a 0-d tensor or
            (...) float, in place of the objective's own. CFPO's gradient vanishes on them.
        ratio_level: "sequence": a token's log r is the mean of its sequence's (GSPO, arXiv
            2507.18071), and bounds are on that. With advantages one a sequence the derivative is
            that of the mean; with advantages by token that of GSPO-token, where a token's loss
            moves its own log p only. Two reads of the logits.
        sequence_group: a process group over which each sequence is split (context parallel), all
            ranks with as many sequences: their sums and lengths are added up.
        kl_coef: factor of the KL estimate against ref_logps.
        kl_estimator: with d = ref_logp - logp, "k1": -d, "k2": d^2 / 2, "k3": e^d - d - 1; "k1+",
            "k3+": their value with the gradient of k2.
        kl_ratio_weighted: the KL estimate is multiplied by r, which is differentiated too. With
            ratio_level="sequence" by the sequence's, differentiated by the token's own log p.
        entropy_coef: factor of the entropy bonus.
        temperature: number, 0-d tensor, or (...) float for one a row; from 1e-6 to 1e30. Rows with
            |logit| / temperature above 1.4e9 are NaN.
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
        objective=CFPO(epsilon, epsilon_high=epsilon_high),
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        token_weights=token_weights,
        ref_logps=ref_logps,
        log_ratio_bounds=log_ratio_bounds,
        ratio_level=ratio_level,
        sequence_group=sequence_group,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_ratio_weighted=kl_ratio_weighted,
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
    return_lse: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """log p of the tokens, differentiable, without a log-softmax in memory.

    ``logp = log softmax(logits / temperature)[token]``, bitwise what :func:`cfpo_loss` computes
    from the same logits.

    Args:
        logits, token_ids, mask, temperature, backend: see :func:`cfpo_loss`.
        return_entropy: also return the rows' entropies, differentiable too.
        return_lse: also return ``logsumexp(logits / temperature)``, not differentiable.
        inplace: backward overwrites the logits with their gradient.

    Returns:
        logps: (...) float32, in nats, 0 where masked; a tuple (logps, entropy, lse) of what is
        asked for otherwise.

    Raises: see :func:`cfpo_loss`.

    Memory: O(N) in forward; in backward one gradient of the logits, none with inplace=True.
    """
    validation.check_flag("return_entropy", return_entropy)
    validation.check_flag("return_lse", return_lse)
    chosen_runner = _runner(backend, logits, inplace)
    rows = validation.check_rows(
        logits,
        token_ids,
        mask=mask,
        temperature=temperature,
        inplace=inplace,
        takes_float64=chosen_runner.takes_float64,
    )
    logps, entropy, lse = chosen_runner.score(rows, inplace, return_entropy, return_lse)
    found = [logps.reshape(rows.shape)]
    if return_entropy:
        found.append(entropy.reshape(rows.shape))
    if return_lse:
        # A masked row's temperature may be anything.
        scaled = torch.where(rows.active, lse / rows.temperature, 0.0)
        found.append(scaled.to(rows.dtype).reshape(rows.shape))
    return found[0] if len(found) == 1 else tuple(found)


class CFPOLoss(nn.Module):
    """:func:`cfpo_loss` as a module: settings at construction, tensors at the call.

    Args:
        epsilon: see :func:`cfpo_loss`.
        **settings: any keyword argument of :func:`cfpo_loss`; a call may override them.
    """

    def __init__(self, epsilon: float = 0.2, **settings: Any) -> None:
        super().__init__()
        # Refused now rather than at the first step.
        CFPO(epsilon, epsilon_high=settings.get("epsilon_high"))
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
    "ratio_level": validation.RATIO_LEVELS,
    "backend": BACKENDS,
}
_CFPO_KEYWORDS = frozenset(cfpo_loss.__kwdefaults__ or ())
