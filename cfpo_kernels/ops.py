"""The kernels as torch operators, so that torch.compile and opcheck can see through a call.

The package calls them by the functions that begin with ``run_``. Those go straight to the backend
where nobody would see an operator: torch.library's way there is longer than many a kernel.

Operators allocate their outputs and call the backend; they are not differentiable themselves
(autograd.py is). Signatures are flat because operator schemas are: `inputs` are the fields of
TokenInputs, what follows is ``flat(settings)``. An empty tensor stands for an output that was not
asked for. A name that ends in _ overwrites its first argument. What gives other shapes or dtypes
than in an earlier version needs another name: torch.compile keeps graphs on disk, by the names in
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import torch
from torch import Tensor

from . import backends
from .backends.base import KernelRows, KernelTerms
from .gradient_buffer import new_gradient
from .inputs import LossSettings, TokenInputs
from .plain import is_plain
from .shapes import Shape

# torch.library reads these annotations, and before torch 2.7 it does not know `Tensor | None`.
# ruff: noqa: UP045


def flat(settings: LossSettings) -> tuple[str, list[float], str, bool, float, float]:
    shape, estimator, weighted, kl_coef, entropy_coef = settings
    return shape.kind, shape.numbers, estimator, weighted, kl_coef, entropy_coef


def unflat(kind: str, numbers: Sequence[float], *others: Any) -> LossSettings:
    return LossSettings(Shape(kind, *numbers), *others)


def _outputs(weights: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    entropy = torch.empty_like(weights) if with_entropy else None
    return torch.empty_like(weights), torch.empty_like(weights), entropy


def _scores(weights: Tensor) -> tuple[Tensor, Tensor]:
    n, double = len(weights), torch.float64
    return weights.new_empty(n, dtype=double), weights.new_empty(n, 2, dtype=double)


def _or_empty(entropy: Tensor | None, weights: Tensor) -> Tensor:
    return weights.new_empty(0) if entropy is None else entropy


def _fake_outputs(weights: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss, logps, entropy = _outputs(weights, with_entropy)
    return loss, logps, _or_empty(entropy, weights)


def _gradient(logits: Tensor, wanted: bool = True) -> Tensor:
    return logits.new_empty(logits.shape if wanted else (0,))


def _nonempty(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _policy_loss_into(
    dlogits: Tensor | None, rows: KernelRows, terms: KernelTerms, with_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    loss, logps, entropy = _outputs(rows.weights, with_entropy)
    if rows.logits.numel():
        backends.kernels(backend).policy_loss(
            rows, terms, loss=loss, logps=logps, entropy=entropy, dlogits=dlogits
        )
    return loss, logps, entropy


def _token_scores(
    rows: KernelRows, with_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    entropy = torch.empty_like(rows.weights) if with_entropy else None
    logps, lse = _scores(rows.weights)
    if rows.logits.numel():
        backends.kernels(backend).token_logps(rows, logps=logps, lse=lse, entropy=entropy)
    return logps, lse, _or_empty(entropy, rows.weights)


def _token_logps_backward_into(
    dlogits: Tensor,
    rows: KernelRows,
    backend: str,
    lse: Tensor,
    entropy: Tensor,
    dlogps: Tensor | None,
    dentropy: Tensor | None,
) -> Tensor:
    if dlogits.numel():
        backends.kernels(backend).token_logps_backward(
            rows,
            lse=lse,
            entropy=_nonempty(entropy),
            dlogps=dlogps,
            dentropy=dentropy,
            dlogits=dlogits,
        )
    return dlogits


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
    dlogits = _gradient(logits, with_gradient)
    settings = unflat(shape, numbers, kl_estimator, kl_ratio_weighted, kl_coef, entropy_coef)
    loss, logps, entropy = _policy_loss_into(
        _nonempty(dlogits),
        KernelRows(logits, token_ids, weights, temperature),
        KernelTerms(TokenInputs(*inputs), settings, grad_scale),  # type: ignore[arg-type]
        with_entropy,
        backend,
    )
    return loss, logps, _or_empty(entropy, weights), dlogits


@policy_loss.register_fake
def _(logits, token_ids, weights, temperature, with_entropy, with_gradient, *_):  # type: ignore[no-untyped-def]
    return *_fake_outputs(weights, with_entropy), _gradient(logits, with_gradient)


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
    loss, logps, entropy = _policy_loss_into(
        logits,
        KernelRows(logits, token_ids, weights, temperature),
        KernelTerms(TokenInputs(*inputs), settings, grad_scale),  # type: ignore[arg-type]
        with_entropy,
        backend,
    )
    return loss, logps, _or_empty(entropy, weights)


@policy_loss_.register_fake
def _(logits, token_ids, weights, temperature, with_entropy, *_):  # type: ignore[no-untyped-def]
    return _fake_outputs(weights, with_entropy)


@torch.library.custom_op("cfpo_kernels::token_scores", mutates_args=())
def token_scores(
    logits: Tensor,
    token_ids: Tensor,
    weights: Tensor,
    temperature: Tensor,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logps (N,) float64, lse (N, 2) float64, entropy (N,) or (0,))."""
    return _token_scores(KernelRows(logits, token_ids, weights, temperature), with_entropy, backend)


