"""One training step as an implementation sees it: logits from a model, loss, backward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.problem import Problem

LossFunction = Callable[[Tensor, Problem], Tensor]


@dataclass(frozen=True)
class Tolerance:
    """Largest error that passes, beside what rounding dlogits to their dtype costs."""

    loss: float  # relative to the mean magnitude of the per-token losses
    target: float  # dlogits at the target, relative to its own size or to |advantage| / N
    off_target: float  # ||dlogits - exact|| / ||exact|| over the other columns, worst row
    target_of_advantage: bool = False  # which of the two sizes `target` refers to


# Ours. The dlogits' own rounding comes on top, see checks.py.
EXACT = Tolerance(loss=1e-5, target=1e-5, off_target=1e-5)
# The reference backend: torch's own float32 softmax, and no care for tokens near their optimum.
TORCH_FLOAT32 = Tolerance(loss=1e-4, target=2e-3, off_target=2e-3)
# Peers in float32 inside. Some round p before they subtract 1: hence the size of the advantage.
PEER = Tolerance(loss=1e-3, target=2e-2, off_target=2e-2, target_of_advantage=True)
# log_softmax in bf16 keeps three digits of logp, so r is off by percents and the penalty multiplies
# that; where dlogits should nearly vanish their relative error has no bound.
LOW_PRECISION = Tolerance(loss=0.2, target=1.0, off_target=float("inf"), target_of_advantage=True)


@dataclass(frozen=True)
class Implementation:
    """Something to measure."""

    name: str  # for the command line and the JSON
    label: str  # for tables and plots
    kind: str  # "ours" | "baseline" | "peer"
    build: Callable[[], LossFunction]  # called once a case: imports, compiles
    tolerance: Tolerance
    backward: bool = True  # False: forward only, under no_grad
    objective: str = "cfpo"  # "cfpo" | "ppo-clip"
    # torch.compile must see the real shapes before its memory means anything.
    compiles: bool = False


class _ModelOutput(torch.autograd.Function):
    """Stands where the model would: hands out logits that are no leaf, takes their gradient.

    A leaf would copy or accumulate into `.grad`, which no training step does to its logits.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, logits: list[Tensor], received: list[Tensor]) -> Tensor:
        ctx.received = received
        return logits[0].detach()

    @staticmethod
    def backward(ctx, dlogits: Tensor) -> tuple[None, None, None]:
        ctx.received.append(dlogits)
        return None, None, None


def step(
    implementation: Implementation, function: LossFunction, logits: Tensor, problem: Problem
) -> tuple[Tensor, Tensor | None]:
    """Loss and dlogits (None when forward only), as a training step would get them.

    dlogits are multiplied by the case's loss scale, the loss is not. An implementation that works
    in place destroys `logits`.
    """
    if not implementation.backward:
        with torch.no_grad():
            return function(logits, problem), None
    anchor = torch.ones((), requires_grad=True)  # on the CPU: no launch on a GPU, no gradient
    received: list[Tensor] = []
    # In lists, so that autograd does not see `logits` as an input and its output as a view of it.
    loss = function(_ModelOutput.apply(anchor, [logits], received), problem)
    scale = problem.case.loss_scale
    (loss if scale == 1 else loss * scale).backward()
    return loss.detach(), received[0]
