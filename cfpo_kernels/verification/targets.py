"""Which sets of kernels there are for a device, and why some cannot run on it."""

from __future__ import annotations

import torch

from .. import backends
from ..backends import cpu, cuda, triton
from .battery import Target

# By kind of device, the ones to prefer first.
NAMES = {
    "gpu": ("cuda", "cuda-transient", "cuda-portable", "triton", "triton-unrolled"),
    "cpu": ("cpu",),
}
# Triton compiles each set anew, which a first use should not wait for.
ONLY_FULL = ("triton-unrolled",)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def kind_of(device: torch.device) -> str:
    """ "gpu", "cpu", or "" where no kernels could run."""
    return "gpu" if device.type in triton.DEVICES else "cpu" if device.type == "cpu" else ""


def names_for(device: torch.device, full: bool = True) -> tuple[str, ...]:
    """`full`: as of the long battery."""
    names = NAMES.get(kind_of(device), ())
    return names if full else tuple(name for name in names if name not in ONLY_FULL)


def backend_of(name: str) -> str:
    """The public backend that a set of kernels belongs to."""
    return name.partition("-")[0]


def why_not(name: str, device: torch.device) -> str:
    """Why these kernels cannot even be tried on the device, or "". Asks no kernel to run."""
    if backend_of(name) == "cuda":
        status = cuda.status()
        why = cuda.why_not(device) if status else status.detail
        return why or (cuda.why_no_clusters(device) if name == "cuda-transient" else "")
    if backend_of(name) == "triton":
        found = triton.status()
        return triton.why_not(device) if found else found.detail
    return "" if cpu.native is not None else cpu.import_failure


def device_targets(device: torch.device, names: list[str]) -> list[Target]:
    """The production kernels, on a real device."""
    if kind_of(device) == "cpu":
        multiprocessors = 1
    else:
        properties = torch.get_device_module(device).get_device_properties(device)
        multiprocessors = getattr(properties, "multi_processor_count", 64)
    return [Target(name, backends.kernels(name), device, multiprocessors) for name in names]
