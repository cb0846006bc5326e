"""Which kernels can run where. Each backend offers the four functions of ``base.Backend``."""

from __future__ import annotations

import torch

from ..verification import choice
from . import cpu, cuda, triton
from .base import Backend
from .status import BackendStatus, BackendUnavailableError

__all__ = [
    "KERNELS",
    "NAMES",
    "REFERENCE",
    "BackendStatus",
    "BackendUnavailableError",
    "available_backends",
    "kernels",
    "resolve",
]

REFERENCE = choice.REFERENCE
NAMES = ("cuda", "triton", "cpu", REFERENCE)

# By the names that `resolve` gives; some hold a backend to one of its kernels.
KERNELS: dict[str, Backend] = {
    "cuda": cuda.CUDA,
    "cuda-portable": cuda.CUDA_PORTABLE,
    "cuda-transient": cuda.CUDA_TRANSIENT,
    "cpu": cpu.CPU,
    "triton": triton.TRITON,
    "triton-unrolled": triton.TRITON_UNROLLED,
}


def _reference_status() -> BackendStatus:
    return BackendStatus(True, "plain torch, any device, differentiable twice")


_STATUS = {
    "cuda": cuda.status,
    "triton": triton.status,
    "cpu": cpu.status,
    REFERENCE: _reference_status,
}


def available_backends() -> dict[str, BackendStatus]:
    """What this machine can run, and why the others cannot.

    Returns:
        A status for each of "cuda", "triton", "cpu" and "reference". A status is true where the
        backend is available, and its ``detail`` says what it would use or what is missing. Whether
        a backend is right here is :func:`cfpo_kernels.verify`'s to say.

    Example:
        >>> found = available_backends()
        >>> list(found)
        ['cuda', 'triton', 'cpu', 'reference']
        >>> print(found["cpu"].detail)
        instruction sets: ...
    """
    return {name: status() for name, status in _STATUS.items()}


def resolve(
    name: str, device: torch.device, dtype: torch.dtype, n_cols: int, *, inplace: bool = False
) -> str:
    """The kernels that run for logits (..., n_cols) of `dtype` on `device`: a name in `KERNELS`, or
    "reference".

    "auto" takes what verification/choice.py says. Where that is plain torch although kernels were
    to be expected, or although the gradient may overwrite the logits, one warning says why.

    Raises:
        BackendUnavailableError: it was asked for by name and cannot run, or not on this device.
    """
    if name == "auto":
        compiling = torch.compiler.is_compiling()
        # Only a GPU's choice depends on the size, which may be a symbol while torch.compile traces.
        n_cols = 0 if compiling and device.type == "cpu" else int(n_cols)
        return _automatic(device, dtype, n_cols, inplace, compiling)
    if name == "cpu" and device.type != "cpu":
        raise BackendUnavailableError(
            f"backend='cpu' takes CPU tensors, the logits are on {device}"
        )
    if name == "cuda":
        # Each device is asked once. torch.compile cannot ask while it traces.
        if not torch.compiler.is_compiling() and (why := cuda.why_not(device)):
            status = cuda.status()
            detail = why if status else status.detail
            raise BackendUnavailableError(f"backend='cuda' is not available: {detail}")
        if not torch.compiler.is_compiling() and (name, device.type) not in choice.asked:
            choice.tell_asked(name, device)
        return name
    status = _STATUS[name]()
    if not status:
        raise BackendUnavailableError(f"backend={name!r} is not available: {status.detail}")
    if name == "triton" and (why := triton.why_not(device)):
        raise BackendUnavailableError(f"backend='triton' {why}")
    if not torch.compiler.is_compiling() and (name, device.type) not in choice.asked:
        choice.tell_asked(name, device)
    return name


# Called as it is while torch.compile traces: what it returns is a constant of the graph.
@torch.compiler.assume_constant_result
def _automatic(
    device: torch.device, dtype: torch.dtype, n_cols: int, inplace: bool, compiling: bool
) -> str:
    return choice.kernels_for(device, dtype, n_cols, inplace, compiling)


def kernels(name: str) -> Backend:
    """The kernels of a resolved name other than "reference"."""
    return KERNELS[name]
