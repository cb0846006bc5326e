"""Operations of Triton's interpreter, mended: see interpreter.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
FLOATS = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
# These move bits and never look at them, or are mended here.
BF16_OPERATIONS = """
    load store masked_load masked_store tensor_pointer_load tensor_pointer_store descriptor_load
    descriptor_store addptr bitcast fp_to_fp si_to_fp ui_to_fp fp_to_si fp_to_ui fp_ext fp_trunc
    reshape trans expand_dims broadcast cat join split splat unsplat select gather fabs print
"""


def round_to_bf16(x: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits of float32 values rounded to nearest even; NaN gives PTX's canonical 0x7FFF."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16)).reshape(np.shape(x))


def widen_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


exp2_error = 0.0  # see interpreter.exp2_off_by


def fma(x: NDArray[Any], y: NDArray[Any], z: NDArray[Any]) -> NDArray[Any]:
    """x y + z of float32 or float16, rounded once.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond 2008),
    so that rounding it again to the narrow type gives the correctly rounded result.
    """
    if z.dtype == np.float64:
        raise NotImplementedError("fma of float64")
    product, z64 = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + z64
    back = total - product
    error = (product - (total - back)) + (z64 - back)
    even = total.view(np.uint64) & np.uint64(1) == 0
    towards = np.nextafter(total, np.copysign(np.inf, error))
    adjust = np.isfinite(total) & (error != 0) & even
    return np.where(adjust, towards, total).astype(z.dtype)


def exp2(x: NDArray[Any]) -> NDArray[Any]:
    y = np.exp2(x) * x.dtype.type(1 - exp2_error)
    flush = (x.dtype == np.float32) & (y < np.finfo(np.float32).tiny)
    return np.where(flush, y.dtype.type(0), y)


def exp(x: NDArray[Any]) -> NDArray[Any]:
    return np.exp2(x * np.float32(1.4426950408889634)) if x.dtype == np.float32 else np.exp(x)


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """owner.name = make(owner.name); a Triton without that name is one nobody has looked at."""
    if not hasattr(owner, name):
        raise RuntimeError(f"Triton {triton.__version__}'s interpreter has no {owner}.{name}")
    setattr(owner, name, make(getattr(owner, name)))


def _cast(original: Any) -> Any:
    def cast_impl(self: Any, src: Handle, dst_type: tl.dtype) -> Handle:
        data, dst = src.data, dst_type.scalar
        if src.dtype.scalar == tl.bfloat16:
            data = widen_bf16(data)
        if dst == tl.bfloat16:
            return Handle(round_to_bf16(data.astype(np.float32)), dst)
        return Handle(data.astype(interpreter._get_np_dtype(dst)), dst)

    return cast_impl


def _fp_to_fp(original: Any) -> Any:
    nearest = interpreter._ir.ROUNDING_MODE.RTNE

    def create_fp_to_fp(self: Any, src: Handle, dst_type: tl.dtype, rounding: Any) -> Handle:
        if src.dtype.scalar not in FLOATS or dst_type.scalar not in FLOATS:
            return original(self, src, dst_type, rounding)
        if rounding is not None and rounding != nearest:
            raise NotImplementedError(f"rounding {rounding} is not interpreted correctly")
        return self.cast_impl(src, dst_type)

    return create_fp_to_fp


def _refuse_bf16(name: str) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def refusing(self: Any, *args: Any) -> Any:
            for arg in args:
                if isinstance(arg, Handle) and arg.dtype.scalar == tl.bfloat16:
                    raise TypeError(f"{name} of bfloat16: convert to float32 first")
            return original(self, *args)

        return refusing

    return make


def _load(original: Any) -> Any:
    def load(self: Any, ptr: Any, mask: Any, other: Any, *rest: Any) -> Any:
        # Triton asks `if other`, and a scalar tensor of 0 is false in the interpreter.
        self.builder.other_given = other is not None
        try:
            return original(self, ptr, mask, other, *rest)
        finally:
            self.builder.other_given = True

    return load


def _masked_load(original: Any) -> Any:
    def create_masked_load(self: Any, ptrs: Handle, mask: Handle, other: Any, *rest: Any) -> Handle:
        if other is None and not (self.other_given or mask.data.all()):
            dtype = ptrs.get_element_ty()
            kind = interpreter._get_np_dtype(dtype)
            nan = 0x7FFF if dtype == tl.bfloat16 else np.nan
            poison = nan if dtype.is_floating() else 0x5A
            other = Handle(np.full(ptrs.data.shape, poison, kind), dtype)
        return original(self, ptrs, mask, other, *rest)

    return create_masked_load


def _clamp(original: Any) -> Any:
    everything = interpreter._ir.PROPAGATE_NAN.ALL

    def create_clampf(self: Any, x: Handle, low: Handle, high: Handle, propagate: Any) -> Handle:
        if propagate == everything:
            return original(self, x, low, high, propagate)
        return Handle(np.fmin(np.fmax(x.data, low.data), high.data), x.dtype.scalar)

    return create_clampf


def _check_tensor(original: Any) -> Any:
    def check_tensor(self: Any, inputs: tuple[Any, ...]) -> None:
        original(self, inputs)
        if any(x.dtype == tl.bfloat16 for x in inputs):
            raise TypeError("reduction or scan of bfloat16: convert to float32 first")

    return check_tensor


def _reduce(original: Any) -> Any:
    def generic_reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        rank, axis = inputs[0].handle.data.ndim, self.axis
        arrays = [x.handle.data for x in inputs]
        if axis is None:
            axis, arrays = 0, [a.reshape(-1) for a in arrays]
        combine = self.combine_fn.rewrite()
        while (n := arrays[0].shape[axis]) > 1:
            halves = [np.split(a, [n // 2], axis) for a in arrays]
            pairs = [
                self.to_tensor(half[side], x.dtype)
                for side in (0, 1)
                for half, x in zip(halves, inputs, strict=True)
            ]
            combined = combine(*pairs)
            combined = combined if isinstance(combined, tuple | tl.tuple) else (combined,)
            arrays = [x.handle.data for x in combined]
        if self.keep_dims:
            shape = [1] * rank if self.axis is None else arrays[0].shape
            arrays = [a.reshape(shape) for a in arrays]
        else:
            arrays = [a.squeeze(axis) for a in arrays]
        return [
            self.to_tensor(a if a.ndim else a.item(), x.dtype)
            for a, x in zip(arrays, inputs, strict=True)
        ]

    return generic_reduce


def _sanitize_overflow(original: Any) -> Any:
    """As Triton's, by one operation of NumPy instead of a dozen of the interpreter."""
    operations: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def sanitize(self: Any, lhs: tl.tensor, rhs: tl.tensor, operation: Callable[..., Any]) -> None:
        dtype = lhs.type.scalar
        if dtype.int_bitwidth >= 64:
            return
        wide = (x.handle.data.astype(np.int64) for x in (lhs, rhs))
        result = operations[operation.__name__](*wide)
        low, high = dtype.get_int_min_value(), dtype.get_int_max_value()
        assert low <= result.min() and result.max() <= high, (
            f"int{dtype.int_bitwidth} overflow detected for operation {operation.__name__}"
        )

    return sanitize


