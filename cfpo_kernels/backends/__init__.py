"""Which kernels can run where. Each backend offers the four functions of ``base.Backend``."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from . import cpu, cuda, triton
from .base import Backend

NAMES = ("cuda", "triton", "cpu", "reference")


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run; the message says why."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine.

    Attributes:
        available: it can be chosen by name.
        detail: what it would use, or why it is not available.
    """

    available: bool
    detail: str

    def __bool__(self) -> bool:
        return self.available


def _cuda_status() -> BackendStatus:
    if reason := cuda.why_not_built():
        return BackendStatus(False, reason)
    built = f"compiled for {cpu.native.cuda_archs}"
    query = cpu.native.cuda_query()
    if query["status"] != 0:
        why = f"{query['status_name']}: {query['status_text']}"
        return BackendStatus(False, f"{built}, but no usable GPU ({why})")
    devices = query["devices"]
    names = ", ".join(device["name"] for device in devices) or "no device"
    runs = any(
        cuda.runs_on(
            cpu.native.cuda_archs, (device["capability_major"], device["capability_minor"])
        )
        for device in devices
    )
    if not runs:
        return BackendStatus(False, f"{built}, which does not run here; sees {names}")
    return BackendStatus(True, f"{built}; sees {names}; not yet verified on GPU, so never 'auto'")


def _interpreted() -> bool:
    """Whether Triton was told to run kernels on CPU tensors, before it was imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


# Looked for once: this is asked at every call.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _triton_status() -> BackendStatus:
    if not _TRITON_INSTALLED:
        return BackendStatus(False, "triton is not installed: pip install triton")
    if _interpreted():
        return BackendStatus(True, "interpreted, on CPU tensors (TRITON_INTERPRET)")
    kinds = [kind for kind in _TRITON_DEVICES if _has_device(kind)]
    if not kinds:
        return BackendStatus(False, "torch sees no GPU, and TRITON_INTERPRET is not set")
    return BackendStatus(True, f"compiles for {', '.join(kinds)}; not yet verified on GPU")


# ROCm calls itself cuda.
_TRITON_DEVICES = ("cuda", "xpu")


def _has_device(kind: str) -> bool:
    module = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())


def _cpu_status() -> BackendStatus:
    if cpu.native is None:
        return BackendStatus(False, cpu.import_failure)
    return BackendStatus(True, "instruction sets: " + ", ".join(cpu.native.cpu_levels()))


def _reference_status() -> BackendStatus:
    return BackendStatus(True, "plain torch, any device, differentiable twice")


_STATUS = {
    "cuda": _cuda_status,
    "triton": _triton_status,
    "cpu": _cpu_status,
    "reference": _reference_status,
}
_KERNELS: dict[str, Backend] = {"cuda": cuda.CUDA, "cpu": cpu.CPU, "triton": triton.TRITON}


def available_backends() -> dict[str, BackendStatus]:
    """What this machine can run, and why the others cannot.

    Returns:
        A status for each of "cuda", "triton", "cpu" and "reference". A status is true where the
        backend is available, and its ``detail`` says what it would use or what is missing.
    """
    return {name: status() for name, status in _STATUS.items()}


def resolve(name: str, device: torch.device) -> str:
    """The backend that runs for tensors on `device`.

    Raises:
        BackendUnavailableError: it was asked for by name and cannot run, or not on this device.
    """
    if name == "auto":
        return "cpu" if device.type == "cpu" and cpu.native is not None else "reference"
    if name == "cpu" and device.type != "cpu":
        raise BackendUnavailableError(
            f"backend='cpu' takes CPU tensors, the logits are on {device}"
        )
    if name == "cuda":
        # Each device is asked once. torch.compile cannot ask while it traces.
        if not torch.compiler.is_compiling() and (why := cuda.why_not(device)):
            status = _cuda_status()
            detail = why if status else status.detail
            raise BackendUnavailableError(f"backend='cuda' is not available: {detail}")
        return name
    status = _STATUS[name]()
    if not status:
        raise BackendUnavailableError(f"backend={name!r} is not available: {status.detail}")
    takes = ("cpu",) if _interpreted() else _TRITON_DEVICES
    if name == "triton" and device.type not in takes:
        raise BackendUnavailableError(
            f"backend='triton' takes {' and '.join(takes)} tensors "
            f"{'where' if _interpreted() else 'unless'} TRITON_INTERPRET is set, "
            f"the logits are on {device}"
        )
    return name


def kernels(name: str) -> Backend:
    """The kernels of a resolved backend other than "reference"."""
    return _KERNELS[name]
