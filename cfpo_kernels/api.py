"""The public functions: check, weigh, run, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import backends, validation
from .inputs import LogRatioBounds
from .lse import scaled
from .objectives import CFPO
from .runners import Runner, ShardedRunner, may_overwrite, runner
from .stats import CFPOStats, collect_stats
from .tiles import tiles
from .transforms import refuse_transforms
from .validation import AnyObjective
from .vocab_parallel import Shards, VocabParallel
from .weights import REDUCTIONS

BACKENDS = ("auto", *backends.NAMES)


def _runner(
    name: object, logits: object, inplace: bool, vocab_parallel: object | None = None
) -> Runner:
    chosen = validation.check_choice("backend", name, BACKENDS)
    if not isinstance(logits, Tensor):
        return runner(chosen)  # validation says what is wrong with them
    n_cols = logits.shape[-1] if logits.dim() else 0
    resolved = backends.resolve(chosen, logits.device, logits.dtype, n_cols, inplace=inplace)
    found = runner(resolved)
    if vocab_parallel is not None:
        refuse_transforms(logits, "without vocab_parallel, backend='reference' supports it")
    elif not found.differentiates_twice:
        refuse_transforms(logits, "backend='reference' supports it")
    if inplace and not may_overwrite(chosen):
        raise ValueError(
            f"inplace=True needs a backend with kernels, not backend={chosen!r}: it keeps "
            "autograd's own buffers; backend='auto' takes it as a permission"
        )
    if vocab_parallel is not None:
        shards = Shards.of(vocab_parallel, n_cols, logits.device)
        agreed = shards.agree(chosen, resolved, logits.device, logits.dtype)
        return ShardedRunner(tiles(agreed, logits), shards)
    return found


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
    vocab_parallel: VocabParallel | None = None,
    inplace: bool = False,
    grad_scale: float | Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CFPOStats]:
    """A policy loss of a batch of tokens, with its gradient computed in the same pass.

    With p = softmax(logits / temperature), y the token, r = p_y / exp(old_logp) and H the entropy
    of p::

        loss = sum_i w_i (token_weight_i policy_i + kl_coef KL_i - entropy_coef H_i)

    where ``policy`` is the objective's loss of a token, and the w_i are made of mask, reduction and
    normalizer.

    Args:
        logits: (..., V) float32, bfloat16 or float16, before the temperature; float64 with
            backend="reference". The last dimension has stride 1, leading ones any stride. The only
            differentiable argument.
        token_ids: (...) int64 or int32, the sampled tokens.
        advantages: (...) float; or one a sequence: (B,) or (B, 1) for (B, T, V) logits, (B,) with
            cu_seqlens.
        old_logps: (...) float, log p of the tokens when they were sampled, in nats, at the same
            temperature. None: on-policy, r = 1.
        objective: a named one, such as ``CFPO(epsilon=0.2)`` or ``PPOClip(0.2, 0.28)``; or a
            callable that takes :class:`TokenTerms` and returns a loss a token (...), in torch. A
            callable costs a second read of the logits; token_weights, the KL term, the entropy
            bonus and the reduction are applied to what it returns.
        mask: (...) bool or number; where it is 0 the token is not part of the loss, and none of its
            numbers is looked at. Not a weight: any number but 0 counts as 1. None: all tokens.
        reduction: "token-mean" divides by the number of unmasked tokens; "seq-mean-token-mean" is
            the mean over sequences of their token means, "seq-mean-token-sum" that of their sums;
            "sum"; "none" returns a loss a token. Sequences without unmasked tokens do not count.
        normalizer: positive number or 0-d tensor in place of the denominator: of the number of
            tokens, of sequences for the seq-* reductions, of 1 otherwise.
        cu_seqlens: (B + 1,) int64 or int32, bounds of the sequences of packed (N, V) logits.
        token_weights: (...) float, factors of the policy term, detached.
        ref_logps: (...) float, log p under the reference model, in nats; needed for a KL term.
        log_ratio_bounds: a pair (low, high) of bounds on log r, in nats, each a number, a 0-d
            tensor or (...) float, in place of the objective's own; what that means is said there.
        ratio_level: "token", or "sequence": a token's log r is the mean of its sequence's (GSPO,
            arXiv 2507.18071), and bounds are on that; a second read of the logits. With advantages
            by token, a token's loss moves its own log p only (GSPO-token).
        sequence_group: a process group over which each sequence is split, for "sequence".
        kl_coef: factor of the KL estimate against ref_logps.
        kl_estimator: with d = ref_logp - logp, "k1": -d, "k2": d^2 / 2, "k3": e^d - d - 1; "k1+",
            "k3+": their value with the gradient of k2.
        kl_ratio_weighted: multiply the KL estimate by r, which is differentiated too; by the
            sequence's with ratio_level="sequence", differentiated by the token's own log p.
        entropy_coef: factor of the entropy bonus, in nats.
        temperature: number, 0-d tensor, or (...) float for one a row.
        vocab_parallel: the logits are one process's columns of the vocabulary, and token ids those
            of the whole; see :class:`VocabParallel`. Two reads of the logits.
        inplace: the gradient overwrites the logits, so that no V-sized memory is allocated; see
            :func:`cfpo_loss`.
        grad_scale: number or 0-d tensor, AMP's loss scale: in the gradient before it is rounded to
            16 bits, and divided out of the incoming gradient.
        backend: "auto", "cpu", "reference", "triton" or "cuda"; see :func:`available_backends`.
        return_stats: also return :class:`CFPOStats`.

    Returns:
        A 0-d float32 loss, or (...) for reduction="none" (float64 for float64 logits); with
        return_stats, a pair with the statistics.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value; or the
            objective has no formula for this backend.
        IndexError: a token of an unmasked row is not in [0, V), on a CPU. On a GPU that row's loss
            is NaN, or this raises with CFPO_KERNELS_DEBUG=1.
        BackendUnavailableError: the backend asked for cannot run here; nothing else is tried.

    Memory: one gradient of the logits' shape and dtype, none with inplace=True; O(N) otherwise, and
    where no gradient is wanted. Backward hands over the gradient, and so can run once, but for
    callables and ratio_level="sequence" without inplace.

    Source: the objective's; docs/maths.md derives the gradient through the softmax.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> batch = (torch.tensor([0, 1]), torch.tensor([1.0, -1.0]), torch.tensor([-0.5, -0.5]))
        >>> loss = policy_loss(logits, *batch, objective=PPOClip(0.2, 0.28, dual_clip=3.0))
        >>> loss.backward()
        >>> logits.grad  # the first token's ratio, 1.3, is clipped
        tensor([[ 0.0000,  0.0000,  0.0000],
                [-0.1007,  0.2013, -0.1007]])
    """
    chosen = validation.check_objective(objective)
    validation.check_flag("return_stats", return_stats)
    chosen_runner = _runner(backend, logits, inplace, vocab_parallel)
    validation.check_formula(chosen, chosen_runner.runs_triton and ratio_level == "token")
    rows = validation.check_rows(
        logits,
        token_ids,
        mask=mask,
        temperature=temperature,
        inplace=inplace,
        takes_float64=chosen_runner.takes_float64,
    )
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
    if isinstance(chosen_runner, ShardedRunner):
        chosen_runner.shards.refuse_differences(rows, terms)
    summed = reduction != "none"
    logps: Tensor | None
    entropy: Tensor | None
    if terms.beyond or not chosen_runner.one_pass:
        wanted = return_stats or terms.settings.needs_entropy or terms.beyond.needs_entropy
        logps, entropy, _ = chosen_runner.score(rows, inplace, wanted, rounded=False)
        loss = chosen_runner.token_losses(
            logps, entropy, terms.weights, terms.inputs, terms.settings, terms.beyond
        )
        loss = loss.sum() if summed else loss
    else:
        loss, logps, entropy = chosen_runner.loss(rows, terms, inplace, return_stats, summed)
    loss = loss if summed else loss.reshape(rows.shape)
    if not return_stats:
        return loss
    assert logps is not None and entropy is not None  # they were asked for
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
    vocab_parallel: VocabParallel | None = None,
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
        vocab_parallel: the logits are one process's columns of the vocabulary, and token ids those
            of the whole; see :class:`VocabParallel`. Two reads of the logits.
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

    Source: CFPO, arXiv 2601.22801; docs/maths.md derives the gradient.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> loss = cfpo_loss(logits, torch.tensor([0, 2]), torch.tensor([1.0, -1.0]))
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.3333,  0.1667,  0.1667],
                [-0.1667, -0.1667,  0.3333]])
    """
    return policy_loss(
        logits,
        token_ids,
        advantages,
        old_logps,
        objective=CFPO(epsilon=epsilon, epsilon_high=epsilon_high),
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
        vocab_parallel=vocab_parallel,
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
    vocab_parallel: VocabParallel | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """log p of the tokens, differentiable, without a log-softmax in memory.

    ``logp = log softmax(logits / temperature)[token]``, bitwise what :func:`cfpo_loss` computes
    from the same logits.

    Args:
        logits, token_ids, mask, temperature, vocab_parallel, backend: see :func:`cfpo_loss`.
        return_entropy: also return the rows' entropies, differentiable too.
        return_lse: also return ``logsumexp(logits / temperature)``, not differentiable.
        inplace: backward overwrites the logits with their gradient.

    Returns:
        logps: (...) float32, in nats, 0 where masked; a tuple (logps, entropy, lse) of what is
        asked for otherwise.

    Raises: see :func:`cfpo_loss`.

    Memory: O(N) in forward; in backward one gradient of the logits, none with inplace=True.

    Example:
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> logps, entropy = token_logps(logits, torch.tensor([0, 3]), return_entropy=True)
        >>> (-logps.mean() - 0.01 * entropy.mean()).backward()
        >>> logps.detach().exp(), logits.grad[1]
        (tensor([0.2500, 0.2500]), tensor([ 0.1250,  0.1250,  0.1250, -0.3750]))
    """
    validation.check_flag("return_entropy", return_entropy)
    validation.check_flag("return_lse", return_lse)
    chosen_runner = _runner(backend, logits, inplace, vocab_parallel)
    rows = validation.check_rows(
        logits,
        token_ids,
        mask=mask,
        temperature=temperature,
        inplace=inplace,
        takes_float64=chosen_runner.takes_float64,
    )
    if isinstance(chosen_runner, ShardedRunner):
        chosen_runner.shards.refuse_differences(rows)
    logps, entropy, lse = chosen_runner.score(rows, inplace, return_entropy, return_lse)
    found = [logps.reshape(rows.shape)]
    if return_entropy:
        found.append(entropy.reshape(rows.shape))
    if return_lse:
        # A masked row's temperature may be anything.
        logsumexp = torch.where(rows.active, scaled(lse, rows.temperature), 0.0)
        found.append(logsumexp.to(rows.dtype).reshape(rows.shape))
    return found[0] if len(found) == 1 else tuple(found)


class CFPOLoss(nn.Module):
    """:func:`cfpo_loss` as a module: settings at construction, tensors at the call.

    Args:
        epsilon: see :func:`cfpo_loss`.
        **settings: any keyword argument of :func:`cfpo_loss`; a call may override them.

    Raises:
        TypeError, ValueError: an argument is unknown, or has a wrong type or value.

    Example:
        >>> criterion = CFPOLoss(epsilon=0.1, reduction="sum")
        >>> criterion
        CFPOLoss(epsilon=0.1, reduction='sum')
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 2]), torch.tensor([1.0, 2.0]))
        tensor(-3.)
    """

    def __init__(self, epsilon: float = 0.2, **settings: Any) -> None:
        super().__init__()
        # Refused now rather than at the first step.
        CFPO(epsilon=epsilon, epsilon_high=settings.get("epsilon_high"))
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
        """:func:`cfpo_loss` with the settings of the constructor.

        Args:
            logits: (..., V) float32, bfloat16 or float16, before the temperature; the only
                differentiable argument. Overwritten by its gradient with inplace=True.
            token_ids: (...) int64 or int32, the sampled tokens.
            advantages: (...) float; or one a sequence: (B,) or (B, 1) for (B, T, V) logits.
            old_logps: (...) float, log p of the tokens when they were sampled, in nats. None:
                on-policy.
            **overrides: keyword arguments of :func:`cfpo_loss`, for what changes with the batch
                (mask, ref_logps, token_weights, normalizer, ...), or in place of a setting.

        Returns:
            A 0-d float32 loss, or (...) for reduction="none"; with return_stats, a pair with
            :class:`CFPOStats`.

        Raises:
            TypeError, ValueError, IndexError, BackendUnavailableError: as :func:`cfpo_loss`.

        Memory: one gradient of the logits' shape and dtype, none with inplace=True.
        """
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