def mend_operations() -> None:
    builder = interpreter.InterpreterBuilder
    replace(builder, "cast_impl", _cast)
    replace(builder, "create_fp_to_fp", _fp_to_fp)
    replace(builder, "create_masked_load", _masked_load)
    replace(interpreter.TritonSemantic, "load", _load)
    replace(interpreter.TritonSemantic, "binary_op_sanitize_overflow_impl", _sanitize_overflow)
    replace(builder, "create_clampf", _clamp)
    for name, function in {"maxnumf": np.fmax, "minnumf": np.fmin}.items():
        replace(
            builder,
            f"create_{name}",
            lambda _, f=function: lambda self, lhs, rhs: self.binary_op(lhs, rhs, f),
        )
    for name, function in {"exp": exp, "exp2": exp2}.items():
        replace(
            builder,
            f"create_{name}",
            lambda _, f=function: lambda self, arg: self.unary_op(arg, f),
        )
    replace(
        builder,
        "create_fma",
        lambda _: lambda self, x, y, z: Handle(fma(x.data, y.data, z.data), z.dtype.scalar),
    )
    builder.other_given = True  # of descriptors, whose padding is zero
    builder.get_bf16 = lambda self, value: Handle(
        round_to_bf16(np.array([value], np.float32)), tl.bfloat16
    )
    for name in dir(builder):
        operation = name.removeprefix("create_")
        if operation != name and operation not in BF16_OPERATIONS.split():
            replace(builder, name, _refuse_bf16(operation))
    replace(interpreter.ReduceScanOpInterface, "check_tensor", _check_tensor)
    replace(interpreter.ReduceOps, "generic_reduce", _reduce)
    options = interpreter.interpreter_builder.options
    assert options.sanitize_overflow
    interpreter.interpreter_builder.options = dataclasses.replace(options, debug=True)
