"""What a loss costs inside a training update: the fused kernel beside plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from cfpo_kernels import CFPO, PPOClip
from cfpo_kernels.formula import policy_term


@dataclass
class LossTime:
    """Medians over the repetitions, in milliseconds."""

    loss_ms: float  # loss and its gradient with respect to the logits
    update_ms: float  # forward pass, loss, backward pass, optimizer step

    @property
    def share(self) -> float:
        """The loss's part of the update."""
        return self.loss_ms / self.update_ms


def naive_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logps: Tensor,
    mask: Tensor,
    objective: CFPO | PPOClip,
) -> Tensor:
    """The same loss as it is usually written, in float32: it is the (B, T, V) part that costs.

    Args:
        logits: (B, T, V), any floating dtype.
        token_ids, old_logps, mask: (B, T).
        advantages: (B,).
    """
    all_logps = torch.log_softmax(logits.float(), dim=-1)
    logps = all_logps.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    log_ratio = logps - old_logps
    loss = policy_term(objective.shape(), logps, log_ratio, advantages[:, None].expand_as(logps))
    return (loss * mask).sum() / mask.sum()


def time_update(
    forward: Callable[[], Tensor],
    loss_fn: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor], None],
) -> tuple[float, float]:
    """Run one update. Returns the seconds of the loss and of the whole.

    The loss's share has two parts: its forward, and the first piece of backward, until the
    gradient of the logits is there. A fused loss does its work in the first, a naive one in both.
    """
    logits_have_grad: list[float] = []
    start = time.perf_counter()
    logits = forward()
    logits.register_hook(lambda _: logits_have_grad.append(time.perf_counter()))
    before_loss = time.perf_counter()
    loss = loss_fn(logits)
    finish(loss)
    end = time.perf_counter()
    return logits_have_grad[0] - before_loss, end - start


def measure_losses(
    forward: Callable[[], Tensor],
    losses: dict[str, Callable[[Tensor], Tensor]],
    finish: Callable[[Tensor], None],
    repeats: int,
) -> dict[str, LossTime]:
    """Time updates that differ only in their loss.

    Args:
        forward: makes the logits (B, T, V).
        losses: name -> logits to a 0-d loss.
        finish: backward, first of all, and the optimizer step.
        repeats: timed updates a loss. They take turns, so that whatever else the machine does
            hits all alike; one untimed round comes first.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for i in range(repeats + 1):
        for name, loss_fn in losses.items():
            sample = time_update(forward, loss_fn, finish)
            if i > 0:
                times[name].append(sample)
    return {
        name: LossTime(*(1e3 * median(column) for column in zip(*samples, strict=True)))
        for name, samples in times.items()
    }
