"""The baselines: the loss as one writes it in plain PyTorch, without a kernel."""

import torch
from torch import Tensor

from bench.problem import Problem, selected_logps
from cfpo_kernels import CFPO, PPOClip
from cfpo_kernels.formula import policy_term

EPSILON = 0.2
OBJECTIVES: dict[str, CFPO | PPOClip] = {
    "cfpo": CFPO(epsilon=EPSILON),
    "ppo-clip": PPOClip(epsilon_low=EPSILON, epsilon_high=EPSILON),
}

# On the CPU a chunk should fit the caches; on a GPU it should fill the device.
CHUNK_ROWS = {"cpu": 16, "cuda": 512}


def objective_term(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, objective: str = "cfpo"
) -> Tensor:
    """The policy term per token (N,), in the dtype of the arguments.

    The formula is the package's own specification: it is a handful of operations on N numbers, and
    what the baselines are slow at is the V-sized work before it.
    """
    return policy_term(OBJECTIVES[objective].shape(), logps, logps - old_logps, advantages)


def loss_float32(logits: Tensor, problem: Problem) -> Tensor:
    """Mean loss with the logits converted to float32: the accurate plain form."""
    logps = selected_logps(logits.float(), problem.token_ids)
    return objective_term(logps, problem.old_logps, problem.advantages).mean()


def loss_native(logits: Tensor, problem: Problem) -> Tensor:
    """Mean loss with log_softmax in the logits' dtype: less memory, far less accurate."""
    logps = selected_logps(logits, problem.token_ids).float()
    return objective_term(logps, problem.old_logps, problem.advantages).mean()


def loss_chunked(logits: Tensor, problem: Problem) -> Tensor:
    """The float32 form a few rows at a time: one chunk's float32 temporaries live at once."""
    return _ChunkedLoss.apply(logits, problem)


class _ChunkedLoss(torch.autograd.Function):
    """Takes each chunk's gradient in forward, the usual way to keep plain PyTorch's memory small.

    (Slicing under autograd instead would allocate a V-sized gradient for every chunk.)
    """

    @staticmethod
    def forward(ctx, logits: Tensor, problem: Problem) -> Tensor:
        columns = (logits, problem.token_ids, problem.old_logps, problem.advantages)
        rows = CHUNK_ROWS[logits.device.type]
        chunks = zip(*(column.detach().split(rows) for column in columns), strict=True)
        ctx.dlogits = torch.empty_like(logits)
        loss = torch.zeros((), device=logits.device)
        for (chunk, token_ids, *rest), dchunk in zip(chunks, ctx.dlogits.split(rows), strict=True):
            with torch.enable_grad():
                chunk.requires_grad_()
                logps = selected_logps(chunk.float(), token_ids)
                chunk_loss = objective_term(logps, *rest).sum() / logits.shape[0]
            dchunk_loss = chunk_loss.new_full((), problem.case.loss_scale)
            dchunk.copy_(torch.autograd.grad(chunk_loss, chunk, dchunk_loss)[0])
            loss += chunk_loss.detach()
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor, None]:
        # `dloss` is the loss scale, which forward has applied.
        return ctx.dlogits, None
