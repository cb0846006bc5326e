"""Kernels of other packages that do the same work on a GPU, where they are installed."""

from importlib.util import find_spec

from torch import Tensor

from bench import naive
from bench.harness import PEER, Implementation, LossFunction
from bench.problem import Problem


def implementations() -> list[Implementation]:
    found = []
    if find_spec("liger_kernel"):
        found.append(
            Implementation(
                "liger-grpo",
                "Liger Triton GRPO, in place",
                "peer",
                liger_grpo,
                PEER,
                objective="ppo-clip",
            )
        )
    if find_spec("trl"):
        found.append(
            Implementation("trl-logps", "TRL log-prob kernel + torch loss", "peer", trl_logps, PEER)
        )
    return found


def liger_grpo() -> LossFunction:
    """Liger's GRPO loss; it has no CFPO, so it runs PPO's clipped objective on the same logits.

    It wants (B, L + 1, V) logits and ignores the last position, and one advantage a sequence: the
    rows are one sequence, whose last row has no loss (but whose gradient is written all the same).
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(logits: Tensor, problem: Problem) -> Tensor:
        value, _metrics = triton_grpo_loss(
            logits[None],
            old_logp=problem.old_logps[None, :-1].contiguous(),
            ref_logp=None,
            completion_ids=problem.token_ids[None, :-1].contiguous(),
            advantages=problem.advantages[:1],
            temperature=1.0,
            beta=0.0,
            eps_low=naive.EPSILON,
            eps_high=naive.EPSILON,
            inplace=True,
            loss_type="dapo",  # the mean over all tokens
            reduce=True,
        )
        return value

    return loss


def trl_logps() -> LossFunction:
    """TRL's log-prob (and entropy) kernel, then the loss in plain PyTorch."""
    from trl.kernels import selective_log_softmax_and_entropy

    def loss(logits: Tensor, problem: Problem) -> Tensor:
        logps, _entropy = selective_log_softmax_and_entropy(logits, problem.token_ids)
        return naive.objective_term(logps, problem.old_logps, problem.advantages).mean()

    return loss
