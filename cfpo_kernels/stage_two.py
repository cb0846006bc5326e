"""Stage 2 alone, of log-probs that exist: by the C++ of the kernels on a CPU, else in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import formula
from .autograd import save, saved
from .backends import cpu
from .inputs import LossSettings, TokenInputs
from .plain import is_plain
from .two_pass import Beyond


def token_losses(
    logps: Tensor,
    entropy: Tensor | None,
    weights: Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
    beyond: Beyond = formula.ONE_TOKEN,
) -> Tensor:
    """``formula.loss_of_logps`` in the weights' dtype; log-probs in float64 are unrounded."""
    if not _is_native(logps, entropy, weights, inputs, settings, beyond):
        return losses_in_torch(logps, entropy, weights, inputs, settings, beyond)
    log_ratio = None
    if beyond.ratio is not None:
        active = weights != 0
        log_ratio = formula.log_ratio_of(
            torch.where(active, logps.double(), 0.0),
            None if inputs.old_logps is None else torch.where(active, inputs.old_logps, 0.0),
        )
        log_ratio, _ = beyond.ratio(log_ratio, active)
    entropy = entropy if settings.needs_entropy else None
    return _TokenLosses.apply(logps, entropy, log_ratio, weights, inputs, settings)


def losses_in_torch(
    logps: Tensor,
    entropy: Tensor | None,
    weights: Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
    beyond: Beyond = formula.ONE_TOKEN,
) -> Tensor:
    """The same by the formula alone."""
    if beyond.function is not None:  # which sees what a caller of token_logps would
        logps = logps.to(weights.dtype)
    loss = formula.loss_of_logps(logps, entropy, weights, inputs, settings, beyond)
    return loss.to(weights.dtype)


def _is_native(
    logps: Tensor,
    entropy: Tensor | None,
    weights: Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
    beyond: Beyond,
) -> bool:
    """float64 losses and callables are torch's, as is what has to see operators."""
    return (
        cpu.native is not None
        and logps.device.type == "cpu"
        and weights.dtype == torch.float32
        and beyond.function is None
        and settings.shape.kind in formula.SHAPES
        and is_plain(logps, entropy, weights, *inputs)
        and forward_ad._current_level < 0
    )


class _TokenLosses(torch.autograd.Function):
    """(N,) float32; differentiable as often as wanted, from the second time on in torch."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        entropy: Tensor | None,
        log_ratio: Tensor | None,
        weights: Tensor,
        inputs: TokenInputs,
        settings: LossSettings,
    ) -> Tensor:
        exact = logps.double().contiguous()
        loss, dlogps = torch.empty_like(weights), torch.empty_like(exact)
        dlog_ratio = None if log_ratio is None else torch.empty_like(exact)
        shape, *others = settings
        cpu.native.token_losses(
            exact.numel(),
            exact,
            None if entropy is None else entropy.contiguous(),
            weights,
            log_ratio,
            inputs,
            shape.kind,
            shape.numbers,
            *others,
            loss,
            dlogps,
            dlog_ratio,
            torch.get_num_threads(),
        )
        save(ctx, logps, entropy, log_ratio, weights, dlogps, dlog_ratio)
        ctx.inputs, ctx.settings = inputs, settings
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logps, entropy, log_ratio, weights, dlogps, dlog_ratio = saved(ctx)
        given = (logps, entropy, log_ratio)
        slopes: list[Tensor | None] = [dlogps, -ctx.settings.entropy_coef * weights, dlog_ratio]
        if torch.is_grad_enabled():  # create_graph
            slopes = _slopes_in_torch(*given, weights, ctx.inputs, ctx.settings)
        found = [
            # A slope of 0 is one also for inf and NaN.
            torch.where(slope == 0, 0.0, slope * dloss).to(x.dtype)
            if needed and slope is not None
            else None
            for x, slope, needed in zip(given, slopes, ctx.needs_input_grad, strict=False)
        ]
        return *found, None, None, None


def _slopes_in_torch(
    logps: Tensor,
    entropy: Tensor | None,
    log_ratio: Tensor | None,
    weights: Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
) -> list[Tensor | None]:
    """The derivatives of each loss, differentiable."""
    # Where log_ratio was made of logps, what came that way is not asked for.
    leaves = [None if x is None else x.view_as(x) for x in (logps, entropy, log_ratio)]
    logps, entropy, shared = leaves  # type: ignore[assignment]

    def given(own: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        assert shared is not None
        return shared, shared.detach() + (own - own.detach())

    beyond = Beyond(ratio=None if shared is None else given)  # type: ignore[arg-type]
    loss = formula.loss_of_logps(logps.double(), entropy, weights, inputs, settings, beyond)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    found = torch.autograd.grad(loss.sum(), wanted, create_graph=True, materialize_grads=True)
    slopes = iter(found)
    return [next(slopes) if x is not None and x.requires_grad else None for x in leaves]
