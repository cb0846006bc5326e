"""The CUDA kernels: which devices they can run on, and calls on torch's current stream.

Inputs and outputs belong to the caller, and the workspace is allocated and used on one stream, so
nothing needs ``record_stream``. Nothing here waits for the device, so calls can be captured into
CUDA graphs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .addresses import describe
from .cpu import import_failure, native
from .native import NativeBackend
from .status import BackendStatus


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a build for `archs`, such as "80-real,90a-real,80-virtual", runs on a device.

    Machine code runs on its own major version from its minor version on; with the suffix "a" on
    that very device only, with "f" on its family; "virtual" code on anything not older.
    """
    for arch in archs.split(","):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch.strip())
        if match is None:
            continue
        own = int(match[1]), int(match[2])
        suffix, kind = match[3], match[4]
        if own == capability or (
            suffix != "a" and own[0] == capability[0] and own[1] <= capability[1]
        ):
            return True
        if suffix == "" and kind != "-real" and own <= capability:
            return True
    return False


def why_not_built() -> str:
    """Why there are no CUDA kernels in this build, or ""."""
    if native is None:
        return import_failure
    return "" if native.cuda_built else f"built without CUDA: {native.cuda_reason}"


def why_no_gpu(query: dict[str, Any]) -> str:
    """Why the module's CUDA runtime finds no GPU, or "", from what ``cuda_query`` gives.

    torch has a runtime of its own, which may run on an older driver.
    """
    if query["status"] == 0:
        return ""
    return f"no usable GPU ({query['status_name']}: {query['status_text']})"


_usable: dict[int, str] = {}  # device index -> why not, or ""


def why_not(device: torch.device) -> str:
    """Why the CUDA kernels cannot run on `device`, or ""."""
    if reason := why_not_built():
        return reason
    if device.type != "cuda":
        return f"it takes CUDA tensors, the logits are on {device}"
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _usable:
        if reason := why_no_gpu(native.cuda_query()):
            return reason  # and ask again at the next call
        capability = torch.cuda.get_device_capability(index)
        runs = runs_on(native.cuda_archs, capability)
        _usable[index] = (
            ""
            if runs
            else f"compiled for {native.cuda_archs}, which does not run on {device}, "
            f"a {torch.cuda.get_device_name(index)} of compute capability "
            f"{capability[0]}.{capability[1]}; build again with CFPO_KERNELS_CUDA_ARCHS"
        )
    return _usable[index]


def why_no_clusters(device: torch.device) -> str:
    """Why kernels that need clusters of blocks would be others on `device`, or ""."""
    major, minor = torch.cuda.get_device_capability(device)
    needs = "its long rows need clusters of blocks, compute capability 9.0 or newer"
    return "" if major >= 9 else f"{needs}; {device} has {major}.{minor}"


def status() -> BackendStatus:
    """What `available_backends` says."""
    if reason := why_not_built():
        return BackendStatus(False, reason)
    built = f"compiled for {native.cuda_archs}"
    query = native.cuda_query()
    if reason := why_no_gpu(query):
        return BackendStatus(False, f"{built}, but {reason}")
    devices = query["devices"]
    names = ", ".join(device["name"] for device in devices) or "no device"
    runs = any(
        runs_on(native.cuda_archs, (device["capability_major"], device["capability_minor"]))
        for device in devices
    )
    if not runs:
        return BackendStatus(False, f"{built}, which does not run here; sees {names}")
    return BackendStatus(True, f"{built}; sees {names}")


class CudaBackend(NativeBackend):
    """See ``base.Backend``.

    Args:
        row_kernel: "portable", "cluster" or "transient" hold calls to that kernel, where whole rows
            are taken with their gradient; "auto" and "auto-transient" choose between the first and
            the second or third; None: the variable CFPO_KERNELS_CUDA_KERNEL, or "auto".
    """

    def __init__(self, row_kernel: str | None = None) -> None:
        self.row_kernel = row_kernel

    @property
    def kernels(self) -> Any:
        return native.cuda

    @contextmanager
    def execution(self, logits: Tensor, workspace: bool = False) -> Iterator[tuple[Any, ...]]:
        # The kernels choose the device; leaving this block restores what torch had.
        with torch.cuda.device(logits.device):
            stream = torch.cuda.current_stream(logits.device).cuda_stream
            device = torch.cuda.current_device()
            memory = self.workspace(logits, device) if workspace else None
            yield device, stream, memory, self.wanted_row_kernel()

    def wanted_row_kernel(self) -> str:
        return self.row_kernel or os.environ.get("CFPO_KERNELS_CUDA_KERNEL") or "auto"

    def workspace(self, logits: Tensor, device: int) -> Tensor | None:
        """Memory for the sums of few long rows; kept until the kernels are enqueued."""
        size = self.kernels.workspace_bytes(describe(logits), device)
        return torch.empty(size, dtype=torch.uint8, device=logits.device) if size else None


CUDA = CudaBackend()
CUDA_PORTABLE = CudaBackend("portable")
CUDA_TRANSIENT = CudaBackend("auto-transient")
