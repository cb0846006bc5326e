"""The checks of what a loss from hidden states is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..validation.errors import type_error
from ..validation.rows import KERNEL_DTYPES
from .batch import Parameters
from .products import autocast_dtype

QUANTISED = (
    "a head that is quantised or computed from other parameters has no weight that could be "
    "multiplied here: leave it out of the quantisation (llm_int8_skip_modules=['lm_head'] in "
    "bitsandbytes, a filter_fn in torchao), or pass a dequantised copy"
)
SHARDED = (
    "it is sharded over processes (FSDP): only inside the head's forward is it whole; use "
    "LinearCFPOLoss(head=lm_head), which calls that. A head that is sharded over the vocabulary "
    "(tensor parallel) goes with hidden states that are DTensors of the same mesh, or with "
    "vocab_parallel="
)
EMPTY = (
    "it has no elements, as DeepSpeed's ZeRO-3 leaves it outside the head's forward: use "
    "LinearCFPOLoss(head=lm_head), which calls that, or deepspeed.zero.GatheredParameters"
)


@dataclass(frozen=True)
class Precision:
    """The dtypes of the products' operands, of the logits, and which these are rounded to before a
    softcap."""

    operands: torch.dtype
    logits: torch.dtype
    rounded: torch.dtype


def check_parameters(
    hidden: object, weight: object, bias: object, lora: object, takes_float64: bool
) -> tuple[Parameters, torch.Size]:
    """As matrices, and the shape of the tokens."""
    accepted = "a float32, bfloat16 or float16 tensor of shape (..., H)"
    if not isinstance(hidden, Tensor):
        raise type_error("hidden", hidden, accepted)
    _check_local("hidden", hidden)
    _check_dtype("hidden", hidden, accepted, takes_float64)
    if hidden.layout != torch.strided:
        raise TypeError(f"hidden must be {accepted}, got one of layout {hidden.layout}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"hidden must have shape (..., H) with H >= 1, got shape {tuple(hidden.shape)}"
        )
    checked = check_weight(weight, hidden.device, takes_float64)
    n_cols, size = checked.shape
    if hidden.shape[-1] != size:
        raise ValueError(
            f"hidden must have the weight's H, {size}, as last dimension, "
            f"got shape {tuple(hidden.shape)}"
        )
    rows = hidden.reshape(-1, size)
    one = None if bias is None else _matrix("bias", bias, (n_cols,), hidden.device, takes_float64)
    if lora is None:
        return Parameters(rows, checked, one), hidden.shape[:-1]
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        raise type_error(
            "lora", lora, "a pair (u, B): u = scale * dropout(hidden) A^T (..., r), B (V, r)"
        )
    rank = lora[0].shape[-1] if isinstance(lora[0], Tensor) and lora[0].dim() else 0
    u = _matrix("lora[0]", lora[0], (*hidden.shape[:-1], rank), hidden.device, takes_float64)
    b = _matrix("lora[1]", lora[1], (n_cols, rank), hidden.device, takes_float64)
    return Parameters(rows, checked, one, u.reshape(rows.shape[0], rank), b), hidden.shape[:-1]


def check_weight(weight: object, device: torch.device, takes_float64: bool) -> Tensor:
    accepted = "a float32, bfloat16 or float16 tensor of shape (V, H)"
    if not isinstance(weight, Tensor):
        raise type_error("weight", weight, accepted)
    if is_dtensor(weight):
        raise ValueError(f"weight must be {accepted}, got a DTensor: {SHARDED}")
    if type(weight) not in (Tensor, nn.Parameter, FakeTensor) or not weight.is_floating_point():
        name = f"{type(weight).__name__} of {weight.dtype}"
        raise TypeError(f"weight must be {accepted}, got a {name}: {QUANTISED}")
    if weight.numel() == 0:
        raise ValueError(f"weight must be {accepted}, got shape {tuple(weight.shape)}: {EMPTY}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (V, H), got shape {tuple(weight.shape)}")
    return _matrix("weight", weight, tuple(weight.shape), device, takes_float64)


def _matrix(
    name: str, value: object, shape: tuple[int, ...], device: torch.device, takes_float64: bool
) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise type_error(name, value, "a floating-point tensor")
    _check_local(name, value)
    if value.device != device:
        raise ValueError(f"{name} must be on the device of hidden, {device}, got {value.device}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    accepted = f"a float32, bfloat16 or float16 tensor of shape {shape}"
    _check_dtype(name, value, accepted, takes_float64)
    return value


def _check_dtype(name: str, value: Tensor, accepted: str, takes_float64: bool) -> None:
    """Of what kernels scale the gradient of, or read the product of."""
    if value.dtype in KERNEL_DTYPES or (takes_float64 and value.dtype == torch.float64):
        return
    more = "; float64 needs backend='reference'" if value.dtype == torch.float64 else ""
    raise TypeError(f"{name} must be {accepted}, got a tensor of {value.dtype}{more}")


def _check_local(name: str, value: Tensor) -> None:
    """Of a head whose weight is local; from_dtensors takes the others apart."""
    if is_dtensor(value):
        raise ValueError(
            f"{name} must be a local tensor where the hidden states or the weight is one, "
            "got a DTensor"
        )


def is_dtensor(x: object) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def precision(parameters: Parameters, logits_dtype: object, softcap: bool) -> Precision:
    """What F.linear would multiply in, unless told otherwise.

    Under autocast operands have its dtype, and logits too; with ``logits_dtype=torch.float32``
    operands keep the weight's.
    """
    hidden, weight = parameters.hidden.dtype, parameters.weight.dtype
    autocast = autocast_dtype(parameters.hidden.device)
    wide = torch.promote_types(weight, torch.float32)
    accepted = {weight, wide} if autocast is None else {weight, wide, autocast}
    if logits_dtype is not None and logits_dtype not in accepted:
        raise ValueError(
            "logits_dtype must be None or, for this head, one of "
            f"{', '.join(sorted(map(str, accepted)))}, got {logits_dtype}"
        )
    if autocast is not None and logits_dtype in (None, autocast):
        operands = autocast
    elif hidden == weight or (logits_dtype == wide and weight == wide):
        operands = weight
    else:
        raise TypeError(
            f"hidden must have the weight's dtype, {weight}, outside of autocast, got {hidden}; "
            "logits_dtype=torch.float32 lets a float32 head take it as it is"
        )
    logits: Any = operands if logits_dtype is None else logits_dtype
    if not softcap:
        return Precision(operands, logits, logits)
    # A head in a lower precision adds its bias before it rounds.
    wide = torch.promote_types(operands, torch.float32)
    return Precision(operands, wide, wide if logits_dtype is None else logits)