@token_scores.register_fake
def _(logits, token_ids, weights, temperature, with_entropy, backend):  # type: ignore[no-untyped-def]
    *_, entropy = _fake_outputs(weights, with_entropy)
    logps, lse = _scores(weights)
    return logps, lse, entropy


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
    rows = KernelRows(logits, token_ids, weights, temperature)
    return _token_logps_backward_into(
        _gradient(logits), rows, backend, lse, entropy, dlogps, dentropy
    )


@token_logps_backward.register_fake
def _(logits, *_):  # type: ignore[no-untyped-def]
    return _gradient(logits)


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
    rows = KernelRows(logits, token_ids, weights, temperature)
    _token_logps_backward_into(logits, rows, backend, lse, entropy, dlogps, dentropy)


@token_logps_backward_.register_fake
def _(logits, *_):  # type: ignore[no-untyped-def]
    return None


@torch.library.custom_op("cfpo_kernels::multiply_rows_", mutates_args=("x",))
def multiply_rows_(x: Tensor, factors: Tensor, backend: str) -> None:
    """x[i] *= factors[i], for x (..., V) and factors (N,); or 0-d, for all rows."""
    if x.numel():
        backends.kernels(backend).multiply_rows(x, factors)


@multiply_rows_.register_fake
def _(x, factors, backend):  # type: ignore[no-untyped-def]
    return None


def _shown(name: str) -> AbstractContextManager[Any]:
    """Around a direct call: what a profiler has to see of it."""
    if torch._C._autograd._profiler_enabled():
        return torch.profiler.record_function(f"cfpo_kernels::{name}")
    return _NOTHING


_NOTHING = nullcontext()


def run_policy_loss(
    rows: KernelRows,
    terms: KernelTerms,
    with_entropy: bool,
    backend: str,
    *,
    with_gradient: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns (loss, logps, entropy, dlogits), where `dlogits` are the logits with `inplace`.

    What is not wanted may be None or anything.
    """
    logits = rows.logits
    if is_plain(*rows.tensors(), *terms.inputs, terms.grad_scale):
        with _shown("policy_loss_" if inplace else "policy_loss"):
            dlogits = logits if inplace else new_gradient(logits) if with_gradient else None
            found = _policy_loss_into(dlogits, rows, terms, with_entropy, backend)
            if inplace:
                torch.autograd.graph.increment_version(logits)
            return *found, dlogits
    flat_terms = (list(terms.inputs), *flat(terms.settings), terms.grad_scale)
    if inplace:
        return *policy_loss_(*rows.tensors(), with_entropy, backend, *flat_terms), logits
    return policy_loss(*rows.tensors(), with_entropy, with_gradient, backend, *flat_terms)


def run_token_scores(
    rows: KernelRows, with_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logps, lse, entropy); the first two in float64."""
    if is_plain(*rows.tensors()):
        with _shown("token_scores"):
            return _token_scores(rows, with_entropy, backend)
    return token_scores(*rows.tensors(), with_entropy, backend)


def run_token_logps_backward(
    rows: KernelRows,
    backend: str,
    lse: Tensor,
    entropy: Tensor,
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    *,
    inplace: bool,
) -> Tensor:
    """Returns dlogits, which are the logits with `inplace`."""
    logits, arguments = rows.logits, (backend, lse, entropy, dlogps, dentropy)
    if is_plain(*rows.tensors(), lse, entropy, dlogps, dentropy):
        with _shown("token_logps_backward_" if inplace else "token_logps_backward"):
            dlogits = logits if inplace else new_gradient(logits)
            _token_logps_backward_into(dlogits, rows, *arguments)
            if inplace:
                torch.autograd.graph.increment_version(logits)
            return dlogits
    if inplace:
        token_logps_backward_(*rows.tensors(), *arguments)
        return logits
    return token_logps_backward(*rows.tensors(), *arguments)


def run_multiply_rows_(x: Tensor, factors: Tensor, backend: str) -> None:
    """See ``multiply_rows_``."""
    if not is_plain(x, factors):
        multiply_rows_(x, factors, backend)
    elif x.numel():
        with _shown("multiply_rows_"):
            backends.kernels(backend).multiply_rows(x, factors)
            torch.autograd.graph.increment_version(x)
