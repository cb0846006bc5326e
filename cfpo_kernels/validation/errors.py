"""How a refusal is worded: the argument, what is accepted, what came."""

from __future__ import annotations

from torch import Tensor

from .types import PerToken


def type_error(name: str, got: object, accepted: str) -> TypeError:
    described = f"a tensor of {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
    return TypeError(f"{name} must be {accepted}, got {described}")


def shape_error(name: str, got: Tensor, tokens: PerToken, also: str = "") -> ValueError:
    like = "token_ids" if tokens.columns else tokens.name
    return ValueError(
        f"{name} must have the shape of {like}, {tuple(tokens.shape)}{also}, got {tuple(got.shape)}"
    )
