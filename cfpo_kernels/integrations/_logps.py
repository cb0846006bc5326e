"""What the trainers call log_probs_from_logits, over token_logps, and how to put it in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..api import token_logps


def logps_of_labels(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, inplace: bool = False
) -> Tensor:
    """log p of the labels (...), float32, from logits (..., V) of any dtype.

    `inplace` lets backward overwrite the logits, where a backend has kernels for them.
    """
    logps = token_logps(logits, labels, temperature=temperature, inplace=inplace)
    assert isinstance(logps, Tensor)
    return logps


def entropy_of_rows(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The entropy (...) of each row of logits (..., V), float32."""
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logps(logits, any_token, temperature=temperature, return_entropy=True)[1]


def replace_everywhere(home: Any, replacements: Mapping[str, Callable[..., Any]]) -> None:
    """Replaces names of the module `home`, there and wherever its package has imported them."""
    package = home.__name__.split(".")[0] + "."
    originals = {name: getattr(home, name) for name in replacements}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(package):
            for name, replacement in replacements.items():
                if getattr(module, name, None) is originals[name]:
                    setattr(module, name, replacement)
