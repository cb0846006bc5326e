"""The C++ CPU kernels."""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..validation import values
from .base import KernelRows
from .native import NativeBackend
from .status import BackendStatus

native: Any = None
import_failure = ""
try:
    # Importing torch first lets the module share torch's OpenMP runtime.
    native = importlib.import_module("cfpo_kernels._C")
except (ImportError, OSError) as error:
    # A pure wheel, a source tree that was never built, or a library that is missing: the reference
    # still works.
    import_failure = f"the native module could not be imported: {error}"
    if getattr(error, "name", None) == "cfpo_kernels._C":
        import_failure += (
            "; this is the package in pure Python: plain torch computes the loss, or Triton on a "
            "GPU, and a wheel for Linux, or a build from source, has the kernels in C++ and CUDA"
        )
# Asked for once: torch.compile cannot trace the module's functions.
LEVELS: tuple[str, ...] = tuple(native.cpu_levels()) if native is not None else ()


def status() -> BackendStatus:
    """What `available_backends` says."""
    if native is None:
        return BackendStatus(False, import_failure)
    return BackendStatus(True, "instruction sets: " + ", ".join(LEVELS))


def level() -> str:
    """The instruction sets that calls use, for a person."""
    forced = os.environ.get("CFPO_KERNELS_CPU_LEVEL")
    return f"{forced} by CFPO_KERNELS_CPU_LEVEL" if forced else f"up to {LEVELS[0]}"


class CpuBackend(NativeBackend):
    """See ``base.Backend``."""

    @property
    def kernels(self) -> Any:
        return native

    def execution(
        self, logits: Tensor, workspace: bool = False
    ) -> AbstractContextManager[tuple[int]]:
        return nullcontext((torch.get_num_threads(),))

    def check_tokens(self, rows: KernelRows) -> None:
        if rows.sharded:
            return
        ids, n_cols = rows.token_ids, rows.logits.shape[-1]
        where = native.first_bad_token(ids, rows.weights, ids.numel(), n_cols)
        if where >= 0:
            values.refuse_token(ids, where, n_cols, rows.logits.shape[:-1])


CPU = CpuBackend()
