"""The torch.autograd.Functions over the operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .backends.base import KernelRows, KernelTerms
from .plain import is_plain


def refuse_create_graph() -> None:
    # While torch.compile traces a backward, grad mode says nothing about create_graph.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "cfpo_kernels: double backward (create_graph=True) is not supported by the fused "
            "kernels; from whole logits, backend='reference' is differentiable twice"
        )


def begin_only_backward(ctx: Any) -> None:
    """Refuses what a backward that gives its buffers away cannot do; `ctx.spent` starts False."""
    refuse_create_graph()
    if not torch.compiler.is_compiling():
        if ctx.spent:
            raise RuntimeError(
                "cfpo_kernels: backward ran a second time, but the gradient buffer was handed "
                "over by the first; call the loss again"
            )
        ctx.spent = True


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``save_for_backward``, also of tensors that were made in inference mode.

    autograd refuses these, for nobody would notice that they change. So does torch.compile.
    """
    if torch.compiler.is_compiling():
        ctx.unguarded = [None] * len(tensors)
        ctx.save_for_backward(*tensors)
        return
    ctx.unguarded = [None if x is None or not x.is_inference() else x for x in tensors]
    guarded = (x if y is None else None for x, y in zip(tensors, ctx.unguarded, strict=True))
    ctx.save_for_backward(*guarded)


def saved(ctx: Any) -> list[Any]:
    """What ``save`` was given."""
    return [x if y is None else y for x, y in zip(ctx.saved_tensors, ctx.unguarded, strict=True)]


def _is_one(dloss: Tensor) -> bool:
    """Of a number that can be looked at for nothing."""
    return dloss.dim() == 0 and is_plain(dloss) and dloss.is_cpu and dloss.item() == 1


class LossCall(NamedTuple):
    """How a policy loss is computed.

    Attributes:
        backend: a name that ``backends.kernels`` takes.
        summed: the loss is 0-d, else (N,).
        masked: some weights may be 0 by a mask.
        with_scores: log-probs and entropies are wanted beside the loss.
        inplace: the logits hold their gradient afterwards.
    """

    backend: str
    summed: bool
    masked: bool
    with_scores: bool = False
    inplace: bool = False


class CFPOFunction(torch.autograd.Function):
    """A policy loss whose forward also computes the gradient, which backward hands over.

    ``apply(logits, token_ids, weights, temperature, terms, how)`` returns (loss, logps (N,),
    entropy (N,)), the last two None unless ``how.with_scores``; only the loss is differentiable,
    and only with respect to the logits. Backward can run once: a second call raises, but not in
    code that torch.compile made, which does not see the check.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> loss = cfpo_kernels.cfpo_loss(logits, torch.tensor([0, 2]), torch.ones(2))
        >>> loss.backward(retain_graph=True)
        >>> loss.backward()
        Traceback (most recent call last):
        RuntimeError: cfpo_kernels: backward ran a second time, ...
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        weights: Tensor,
        temperature: Tensor,
        terms: KernelTerms,
        how: LossCall,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        loss, logps, entropy, dlogits = ops.run_policy_loss(
            KernelRows(logits, token_ids, weights, temperature),
            terms,
            how.with_scores,
            how.backend,
            with_gradient=True,
            inplace=how.inplace,
        )
        if how.summed:  # here rather than outside: a node less for autograd
            loss = loss.sum()
        ctx.save_for_backward(dlogits, weights if how.masked else None, terms.grad_scale)
        ctx.backend = how.backend
        ctx.spent = False
        ctx.set_materialize_grads(False)
        if not how.with_scores:
            return loss, None, None
        ctx.mark_non_differentiable(logps, entropy)
        return loss, logps, entropy

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if dloss is None:
            return None, *nothing
        begin_only_backward(ctx)
        dlogits, weights, grad_scale = ctx.saved_tensors
        dlogits = dlogits.detach()
        if grad_scale is None and _is_one(dloss):
            return dlogits, *nothing
        factors = dloss if grad_scale is None else dloss / grad_scale
        if weights is not None:  # a masked row's zeros, also for inf, NaN
            factors = torch.where(weights == 0, 1.0, factors)
        # Where the factor is 1 this reads N numbers and touches nothing; the kernel looks.
        ops.run_multiply_rows_(dlogits, factors, ctx.backend)
        return dlogits, *nothing


class TokenLogpsFunction(torch.autograd.Function):
    """log p of each row's token, and the row's entropy, differentiable with respect to the logits.

    ``apply(logits, inplace, rounded, *arguments of ops.token_scores)`` returns (logps, entropy (N,)
    or (0,), lse); lse is not differentiable; logps are float64 unless `rounded` to the entropy's
    dtype. Saves the logits; with `inplace`, backward overwrites them with their gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        inplace: bool,
        rounded: bool,
        token_ids: Tensor,
        weights: Tensor,
        temperature: Tensor,
        with_entropy: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = KernelRows(logits, token_ids, weights, temperature)
        logps, lse, entropy = ops.run_token_scores(rows, with_entropy, backend)
        save(ctx, *rows.tensors(), lse, entropy)
        ctx.inplace = inplace
        ctx.backend = backend
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return logps.to(weights.dtype) if rounded else logps, entropy, lse

    @staticmethod
    def backward(
        ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 7
        refuse_create_graph()
        logits, token_ids, weights, temperature, lse, entropy = saved(ctx)
        if dlogps is None and (dentropy is None or dentropy.numel() == 0):
            return None, *nothing
        dlogps = None if dlogps is None else dlogps.to(weights.dtype).contiguous()
        dentropy = None if dentropy is None or dentropy.numel() == 0 else dentropy.contiguous()
        dlogits = ops.run_token_logps_backward(
            KernelRows(logits.detach(), token_ids, weights, temperature),
            ctx.backend,
            lse,
            entropy,
            dlogps,
            dentropy,
            inplace=ctx.inplace,
        )
        return dlogits, *nothing
