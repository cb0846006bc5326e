"""A linear head and the loss of its logits, in chunks of tokens: few logits exist at a time.

The loss gives the gradient of the logits in forward, so each chunk's gradients with respect to the
hidden states and the weight are taken there too, and no chunk is projected again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# logits (n, V) of the tokens in a slice -> (their part of the loss, and (n,) each: logps, entropy)
SLICE = 8192  # rows of the weight's gradient
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]


def chunked_head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, loss_of: ChunkLoss, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """sum of ``loss_of(hidden[rows] @ weight.T + bias, rows)`` over slices of `chunk` tokens.

    Args:
        hidden: (N, H); weight: (V, H); bias: (V,) or None. All differentiable. Under autocast the
            product is in autocast's dtype.
        loss_of: is given logits of its own, which it may overwrite.

    Returns:
        The 0-d float32 loss; logps and entropy, (N,), detached.

    Memory: chunk x V logits; with a gradient also one of hidden and one of weight, kept until
    backward. That of weight is a float32 sum while there are several chunks.
    """
    if not torch.is_grad_enabled():  # which the function itself cannot see
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    loss, logps, entropy = _ChunkedHead.apply(hidden, weight, bias, loss_of, chunk)
    return loss, logps, entropy


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss_of: ChunkLoss,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, n_rows = hidden.device, hidden.shape[0]
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        x, w = hidden.detach().to(dtype), weight.detach().to(dtype)
        b = None if bias is None else bias.detach().to(dtype)
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        # Of each token, and so complete; the others are sums over the chunks.
        dx = torch.empty_like(x) if needs_x else None
        total_dtype = dtype if n_rows <= chunk else torch.float32
        dw = torch.zeros_like(w, dtype=total_dtype) if needs_w else None
        db = torch.zeros_like(b, dtype=total_dtype) if b is not None and needs_b else None
        needed = needs_x or needs_w or needs_b
        loss = torch.zeros((), device=device)
        logps, entropy = torch.empty(n_rows, device=device), torch.empty(n_rows, device=device)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, n_rows, chunk):
                rows = slice(start, min(start + chunk, n_rows))
                logits = F.linear(x[rows], w, b).requires_grad_(needed)
                with torch.set_grad_enabled(needed):
                    part, logps[rows], entropy[rows] = loss_of(logits, rows)
                loss += part.detach()
                if not needed:
                    continue
                (dlogits,) = torch.autograd.grad(part, logits)
                if dx is not None:
                    torch.mm(dlogits, w, out=dx[rows])
                if dw is not None:
                    _add_products(dw, dlogits.t(), x[rows])
                if db is not None:
                    db += dlogits.sum(0, dtype=db.dtype)
        ctx.save_for_backward(
            None if dx is None else dx.to(hidden.dtype),
            None if dw is None else dw.to(weight.dtype),
            None if db is None or bias is None else db.to(bias.dtype),
        )
        ctx.mark_non_differentiable(logps, entropy)
        return loss, logps, entropy

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # In place: autograd then refuses a second backward, which would scale them twice.
        return *(None if g is None else g.mul_(dloss) for g in ctx.saved_tensors), None, None


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for a lower dtype in slices, so that the products take little memory."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    for start in range(0, total.shape[0], SLICE):
        rows = slice(start, start + SLICE)
        total[rows] += a[rows] @ b
