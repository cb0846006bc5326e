"""Logits or log-probs, and what every entry point has beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plain import filled, saveable
from . import values
from .errors import type_error
from .scalars import check_flag, positive_number, scalar_tensor
from .tensors import active_rows, check_tensor, flat, per_token
from .types import Logps, PerToken, Rows, wide

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A row with |logit| / T above 1.4e9 is NaN: from the lowest temperature on, logits up to 1400 are
# never that. The highest keeps 1 / T and logits / T well inside float32.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e30
TEMPERATURES = f"from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"


def check_rows(
    logits: object,
    token_ids: object,
    *,
    mask: object,
    temperature: object,
    inplace: bool,
    takes_float64: bool,
) -> Rows:
    """The checks that all entry points share."""
    checked = _logits(logits, takes_float64)
    ids = _token_ids(token_ids, checked)
    kept = None if mask is None else active_rows(mask, PerToken("logits", checked))
    rows = Rows("logits", checked, ids, _temperature(temperature, checked, kept), kept)
    if check_flag("inplace", inplace) and _rows_overlap(checked):
        raise ValueError(
            "inplace=True needs rows that do not overlap in memory, got logits of shape "
            f"{tuple(checked.shape)} with strides {checked.stride()}"
        )
    return rows


def check_hidden_rows(
    hidden: Tensor,
    token_ids: object,
    *,
    mask: object,
    temperature: object,
    logit_scale: float,
) -> Rows:
    """The same from hidden states (..., H), which were checked before, as was the scale of the
    logits: the rows' temperature is that of logits before it.
    """
    ids = _token_ids(token_ids, hidden, "hidden", "H")
    active = active_rows(mask, PerToken("hidden", hidden))
    divisor = _temperature(temperature, hidden, active, logit_scale)
    return Rows("hidden", hidden, ids, divisor, active)


def check_logps(logps: object, *, entropy: object | None, mask: object) -> Logps:
    """The checks of the entry points that take log-probs."""
    accepted = "a floating-point tensor of shape (...)"
    if not isinstance(logps, Tensor) or not logps.is_floating_point():
        raise type_error("logps", logps, accepted)
    if logps.layout != torch.strided:
        raise TypeError(f"logps must be {accepted}, got one of layout {logps.layout}")
    tokens = PerToken("logps", logps)
    return Logps(
        "logps",
        logps,
        per_token("logps", logps, tokens),
        None if entropy is None else per_token("entropy", entropy, tokens),
        active_rows(mask, tokens),
    )


def _logits(logits: object, takes_float64: bool) -> Tensor:
    accepted = "a float32, bfloat16 or float16 tensor of shape (..., V)"
    if not isinstance(logits, Tensor):
        raise type_error("logits", logits, accepted)
    if logits.dtype == torch.float64:
        if not takes_float64:
            raise TypeError(f"logits must be {accepted}; float64 needs backend='reference'")
    elif logits.dtype not in KERNEL_DTYPES:
        raise type_error("logits", logits, accepted)
    if logits.layout != torch.strided:
        raise TypeError(f"logits must be {accepted}, got one of layout {logits.layout}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have shape (..., V) with V >= 1, got shape {tuple(logits.shape)}"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            "logits must have stride 1 in the last dimension (leading ones are free), "
            f"got strides {logits.stride()}; call .contiguous() first"
        )
    return logits


def _token_ids(token_ids: object, like: Tensor, name: str = "logits", columns: str = "V") -> Tensor:
    ids = check_tensor("token_ids", token_ids, like, "an int64 or int32 tensor", name)
    if ids.dtype not in (torch.int64, torch.int32):
        raise type_error("token_ids", ids, "an int64 or int32 tensor")
    if ids.shape != like.shape[:-1]:
        source = "hidden" if name == "hidden" else "the logits"
        raise ValueError(
            f"token_ids must have the shape of {source} without {columns}, "
            f"{tuple(like.shape[:-1])}, got {tuple(ids.shape)}"
        )
    return flat(ids, torch.int64)


def _temperature(
    value: object, logits: Tensor, mask: Tensor | None, logit_scale: float = 1.0
) -> Tensor:
    """(1,) or (N,): over the scale of the logits, which kernels divide by it. Both are in range."""
    shape = logits.shape[:-1]
    dtype = wide(logits.dtype)
    if not isinstance(value, Tensor):
        number = positive_number("temperature", value)
        for scale in (1.0, logit_scale):
            if not MIN_TEMPERATURE <= number / scale <= MAX_TEMPERATURE:
                raise ValueError(_out_of_range(number, scale))
        found = filled(1, number, dtype, logits.device)
        return found if logit_scale == 1.0 else found / logit_scale
    if value.dim() == 0:
        value = scalar_tensor("temperature", value, logits).reshape(1)
    elif not value.is_floating_point():
        raise type_error("temperature", value, "a number or a floating-point tensor")
    elif value.shape != shape:
        raise ValueError(
            f"temperature must be a number or have the shape of token_ids, {tuple(shape)}, "
            f"got {tuple(value.shape)}"
        )
    else:
        check_tensor("temperature", value, logits, "a floating-point tensor")
    temperature = flat(saveable(value).detach(), dtype)
    by_scale = {1.0: temperature}
    if logit_scale != 1.0:
        by_scale[logit_scale] = temperature / logit_scale
    if values.can_be_checked(temperature):
        for scale, found in by_scale.items():
            wrong = ~((found >= MIN_TEMPERATURE) & (found <= MAX_TEMPERATURE))
            wrong = wrong.expand(shape.numel()) if mask is None else wrong & mask
            if wrong.any():
                position, got = values.first_wrong(wrong, temperature.expand(wrong.shape), shape)
                raise ValueError(f"{_out_of_range(got, scale)} at {position}")
    return by_scale[logit_scale]


def _out_of_range(temperature: float, logit_scale: float) -> str:
    if logit_scale == 1.0:
        return f"temperature must be {TEMPERATURES}, got {temperature}"
    return (
        f"temperature / logit_scale must be {TEMPERATURES}, "
        f"got {temperature:g} / {logit_scale:g} = {temperature / logit_scale:g}"
    )


def _rows_overlap(x: Tensor) -> bool:
    reach = x.shape[-1]
    for stride, size in sorted(zip(x.stride()[:-1], x.shape[:-1], strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False
