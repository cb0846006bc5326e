"""Kernels of other packages that do the same work on a GPU, where they are installed.

Each way was written from the package's source; only TRL's and Liger's have been called. What cannot
run on a device or a shape is left out of a case, and named with its reason.
"""

from collections.abc import Callable
from importlib import import_module
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
    if find_spec("verl") and find_spec("flash_attn"):
        label = "verl (flash-attn's cross entropy, in place) + torch loss"
        found.append(Implementation("verl-logps", label, "peer", verl_logps, PEER))
    if find_spec("rl_engine"):
        label = "RL-Kernel batch-invariant log-probs (sm_90) + torch loss"
        found.append(Implementation("rl-kernel-logps", label, "peer", rl_kernel_logps, PEER))
        label = "RL-Kernel fused log-probs, forward only"
        found.append(
            Implementation(
                "rl-kernel-forward", label, "peer", rl_kernel_forward, PEER, backward=False
            )
        )
    if find_spec("quack"):
        label = "QuACK cross entropy, in place + torch loss"
        found.append(Implementation("quack-logps", label, "peer", quack_logps, PEER))
    return found


def controls(logits: Tensor) -> dict[str, Callable[[], object]]:
    """Kernels that read and write the logits once and are no loss: how fast that goes here."""
    if not (logits.is_cuda and find_spec("quack")):
        return {}
    softmax = import_module("quack.softmax").softmax_fwd
    try:
        softmax(logits)  # compiles; a width or device that it does not take
    except Exception:
        return {}
    return {"QuACK's softmax": lambda: softmax(logits)}


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


def of_logps(logps_of: Callable[[Tensor, Tensor], Tensor]) -> LossFunction:
    """The loss in plain PyTorch over a package's log-probs."""

    def loss(logits: Tensor, problem: Problem) -> Tensor:
        logps = logps_of(logits, problem.token_ids).float()
        return naive.objective_term(logps, problem.old_logps, problem.advantages).mean()

    return loss


def verl_logps() -> LossFunction:
    """What verl's trainer takes where flash-attn is installed; its backward is in place."""
    return of_logps(import_module("verl.utils.torch_functional").logprobs_from_logits_flash_attn)


def rl_kernel_logps() -> LossFunction:
    """Sums in a fixed order, TMA forward, tile-wise backward; Hopper only."""
    module = import_module("rl_engine.kernels.ops.cuda.loss.batch_invariant_logp")
    return of_logps(module.BatchInvariantLogpSM90Op())


def rl_kernel_forward() -> LossFunction:
    module = import_module("rl_engine.kernels.ops.cuda.loss.logp")
    return of_logps(module.FusedLogpGenericOp().apply_fp32)


def quack_logps() -> LossFunction:
    cross_entropy = import_module("quack.cross_entropy").cross_entropy
    return of_logps(
        lambda logits, ids: -cross_entropy(logits, ids, reduction="none", inplace_backward=True)
    )
