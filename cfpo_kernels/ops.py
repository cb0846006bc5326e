"""The kernels as torch operators, so that torch.compile and opcheck can see through a call.

Operators allocate their outputs and call the backend; they are not differentiable themselves
(autograd.py is). Signatures are flat because operator schemas are: `inputs` are the fields of
TokenInputs, what follows is ``flat(settings)``. An empty tensor stands for an output that was not
asked for. A name that ends in _ overwrites its first argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from . import backends
from .backends.base import KernelRows, KernelTerms
from .gradient_buffer import new_gradient
from .inputs import LossSettings, TokenInputs
from .shapes import Shape

# torch.library reads these annotations, and before torch 2.7 it does not know `Tensor | None`.
# ruff: noqa: UP045


def flat(settings: LossSettings) -> tuple[str, list[float], str, bool, float, float]:
    return settings.shape.kind, settings.shape.numbers, *settings[1:]


def unflat(kind: str, numbers: Sequence[float], *others: Any) -> LossSettings:
    return LossSettings(Shape(kind, *numbers), *others)


def _outputs(weights: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    entropy = weights.new_empty(weights.shape if with_entropy else (0,))
    return torch.empty_like(weights), torch.empty_like(weights), entropy


def _fake_gradient(logits: Tensor, wanted: bool = True) -> Tensor:
    return logits.new_empty(logits.shape if wanted else (0,))


def _nonempty(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _policy_loss_into(
    dlogits: Tensor, rows: KernelRows, terms: KernelTerms, with_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    loss, logps, entropy = _outputs(rows.weights, with_entropy)
    if rows.logits.numel():
        backends.kernels(backend).policy_loss(
            rows,
            terms,
            loss=loss,
            logps=logps,
            entropy=_nonempty(entropy),
            dlogits=_nonempty(dlogits),
        )
    return loss, logps, entropy


@torch.library.custom_op("cfpo_kernels::policy_loss", mutates_args=())
def policy_loss(
    logits: Tensor,
    token_ids: Tensor,
    weights: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    with_gradient: bool,
    backend: str,
    inputs: Sequence[Optional[Tensor]],
    shape: str,
    numbers: Sequence[float],
    kl_estimator: str,
    kl_ratio_weighted: bool,
    kl_coef: float,
    entropy_coef: float,
    grad_scale: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss (N,), logps (N,), entropy (N,) or (0,), dlogits (..., V) or (0,))."""
    dlogits = new_gradient(logits) if with_gradient else logits.new_empty(0)
    settings = unflat(shape, numbers, kl_estimator, kl_ratio_weighted, kl_coef, entropy_coef)
    loss, logps, entropy = _policy_loss_into(
        dlogits,
        KernelRows(logits, token_ids, weights, temperature),
        KernelTerms(TokenInputs(*inputs), settings, grad_scale),  # type: ignore[arg-type]
        with_entropy,
        backend,
    )
    return loss, logps, entropy, dlogits


@policy_loss.register_fake
def _(logits, token_ids, weights, temperature, with_entropy, with_gradient, *_):  # type: ignore[no-untyped-def]
    return *_outputs(weights, with_entropy), _fake_gradient(logits, with_gradient)


@torch.library.custom_op("cfpo_kernels::policy_loss_", mutates_args=("logits",))
def policy_loss_(
    logits: Tensor,
    token_ids: Tensor,
    weights: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    backend: str,
    inputs: Sequence[Optional[Tensor]],
    shape: str,
    numbers: Sequence[float],
    kl_estimator: str,
    kl_ratio_weighted: bool,
    kl_coef: float,
    entropy_coef: float,
    grad_scale: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites the logits with their gradient; returns (loss, logps, entropy)."""
    settings = unflat(shape, numbers, kl_estimator, kl_ratio_weighted, kl_coef, entropy_coef)
    return _policy_loss_into(
        logits,
        KernelRows(logits, token_ids, weights, temperature),
        KernelTerms(TokenInputs(*inputs), settings, grad_scale),  # type: ignore[arg-type]
        with_entropy,
        backend,
    )


@policy_loss_.register_fake
def _(logits, token_ids, weights, temperature, with_entropy, *_):  # type: ignore[no-untyped-def]
    return _outputs(weights, with_entropy)


@torch.library.custom_op("cfpo_kernels::token_logps", mutates_args=())
def token_logps(
    logits: Tensor,
    token_ids: Tensor,
    weights: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logps (N,), lse (N,) float64, entropy (N,) or (0,))."""
    logps, _, entropy = _outputs(weights, with_entropy)
    lse = torch.empty_like(weights, dtype=torch.float64)
    if logits.numel():
        backends.kernels(backend).token_logps(
            KernelRows(logits, token_ids, weights, temperature),
            logps=logps,
            lse=lse,
            entropy=_nonempty(entropy),
        )
    return logps, lse, entropy


@token_logps.register_fake
def _(logits, token_ids, weights, temperature, with_entropy, backend):  # type: ignore[no-untyped-def]
    logps, _, entropy = _outputs(weights, with_entropy)
    return logps, torch.empty_like(weights, dtype=torch.float64), entropy


@torch.library.custom_op("cfpo_kernels::token_logps_backward", mutates_args=())
def token_logps_backward(
    logits: Tensor,
    token_ids: Tensor,
    weights: Tensor,
    temperature: Tensor,
    backend: str,
    lse: Tensor,
    entropy: Tensor,
    dlogps: Optional[Tensor],
    dentropy: Optional[Tensor],
) -> Tensor:
    """Returns dlogits (..., V)."""
    dlogits = new_gradient(logits)
    if logits.numel():
        backends.kernels(backend).token_logps_backward(
            KernelRows(logits, token_ids, weights, temperature),
            lse=lse,
            entropy=_nonempty(entropy),
            dlogps=dlogps,
            dentropy=dentropy,
            dlogits=dlogits,
        )
    return dlogits


@token_logps_backward.register_fake
def _(logits, *_):  # type: ignore[no-untyped-def]
    return _fake_gradient(logits)


@torch.library.custom_op("cfpo_kernels::token_logps_backward_", mutates_args=("logits",))
def token_logps_backward_(
    logits: Tensor,
    token_ids: Tensor,
    weights: Tensor,
    temperature: Tensor,
    backend: str,
    lse: Tensor,
    entropy: Tensor,
    dlogps: Optional[Tensor],
    dentropy: Optional[Tensor],
) -> None:
    """Overwrites the logits with their gradient."""
    if logits.numel():
        backends.kernels(backend).token_logps_backward(
            KernelRows(logits, token_ids, weights, temperature),
            lse=lse,
            entropy=_nonempty(entropy),
            dlogps=dlogps,
            dentropy=dentropy,
            dlogits=logits,
        )


@token_logps_backward_.register_fake
def _(logits, *_):  # type: ignore[no-untyped-def]
    return None


@torch.library.custom_op("cfpo_kernels::multiply_rows_", mutates_args=("x",))
def multiply_rows_(x: Tensor, factors: Tensor, backend: str) -> None:
    """x[i] *= factors[i], for x (..., V) and factors (N,)."""
    if x.numel():
        backends.kernels(backend).multiply_rows(x, factors)


@multiply_rows_.register_fake
def _(x, factors, backend):  # type: ignore[no-untyped-def]
    return None
