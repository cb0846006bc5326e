"""What checked arguments are passed on as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..inputs import LossSettings, Region, TokenInputs
from ..objectives import Objective
from ..two_pass import Beyond, TokenTerms

AnyObjective = Objective | Callable[[TokenTerms], Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of numbers made of floating-point ones: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_COLUMNS = {"logits": "V", "hidden": "H"}


@dataclass
class PerToken:
    """The tensor whose shape, dtype and device the per-token arguments must have; N tokens."""

    name: str  # of `source`: "logits", (..., V), "hidden", (..., H), or "logps", (...)
    source: Tensor
    shape: torch.Size = field(init=False)  # of the tokens
    # Of per-token numbers: float32, or float64 where the reference runs in it.
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.shape = self.source.shape[:-1] if self.columns else self.source.shape
        self.dtype = wide(self.source.dtype)

    @property
    def columns(self) -> str:
        """What the last dimension of the source is, which the tokens do not have."""
        return _COLUMNS.get(self.name, "")

    def shape_of(self, dimensions: str) -> str:
        """How the source's shape is written, from that of the tokens: "(B, T)", "(N,)"."""
        if not self.columns:
            return dimensions
        return f"{dimensions.rstrip(',)')}, {self.columns})"


@dataclass
class Rows(PerToken):
    """The arguments that every entry point with logits or hidden states has.

    The source stays as it came: (..., V) or (..., H), any leading strides. The rest is contiguous.
    """

    token_ids: Tensor  # (N,) int64
    temperature: Tensor  # (N,) or (1,)
    mask: Tensor | None  # (N,) bool; None: all

    @property
    def active(self) -> Tensor:
        """(N,) bool, the rows that count; made at each call where there is no mask."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.shape.numel(), dtype=torch.bool, device=self.source.device)

    @property
    def logits(self) -> Tensor:
        return self.source


@dataclass
class Logps(PerToken):
    """The differentiable arguments where the log-probs exist already, (N,) in ``dtype``."""

    logps: Tensor
    entropy: Tensor | None
    active: Tensor  # (N,) bool


@dataclass
class LossTerms:
    """What the loss needs beside the rows; tensors are (N,), detached, in ``PerToken.dtype``."""

    weights: Tensor
    inputs: TokenInputs
    settings: LossSettings
    region: Region | None  # bounds on log r, which statistics hold it against
    beyond: Beyond
    grad_scale: Tensor | None  # 0-d float32
