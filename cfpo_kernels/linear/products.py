"""Matrix products that are summed in float32, whatever the operands' dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies matrices of this dtype about as fast as the device could.

    On a CPU without instructions for bfloat16 such a product can take 60 times as long as one in
    float32.
    """
    if device.type != "cpu" or dtype in (torch.float32, torch.float64):
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    known = getattr(torch.ops.mkldnn, name[dtype], None)
    return known is not None and bool(known())


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of this dtype can be written in float32, as torch does from 2.8 on."""
    known = hasattr(torch.ops.aten.mm, "dtype_out")
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and known


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in."""
    return torch.promote_types(dtype, torch.float32)


def operand_dtype(given: torch.dtype, out: torch.dtype, device: torch.device) -> torch.dtype:
    """What operands of dtype `given` have to be for a fast product into `out`."""
    if (given == out and is_fast(given, device)) or (out == wide(out) and widens(given, device)):
        return given
    return wide(given)


def can_write(operands: torch.dtype, out: torch.dtype) -> bool:
    """Whether :func:`product` writes into `out` itself, rather than copy a product there."""
    return out in (operands, wide(operands))


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; the operands' dtype is from :func:`operand_dtype`."""
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif out.dtype == wide(a.dtype):
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of the operands; None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
