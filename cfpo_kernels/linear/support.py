"""Logits of the few tokens that a sampler chose among: no product over the vocabulary is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import refuse_create_graph, save, saved
from ..validation import Rows, values
from ..validation.errors import type_error
from ..validation.tensors import check_tensor
from .batch import Parameters
from .plan import Chunk, in_order
from .products import is_fast, wide, without_autocast

GATHERED_BYTES = 64 << 20  # of the head's rows that are gathered at a time


def check_support(support: object, rows: Rows, n_cols: int) -> Tensor:
    """(N, k) int64, -1 for padding."""
    accepted = "an int64 or int32 tensor of shape (..., k)"
    ids = check_tensor("support", support, rows.source, accepted, rows.name)
    if ids.dtype not in (torch.int64, torch.int32):
        raise type_error("support", ids, accepted)
    if ids.dim() != len(rows.shape) + 1 or ids.shape[:-1] != rows.shape or ids.shape[-1] == 0:
        raise ValueError(
            f"support must have the shape of token_ids and one dimension more, "
            f"{(*rows.shape, 'k')}, got {tuple(ids.shape)}"
        )
    ids = ids.reshape(-1, ids.shape[-1]).to(torch.int64)
    if values.can_be_checked(ids):
        outside = ((ids < -1) | (ids >= n_cols)).any(-1)
        ordered = ids.sort(-1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)
        missing = (ids != rows.token_ids[:, None]).all(-1)
        for wrong, what in (
            (outside, f"hold token ids in [0, {n_cols}), or -1 for padding"),
            (twice, "hold each token id once"),
            (missing, "hold the sampled token"),
        ):
            if (rows.active & wrong).any():
                position, _ = values.first_wrong(rows.active & wrong, rows.token_ids, rows.shape)
                raise ValueError(f"support must {what} where mask is not 0, not so at {position}")
    return ids


def positions(support: Tensor, token_ids: Tensor) -> Tensor:
    """(N,) int64, which of its support's ids each token is; -1 where none."""
    same = support == token_ids[:, None]
    return torch.where(same.any(-1), same.to(torch.int8).argmax(-1), -1)


def support_logits(
    parameters: Parameters, rows: Rows, support: Tensor, dtype: torch.dtype, out: torch.dtype
) -> Tensor:
    """(N, k) of dtype `out` from operands of `dtype`, differentiable; -inf for padding."""
    return _SupportLogits.apply(rows.active, support, dtype, out, *parameters)


class _SupportLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        active: Tensor,
        support: Tensor,
        dtype: torch.dtype,
        out: torch.dtype,
        *given: Tensor | None,
    ) -> Tensor:
        parameters = Parameters(*given)  # type: ignore[arg-type]
        save(ctx, active, support, *given)
        ctx.dtype = dtype
        logits = parameters.hidden.new_empty(support.shape, dtype=out)
        with without_autocast(logits.device):
            for chunk, ids, padded in _chunks(parameters, active, support):
                z: Tensor | float = 0.0
                for x, weight, *_ in _factors(parameters, parameters):
                    operand, gathered = _operands(x, weight, chunk, ids, active, dtype, out)
                    z = z + torch.bmm(gathered, operand[:, :, None])[:, :, 0]
                if parameters.bias is not None:
                    z = z + parameters.bias[ids]
                assert isinstance(z, Tensor)
                chunk.write(logits, z.masked_fill(padded, -torch.inf))
        return logits

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        active, support, *given = saved(ctx)
        parameters, needs = Parameters(*given), Parameters(*ctx.needs_input_grad[4:])

        def new(x: Tensor | None, needed: object) -> Tensor | None:
            if x is None or not needed:
                return None
            return torch.zeros_like(x, dtype=wide(x.dtype))

        sums = Parameters(*map(new, parameters, needs))  # type: ignore[arg-type]
        with without_autocast(dlogits.device):
            for chunk, ids, padded in _chunks(parameters, active, support):
                dz = chunk.of(dlogits).masked_fill(padded, 0.0).to(wide(ctx.dtype))
                for x, weight, dx, dweight in _factors(parameters, sums):
                    operand, gathered = _operands(
                        x, weight, chunk, ids, active, ctx.dtype, dlogits.dtype
                    )
                    if dx is not None:
                        products = torch.bmm(dz[:, None, :], gathered.to(dz.dtype))[:, 0]
                        chunk.write(dx, products)
                    if dweight is not None:
                        outer = dz[:, :, None] * operand[:, None, :].to(dz.dtype)
                        dweight.index_add_(0, ids.reshape(-1), outer.flatten(0, 1))
                if sums.bias is not None:
                    sums.bias.index_add_(0, ids.reshape(-1), dz.reshape(-1).to(sums.bias.dtype))
        gradients = (
            None if total is None or x is None else total.to(x.dtype)
            for total, x in zip(sums, parameters, strict=True)
        )
        return None, None, None, None, *gradients


def _factors(p: Parameters, gradients: Parameters) -> list[tuple[Any, ...]]:
    """What is multiplied, and the gradients of both; for the head, and for an adapter on it."""
    of_head = (p.hidden, p.weight, gradients.hidden, gradients.weight)
    of_adapter = (p.u, p.lora, gradients.u, gradients.lora)
    return [of_head] if p.u is None else [of_head, of_adapter]


def _chunks(
    parameters: Parameters, active: Tensor, support: Tensor
) -> list[tuple[Chunk, Tensor, Tensor]]:
    """Rows, their ids with 0 for padding, and where that is."""
    n_rows, k = support.shape
    row_bytes = k * parameters.hidden.shape[1] * 4
    found = []
    for chunk in in_order(None, n_rows, max(1, GATHERED_BYTES // row_bytes)):
        ids = chunk.of(support)
        padded = (ids < 0) | (ids >= parameters.weight.shape[0])
        found.append((chunk, torch.where(padded, 0, ids), padded))
    return found


def _operands(
    x: Tensor,
    weight: Tensor,
    chunk: Chunk,
    ids: Tensor,
    active: Tensor,
    dtype: torch.dtype,
    out: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(m, k) hidden states, 0 where masked, and (m, ids, k) rows of the weight.

    Rounded to `dtype`, and wider where a product into `out` needs that.
    """
    fast = dtype if out == dtype and is_fast(dtype, x.device) else wide(dtype)
    operand = torch.where(chunk.of(active)[:, None], chunk.of(x), 0)
    return operand.to(dtype).to(fast), weight[ids].to(dtype).to(fast)
