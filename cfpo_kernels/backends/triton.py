"""Launches the Triton kernels. On CPU tensors only under Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs import LossSettings
from ..objectives.triton import function_of
from ..shapes import Shape
from .base import KernelRows, KernelTerms
from .layout import RowLayout, row_blocks, row_layout, rows_from
from .status import BackendStatus

# ROCm calls itself cuda.
DEVICES = ("cuda", "xpu")
# As pyproject.toml and tools/test_matrix.py have it: older ones lack what the kernels use.
OLDEST = (3, 6)
# Looked for once: this is asked at every call.
_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton was told to run kernels on CPU tensors, before it was imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def has_device(kind: str) -> bool:
    """Whether torch sees one of that type."""
    module = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())


# What torch.compile traces takes the answer for a constant of its graph.
@torch.compiler.assume_constant_result
def import_failure() -> str:
    """Why triton is of no use though it is installed: too old, or it or the kernels cannot be
    imported; or ""."""
    return _import_failure()


@functools.cache
def _import_failure() -> str:
    try:
        version = str(importlib.import_module("triton").__version__)
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
            needed = ".".join(map(str, OLDEST))
            return f"the kernels need Triton {needed} or newer, installed is {version}"
        _module("kernels")
    except Exception as error:  # of a library that is missing, or another version's
        return f"the Triton kernels could not be imported: {type(error).__name__}: {error}"
    return ""


def status() -> BackendStatus:
    """What `available_backends` says."""
    if not _INSTALLED:
        return BackendStatus(False, "triton is not installed: pip install triton")
    kinds = [kind for kind in DEVICES if has_device(kind)]
    if (interpreted() or kinds) and (failure := import_failure()):
        return BackendStatus(False, failure)
    if interpreted():
        return BackendStatus(True, "interpreted, on CPU tensors (TRITON_INTERPRET)")
    if not kinds:
        return BackendStatus(False, "torch sees no GPU, and TRITON_INTERPRET is not set")
    return BackendStatus(True, f"compiles for {', '.join(kinds)}")


def why_not(device: torch.device) -> str:
    """Why the kernels cannot run on `device`, where Triton is available; or ""."""
    takes = ("cpu",) if interpreted() else DEVICES
    if device.type in takes:
        return ""
    return (
        f"takes {' and '.join(takes)} tensors {'where' if interpreted() else 'unless'} "
        f"TRITON_INTERPRET is set, the logits are on {device}"
    )


@functools.cache
def _module(name: str) -> Any:
    # Triton takes a while to import, and is not installed everywhere: only on first use.
    return importlib.import_module(f"cfpo_kernels.triton_kernels.{name}")


@functools.cache
def _device(device: torch.device) -> Any:
    """What of a device config.py wants to know."""
    config = _module("config")
    if device.type == "cpu":  # interpreted: few processors, so that a program gets several rows
        return config.Device(multiprocessors=2)
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        return config.Device(properties.gpu_subslice_count, limits_registers=False)
    return config.Device(
        properties.multi_processor_count,
        properties.warp_size,
        limits_registers=torch.version.hip is None,
    )


class _Matrix(NamedTuple):
    """Rows (..., V) as the kernels are told where they are; numbers in elements."""

    tensor: Tensor  # its address is what `first` and the strides count from
    first: int
    layout: RowLayout

    @classmethod
    def of(cls, tensor: Tensor) -> _Matrix:
        layout = row_layout(tensor)
        assert layout is not None  # row_blocks saw to it
        return cls(tensor, 0, layout)

    def misalignment(self, vector: int) -> int:
        return self.tensor.data_ptr() // self.tensor.element_size() % vector

    def is_aligned(self, vector: int) -> bool:
        """Whether every row starts at a multiple of `vector` elements."""
        strides = (self.layout.outer_stride, self.layout.inner_stride)
        return self.misalignment(vector) == 0 and all(stride % vector == 0 for stride in strides)

    def rows_alike(self, other: _Matrix, vector: int) -> bool:
        """Whether row i of both starts at the same address modulo `vector` elements."""
        (inner, outer, step), (their_inner, their_outer, their_step) = self.layout, other.layout
        return (
            self.misalignment(vector) == other.misalignment(vector)
            and inner == their_inner
            and (outer - their_outer) % vector == 0
            and (step - their_step) % vector == 0
        )

    def from_aligned(self, vector: int) -> _Matrix | None:
        """The same rows, counted from an aligned address; None if the storage has none before."""
        tensor, back = self.tensor, self.misalignment(vector)
        offset = tensor.storage_offset() - back
        if offset < 0:
            return None
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = back + 1 + sum((size - 1) * stride for size, stride in steps)
        return _Matrix(tensor.as_strided((extent,), (1,), offset), back, self.layout)

    def arguments(self, name: str, unit: int) -> dict[str, int]:
        return {
            f"{name}_first": self.first,
            f"{name}_inner": self.layout.inner,
            f"{name}_outer": self.layout.outer_stride // unit,
            f"{name}_step": self.layout.inner_stride // unit,
        }


class _Launch(NamedTuple):
    """What the launches on one block of rows share."""

    n_rows: int
    n_cols: int
    logits: _Matrix
    dlogits: _Matrix | None
    unit: int
    column_unit: int
    shifted: int
    with_entropy: bool
    tile: Any
    register_limit: int
    device: Any
    unroll: int

    @classmethod
    def of(cls, x: Tensor, d: Tensor | None, with_entropy: bool, unroll: int) -> _Launch:
        config = _module("config")
        vector = config.VECTOR_BYTES // x.element_size()
        n_cols = x.shape[-1]
        tile = config.tile(n_cols, x.element_size())
        matrices = [_Matrix.of(matrix) for matrix in (x, d) if matrix is not None]
        aligned = all(matrix.is_aligned(vector) for matrix in matrices)
        shifted = 0
        if not aligned and matrices[0].rows_alike(matrices[-1], vector):
            moved = [matrix.from_aligned(vector) for matrix in matrices]
            if None not in moved:
                matrices, shifted = moved, vector  # type: ignore[assignment]
        if narrow := not aligned and not shifted:
            tile = config.narrow(tile)
        return cls(
            x.shape[:-1].numel(),
            n_cols,
            matrices[0],
            matrices[1] if d is not None else None,
            vector if aligned else 1,
            vector if n_cols % vector == 0 else 1,
            shifted,
            with_entropy,
            tile,
            config.register_limit(tile, with_entropy, narrow),
            _device(x.device),
            unroll,
        )

    def segments(self) -> int:
        return -(-self.n_cols // self.tile.segment)

    def pieces(self) -> int:
        """Segments of rows that were shifted to aligned addresses: one more than their columns
        need, where the shift may cross a boundary."""
        return -(-(self.n_cols + max(self.shifted - 1, 0)) // self.tile.segment)

    def is_split(self) -> bool:
        return bool(_module("config").split_rows(self.device, self.tile, self.n_rows, self.n_cols))

    def row_programs(self) -> int:
        """Programs for whole rows."""
        return min(self.n_rows, int(self.device.programs(self.tile, self.register_limit)))

    def rows(self) -> dict[str, Any]:
        return {
            "n_rows": self.n_rows,
            "n_cols": self.n_cols // self.column_unit,
            **self.logits.arguments("logits", self.unit),
        }

    def gradient_rows(self) -> dict[str, Any]:
        matrix = self.dlogits or _Matrix(self.logits.tensor, 0, RowLayout(1, 0, 0))
        return matrix.arguments("dlogits", self.unit)

    def constants(self) -> dict[str, Any]:
        limit = {"maxnreg": self.register_limit} if self.device.limits_registers else {}
        return {
            "UNIT": self.unit,
            "COLUMN_UNIT": self.column_unit,
            "SHIFTED": self.shifted,
            "BLOCK": self.tile.block,
            "num_warps": self.tile.threads // self.device.warp_size,
            # What the source spells out is what is rounded: kernels that share a function agree.
            "enable_fp_fusion": False,
            **limit,
        }

    def loops(self) -> dict[str, int]:
        """How segments of a row are walked over."""
        return {"SEGMENT": self.tile.segment, "UNROLL": self.unroll}


def _launches(
    x: Tensor, d: Tensor | None = None, *, with_entropy: bool = False, unroll: int = 1
) -> list[tuple[int, _Launch]]:
    """All that a call takes, before the first of them overwrites anything."""
    launches = []
    for first, (logits, *gradient) in row_blocks(*([x] if d is None else [x, d])):
        launch = _Launch.of(logits, gradient[0] if gradient else None, with_entropy, unroll)
        _module("config").check_rows(launch.n_rows, launch.pieces())
        launches.append((first, launch))
    return launches


def _row_inputs(rows: KernelRows, first: int) -> dict[str, Any]:
    per_row = int(rows.temperature.numel() > 1)
    return {
        "token_ids_ptr": rows_from(rows.token_ids, first),
        "weights_ptr": rows_from(rows.weights, first),
        "temperature_ptr": rows_from(rows.temperature, first * per_row),
        "temperature_stride": per_row,
    }


def _absent(rows: KernelRows) -> float:
    """Stands for the logit of a token outside [0, V)."""
    return -math.inf if rows.sharded else math.nan


def _softcap(rows: KernelRows) -> float | None:
    return rows.softcap or None


def _token_columns(terms: KernelTerms, first: int) -> dict[str, Tensor | None]:
    inputs = terms.inputs
    if not terms.settings.kl_coef:
        inputs = inputs._replace(ref_logps=None)
    return {f"{name}_ptr": rows_from(x, first) for name, x in inputs._asdict().items()}


# Shape's numbers from here on are called p0 ... p7 in the kernel: they are the objective's own.
_FIRST_OF_ITS_OWN = Shape._fields.index("below_positive")


def _objective(settings: LossSettings) -> dict[str, Any]:
    objective, shape = _module("objective"), settings.shape
    shared = {name: getattr(shape, name) for name in Shape._fields[1:_FIRST_OF_ITS_OWN]}
    own = {f"p{i}": number for i, number in enumerate(shape[_FIRST_OF_ITS_OWN:])}
    estimator = objective.KL_ESTIMATORS[settings.kl_estimator] if settings.kl_coef else None
    return {
        **shared,
        **own,
        "kl_coef": settings.kl_coef,
        "entropy_coef": settings.entropy_coef,
        "OBJECTIVE": objective.OBJECTIVES.get(shape.kind) or function_of(shape.kind),
        "KL": estimator,
        "KL_RATIO_WEIGHTED": settings.kl_coef != 0 and settings.kl_ratio_weighted,
    }


def _partials(launch: _Launch, inputs: dict[str, Any], rows: KernelRows) -> Tensor | None:
    """Stage 1 by a program a segment, where rows are so few that whole ones would leave most of
    the GPU idle."""
    if not launch.is_split():
        return None
    n_rows, segments = launch.n_rows, launch.segments()
    kernels = _module("kernels")
    each = (kernels.NUMBERS_WITH_ENTROPY if launch.with_entropy else kernels.NUMBERS).value
    partials = launch.logits.tensor.new_empty((n_rows, each * segments + 1), dtype=torch.float64)
    kernels.sum_segments_kernel[(n_rows * segments,)](
        launch.logits.tensor,
        partials,
        **inputs,
        **launch.rows(),
        absent=_absent(rows),
        softcap=_softcap(rows),
        WITH_ENTROPY=launch.with_entropy,
        **launch.loops(),
        **launch.constants(),
    )
    return partials


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


class TritonBackend:
    """See ``base.Backend``.

    Args:
        unroll: steps of a loop over columns that are compiled as one. The bits are the same.
    """

    def __init__(self, unroll: int = 1) -> None:
        self.unroll = unroll

    def policy_loss(
        self,
        rows: KernelRows,
        terms: KernelTerms,
        *,
        loss: Tensor,
        logps: Tensor,
        entropy: Tensor | None,
        dlogits: Tensor | None,
    ) -> None:
        rows.check_whole()
        kernel = _module("kernels").policy_loss_kernel
        settings = terms.settings
        with_entropy = entropy is not None or settings.needs_entropy
        for first, launch in _launches(
            rows.logits, dlogits, with_entropy=with_entropy, unroll=self.unroll
        ):
            inputs = _row_inputs(rows, first)
            with _on(launch.logits.tensor.device):
                partials = _partials(launch, inputs, rows)
                pieces = 1
                if partials is not None and launch.dlogits is not None:
                    pieces = launch.pieces()
                programs = launch.row_programs() if partials is None else launch.n_rows * pieces
                kernel[(programs,)](
                    launch.logits.tensor,
                    launch.dlogits.tensor if launch.dlogits else None,
                    partials,
                    **inputs,
                    **_token_columns(terms, first),
                    grad_scale_ptr=terms.grad_scale,
                    loss_ptr=rows_from(loss, first),
                    logps_ptr=rows_from(logps, first),
                    entropy_ptr=rows_from(entropy, first),
                    **launch.rows(),
                    **launch.gradient_rows(),
                    n_pieces=pieces,
                    **_objective(settings),
                    softcap=_softcap(rows),
                    WITH_ENTROPY=with_entropy,
                    **launch.loops(),
                    **launch.constants(),
                )

    def token_logps(
        self, rows: KernelRows, *, logps: Tensor, lse: Tensor, entropy: Tensor | None
    ) -> None:
        for first, launch in _launches(
            rows.logits, with_entropy=entropy is not None, unroll=self.unroll
        ):
            inputs = _row_inputs(rows, first)
            with _on(launch.logits.tensor.device):
                partials = _partials(launch, inputs, rows)
                programs = launch.n_rows if partials is not None else launch.row_programs()
                _module("kernels").token_logps_kernel[(programs,)](
                    launch.logits.tensor,
                    partials,
                    **inputs,
                    logps_ptr=rows_from(logps, first),
                    lse_ptr=rows_from(lse, first),
                    entropy_ptr=rows_from(entropy, first),
                    **launch.rows(),
                    absent=_absent(rows),
                    softcap=_softcap(rows),
                    WITH_ENTROPY=entropy is not None,
                    **launch.loops(),
                    **launch.constants(),
                )

    def token_logps_backward(
        self,
        rows: KernelRows,
        *,
        lse: Tensor,
        entropy: Tensor | None,
        dlogps: Tensor | None,
        dentropy: Tensor | None,
        dlogits: Tensor,
    ) -> None:
        for first, launch in _launches(
            rows.logits, dlogits, with_entropy=dentropy is not None, unroll=self.unroll
        ):
            pieces = launch.pieces()
            with _on(launch.logits.tensor.device):
                _module("kernels").token_logps_backward_kernel[(launch.n_rows * pieces,)](
                    launch.logits.tensor,
                    launch.dlogits.tensor if launch.dlogits else None,
                    **_row_inputs(rows, first),
                    lse_ptr=rows_from(lse, first),
                    entropy_ptr=rows_from(entropy, first) if dentropy is not None else None,
                    dlogps_ptr=rows_from(dlogps, first),
                    dentropy_ptr=rows_from(dentropy, first),
                    **launch.rows(),
                    **launch.gradient_rows(),
                    n_pieces=pieces,
                    softcap=_softcap(rows),
                    **launch.loops(),
                    **launch.constants(),
                )

    def multiply_rows(self, x: Tensor, factors: Tensor) -> None:
        factors = factors.expand(x.shape[:-1].numel()).contiguous()
        for first, launch in _launches(x):
            with _on(x.device):
                _module("kernels").multiply_rows_kernel[(launch.row_programs(),)](
                    launch.logits.tensor,
                    rows_from(factors, first),
                    **launch.rows(),
                    **launch.constants(),
                )


TRITON = TritonBackend()
TRITON_UNROLLED = TritonBackend(unroll=2)
