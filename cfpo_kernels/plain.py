"""Calls that torch does not have to see, and what may be kept between them."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call is eager, with no mode or transform of torch around it that is to see it, and
    its tensors are what they seem: numbers in memory."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for x in tensors:
        # Fake tensors are a subclass; some tensors are negative, or zero, by a flag alone.
        if x is not None and (
            type(x) not in _PLAIN or x.is_meta or x.is_neg() or x._is_zerotensor()
        ):
            return False
    return True


def saveable(x: Tensor) -> Tensor:
    """As autograd may save it: outside of inference mode a tensor that was made there is copied."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


_MOST_KEPT = 64
_LONGEST_KEPT = 4096
_kept: dict[tuple[int, float, torch.dtype], Tensor] = {}


def filled(n: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,) of one number, to be read only.

    Those of a CPU that are short are kept, some of them: a fill takes as long as the checks of an
    argument. On a GPU another stream, or a graph, would have to know when the fill is done.
    """
    if device.type != "cpu" or not is_plain() or n > _LONGEST_KEPT:
        return torch.full((n,), value, dtype=dtype, device=device)
    key = (n, value, dtype)
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
            found = _kept[key] = torch.full((n,), value, dtype=dtype, device="cpu")
    return found
