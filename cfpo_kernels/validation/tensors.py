"""One tensor: its dtype, device and shape, held against those of the logits or log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plain import saveable
from .errors import shape_error, type_error
from .types import PerToken, wide


def check_tensor(
    name: str, value: object, like: Tensor, accepted: str, like_name: str = "logits"
) -> Tensor:
    """On the device of another one; dtype and shape are the caller's to check."""
    if not isinstance(value, Tensor):
        raise type_error(name, value, accepted)
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of the {like_name}, {like.device}, got {value.device}"
        )
    return value


def per_token(name: str, value: object, tokens: PerToken) -> Tensor:
    """(N,) in the dtype of per-token numbers; differentiable."""
    accepted = "a floating-point tensor"
    tensor = check_tensor(name, value, tokens.source, accepted, tokens.name)
    if not tensor.is_floating_point():
        raise type_error(name, tensor, accepted)
    if tensor.shape != tokens.shape:
        raise shape_error(name, tensor, tokens)
    return flat(tensor, tokens.dtype)


def flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,), contiguous; the tensor itself where it is that."""
    if tensor.dim() != 1:
        tensor = tensor.reshape(-1)
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def active_rows(mask: object, tokens: PerToken) -> Tensor:
    """(N,) bool, where the mask is not 0."""
    if mask is None:
        return torch.ones(tokens.shape.numel(), dtype=torch.bool, device=tokens.source.device)
    accepted = "a bool, integer or float tensor"
    tensor = check_tensor("mask", mask, tokens.source, accepted, tokens.name)
    if tensor.is_complex():
        raise type_error("mask", tensor, accepted)
    if tensor.shape != tokens.shape:
        raise shape_error("mask", tensor, tokens)
    return (tensor.detach() != 0).reshape(-1).contiguous()


def check_advantages(
    value: object, tokens: PerToken, sequence_index: Tensor | None = None, n_sequences: int = 0
) -> tuple[Tensor, bool]:
    """(N,), and whether they came by token."""
    accepted, shape = "a floating-point tensor", tokens.shape
    tensor = check_tensor("advantages", value, tokens.source, accepted, tokens.name)
    packed = len(shape) == 1 and sequence_index is not None
    by_token = tensor.shape == shape
    if len(shape) == 2 and tensor.shape in (shape[:1], (shape[0], 1)):
        tensor = tensor.reshape(-1, 1).expand(shape)
        by_token = False
    elif packed and not by_token and tensor.shape == (n_sequences,):
        tensor = tensor[sequence_index]
    elif not by_token:
        also = f", or one a sequence, ({shape[0]},) or ({shape[0]}, 1)" if len(shape) == 2 else ""
        also = f", or one a sequence, ({n_sequences},)" if packed else also
        raise shape_error("advantages", tensor, tokens, also)
    return per_token("advantages", tensor, tokens).detach(), by_token


def floats(name: str, value: object) -> Tensor:
    """A dense floating-point tensor of any shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise type_error(name, value, "a floating-point tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {value.layout}")
    return saveable(value)


def same_shape(name: str, value: object, like_name: str, like: Tensor) -> Tensor:
    """A floating-point tensor of another one's shape and device, in float64; differentiable."""
    flat = per_token(name, value, PerToken(like_name, like.double()))
    return flat.reshape(like.shape)


def result_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return wide(tensor.dtype)
