"""What torch asks of a function, or forbids, that the kernels could not answer or would not see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_transforms(tensor: Tensor, instead: str) -> None:
    """Refuses forward-mode AD and the transforms of torch.func, which would find a derivative of 0.

    Args:
        instead: who supports them.
    """
    compiling = torch.compiler.is_compiling()
    if forward_ad._current_level >= 0 and (
        # What torch.compile traces has no tangent to look at.
        compiling or forward_ad.unpack_dual(tensor).tangent is not None
    ):
        _refuse("forward-mode AD", instead)
    if (compiling or torch._C._are_functorch_transforms_active()) and _transformed():
        _refuse("a transform of torch.func (grad, vjp, jvp, vmap, ...)", instead)


def _refuse(what: str, instead: str) -> None:
    raise RuntimeError(f"cfpo_kernels: {what} is not supported by the fused kernels; {instead}")


# Called as it is while torch.compile traces, under the transforms that are traced.
@torch.compiler.assume_constant_result
def _transformed() -> bool:
    """Whether a transform that differentiates or batches is active."""
    functionalize = torch._C._functorch.TransformType.Functionalize
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != functionalize for level in levels)


_Made = torch._C._autograd.CreationMeta
_HOW = {
    _Made.MULTI_OUTPUT_NODE: "one of several outputs (split, chunk, unbind, ...)",
    _Made.IN_CUSTOM_FUNCTION: "an output of an autograd.Function, as of a module with a full "
    "backward hook",
    _Made.NO_GRAD_MODE: "a view that was made under no_grad",
    _Made.INFERENCE_MODE: "a view that was made under inference_mode",
}


def refuse_guarded_views(logits: Tensor, *, now: bool) -> None:
    """Refuses views that autograd does not let be overwritten, before they are.

    Args:
        now: before backward; in backward, when their own graph is done with them, those may be
            that autograd has a graph of.
    """
    # A compiled graph overwrites no view: torch copies what it returns back, and looks there.
    if torch.compiler.is_compiling() or not logits._is_view():
        return
    made = torch._C._autograd._get_creation_meta(logits)
    if made == _Made.DEFAULT or not logits._base.requires_grad:  # type: ignore[union-attr]
        return
    if now or made in (_Made.NO_GRAD_MODE, _Made.INFERENCE_MODE):
        raise RuntimeError(
            f"inplace=True: the logits are {_HOW[made]}, and autograd does not let such a view be "
            "overwritten; take a slice in its place (logits[a:b]), or inplace=False"
        )
