"""Which kernels can run where. Each backend offers the four functions of ``base.Backend``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cpu
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
    if cpu.native is None:
        return BackendStatus(False, cpu.import_failure)
    if not cpu.native.cuda_built:
        return BackendStatus(False, f"built without CUDA: {cpu.native.cuda_reason}")
    built = f"compiled for {cpu.native.cuda_archs}"
    query = cpu.native.cuda_query()
    if query["status"] != 0:
        why = f"{query['status_name']}: {query['status_text']}"
        return BackendStatus(False, f"{built}, but no usable GPU ({why})")
    devices = ", ".join(device["name"] for device in query["devices"]) or "no device"
    return BackendStatus(False, f"{built}; sees {devices}; this release has no CUDA loss kernels")


def available_backends() -> dict[str, BackendStatus]:
    """What this machine can run, and why the others cannot.

    Returns:
        A status for each of "cuda", "triton", "cpu" and "reference". A status is true where the
        backend is available, and its ``detail`` says what it would use or what is missing.
    """
    cpu_status = (
        BackendStatus(False, cpu.import_failure)
        if cpu.native is None
        else BackendStatus(True, "instruction sets: " + ", ".join(cpu.native.cpu_levels()))
    )
    return {
        "cuda": _cuda_status(),
        "triton": BackendStatus(False, "this release has no Triton kernels"),
        "cpu": cpu_status,
        "reference": BackendStatus(True, "plain torch, any device, differentiable twice"),
    }


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
    if name not in ("reference", "cpu") or (name == "cpu" and cpu.native is None):
        status = available_backends()[name]
        raise BackendUnavailableError(f"backend={name!r} is not available: {status.detail}")
    return name


def kernels(name: str) -> Backend:
    """The kernels of a resolved backend other than "reference"."""
    assert name == "cpu", name
    return cpu.CPU
