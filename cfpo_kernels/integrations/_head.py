"""Numbers computed in the place of a model's head, from its hidden states, inside the model's call.

There wrappers that shard or offload weights (DDP, FSDP, ZeRO-3) have the head's ready, and what
they hang on the head's and the model's outputs sees the gradient pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..linear.module import forward_of

# What configs call that by which models multiply their logits after the head, and divide them.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISOR = "logits_scaling"  # HyperCLOVA X multiplies by it


class AfterHead(NamedTuple):
    """What a model does to the logits that its head returns: ``cap * tanh(scale * z / cap)``."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def after_head(model: Any) -> AfterHead:
    """As the model's config has it; :func:`run_in_head` finds out whether it is true."""
    config = model.config.get_text_config()

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return None if value is None else float(value)

    scales = [x for x in map(number, FACTORS) if x is not None]
    divisor = number(DIVISOR)
    if not scales and divisor:
        scales = [divisor if config.model_type == "hyperclovax" else 1 / divisor]
    return AfterHead(scales[0] if scales else 1.0, number("final_logit_softcapping"))


def replaceable_head(model: Any, *, own_forward: bool = False) -> nn.Linear | None:
    """The model's head where it is a linear layer of its own weight, without an adapter.

    Args:
        own_forward: the instance may have a forward of its own, which is known.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    # accelerate's hook, a forward of the instance, moves the head between devices.
    known = "forward" not in vars(head) or (own_forward and not hasattr(head, "_hf_hook"))
    return head if known and after_head(model).scale > 0 else None


class HeadOutputChangedError(RuntimeError):
    """The model does to the logits what its config does not say, or calls its head twice."""


def run_in_head(
    run: Callable[[], Any], head: nn.Linear, after: AfterHead, function: Callable[[Tensor], Tensor]
) -> tuple[Any, Tensor | None]:
    """Calls the model with ``function(hidden)`` in the place of the head.

    Args:
        run: calls the model and returns its outputs, with the logits as an item.
        function: float32 of any shape from the hidden states that the head is given.

    Returns:
        The outputs, whose logits mean nothing, and what the function returned, with a gradient that
        comes through the outputs. None: the model does not call its head as a module, and its
        outputs hold the logits.

    Raises:
        HeadOutputChangedError: see there.
    """
    found: list[Tensor] = []
    # Whoever drops or sets some columns, or does another thing to them than `after`, is noticed.
    far = 1e4 if after.softcap is None else 3 * after.softcap / after.scale
    probes = torch.linspace(-far, far, head.out_features, dtype=torch.float32, device="cpu")

    def in_place(hidden: Tensor) -> Tensor:
        found.append(function(hidden))
        carried = _Carried.apply(found[-1], head.out_features)
        return torch.cat([probes.to(carried)[None], carried])[None]

    with forward_of(head, in_place):
        outputs = run()
    if not found:
        return outputs, None
    values, logits = found[0], outputs["logits"]
    rows = 1 + -(-values.numel() // head.out_features)
    if (
        len(found) > 1
        or logits.shape != (1, rows, head.out_features)
        or logits.dtype != torch.float32
        or logits[0, 1:].any()
        or not torch.allclose(logits[0, 0], after(probes.to(logits)), rtol=1e-5, atol=1e-5)
    ):
        raise HeadOutputChangedError
    # What carries the gradient is 0, before and after, and was scaled.
    carried = logits[0, 1:].flatten()[: values.numel()].view(values.shape)
    return outputs, values.detach() + carried / after.scale


class _Carried(torch.autograd.Function):
    """Rows of zeros, whose gradient is that of the values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, width: int) -> Tensor:
        ctx.shape = values.shape
        return values.new_zeros(-(-values.numel() // width), width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.flatten()[: ctx.shape.numel()].view(ctx.shape), None
