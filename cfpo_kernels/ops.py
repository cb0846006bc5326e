"""The kernels as torch operators, so that torch.compile and opcheck can see through a call.

Operators allocate their outputs and call the backend; they are not differentiable themselves
(autograd.py is). Signatures are flat because operator schemas are: `inputs` are the fields of
TokenInputs, what follows is ``flat(settings)``. An empty tensor stands for an output that was not
asked for. A name that ends in _ overwrites its first argument.

``call`` is how the package runs them: where nothing but this package would see the operator, it
calls what stands behind it. torch.library's way there and back is longer than a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from . import backends
from .backends.base import KernelRows, KernelTerms
from .inputs import LossSettings, TokenInputs
from .shapes import Shape

# torch.library reads these annotations, and before torch 2.7 it does not know `Tensor | None`.
# ruff: noqa: UP045


# What an operator does, and its name, by the operator; filled by `_operator`.
_BEHIND: dict[Any, tuple[Callable[..., Any], str]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def _operator(*, overwrites: str = "") -> Callable[[Callable[..., Any]], Any]:
    """Makes an operator of a function, by its name."""

    def make(function: Callable[..., Any]) -> Any:
        name = f"cfpo_kernels::{function.__name__}"
        mutated = (overwrites,) if overwrites else ()
        operator = torch.library.custom_op(name, function, mutates_args=mutated)

        def overwriting(*arguments: Any) -> Any:
            found = function(*arguments)
            torch.autograd.graph.increment_version(arguments[0])
            return found

        _BEHIND[operator] = (overwriting if overwrites else function), name
        return operator

    return make


def call(operator: Any, *arguments: Any) -> Any:
    """``operator(*arguments)``, past torch.library where nobody would see the difference."""
    if not is_plain(*arguments):
        return operator(*arguments)
    function, name = _BEHIND[operator]
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(name):
            return function(*arguments)
    return function(*arguments)


def is_plain(*arguments: Any) -> bool:
    """Whether a call is eager, with no mode or transform of torch around it that is to see it, and
    all its tensors are what they seem: numbers in memory."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ) and all(map(_is_memory, arguments))


def _is_memory(x: Any) -> bool:
    if isinstance(x, Tensor):
        # Fake tensors are a subclass; some are negative or zero by a flag alone.
        return type(x) in _PLAIN and not (x.is_meta or x.is_neg() or x._is_zerotensor())
    return type(x) is not list or all(map(_is_memory, x))


def flat(settings: LossSettings) -> tuple[str, list[float], str, bool, float, float]:
    return settings.shape.kind, settings.shape.numbers, *settings[1:]


def unflat(kind: str, numbers: Sequence[float], *others: Any) -> LossSettings:
    return LossSettings(Shape(kind, *numbers), *others)


def _outputs(weights: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    entropy = weights.new_empty(weights.shape if with_entropy else (0,))
    return torch.empty_like(weights), torch.empty_like(weights), entropy


def _gradient(logits: Tensor, wanted: bool = True) -> Tensor:
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


@_operator()
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
        dlogits,
        KernelRows(logits, token_ids, weights, temperature),
        KernelTerms(TokenInputs(*inputs), settings, grad_scale),  # type: ignore[arg-type]
        with_entropy,
        backend,
    )
    return loss, logps, entropy, dlogits


@policy_loss.register_fake
def _(logits, token_ids, weights, temperature, with_entropy, with_gradient, *_):  # type: ignore[no-untyped-def]
    return *_outputs(weights, with_entropy), _gradient(logits, with_gradient)


@_operator(overwrites="logits")
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


@_operator()
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


@_operator()
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
    dlogits = _gradient(logits)
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
    return _gradient(logits)


@_operator(overwrites="logits")
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


@_operator(overwrites="x")
def multiply_rows_(x: Tensor, factors: Tensor, backend: str) -> None:
    """x[i] *= factors[i], for x (..., V) and factors (N,); or 0-d, for all rows."""
    if x.numel():
        backends.kernels(backend).multiply_rows(x, factors)


@multiply_rows_.register_fake
def _(x, factors, backend):  # type: ignore[no-untyped-def]
    return None
