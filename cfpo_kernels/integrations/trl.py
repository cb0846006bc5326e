"""TRL's GRPOTrainer with the fused CFPO loss.

from cfpo_kernels.integrations.trl import CFPOTrainer  # in place of trl.GRPOTrainer
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..objectives import Objective
from ._trl_batch import accumulation_steps, align
from ._trl_config import check_options, resolve_objective
from ._trl_forward import score
from ._trl_loss import TokenLoss, loss_terms
from ._trl_metrics import log_aux_loss, log_entropy_bonus, log_loss

try:
    from trl import GRPOTrainer
except ImportError as error:
    raise ImportError("cfpo_kernels.integrations.trl needs TRL: pip install 'trl>=1.16'") from error

__all__ = ["CFPOTrainer", "compute_cfpo_loss"]


def compute_cfpo_loss(
    trainer: GRPOTrainer,
    model: Any,
    inputs: dict[str, Any],
    objective: Objective | None = None,
    *,
    logits_tokens: int | None = 1024,
    inplace: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """In place of ``GRPOTrainer._compute_loss(model, inputs)``, for subclasses of your own.

    Args:
        trainer: gives the settings (temperature, loss_type, beta, ...) and takes the metrics.
        model: what the trainer passes, perhaps wrapped for several processes.
        inputs: one micro-batch, as TRL prepares it.
        objective: None: what ``loss_type`` stands for: TRL's own with "cispo", "sapo", "vespo" and
            "luspo", otherwise ``CFPO(args.epsilon, epsilon_high=args.epsilon_high)``.
        logits_tokens: how many tokens' logits exist at a time, if the model's head is linear and
            its output not changed; otherwise, and with None, those of the whole micro-batch.
        inplace: the gradient overwrites the logits. None: where the backend has kernels.
        backend: see :func:`cfpo_kernels.cfpo_loss`.

    Returns:
        The 0-d loss, normalised as ``loss_type`` says and scaled for gradient accumulation.

    Raises:
        ValueError: a setting that the loss cannot take; the message says what to set.

    Memory: logits_tokens x V logits, and a float32 gradient of the head's weight, if it is trained;
    with None, the logits of the completions. With inplace=False one gradient of those logits more.
    """
    chosen = resolve_objective(trainer.args, objective)
    check_options(logits_tokens, inplace, backend)

    def prepare(n_rows: int) -> TokenLoss:
        return TokenLoss(trainer, inputs, align(trainer, inputs, n_rows), chosen)

    outputs, loss_of, scored = score(
        trainer,
        model,
        inputs,
        prepare,
        logits_tokens=logits_tokens,
        inplace=inplace,
        backend=backend,
    )
    terms = loss_terms(loss_of, scored)
    log_entropy_bonus(trainer, terms)
    log_loss(trainer, terms)
    if not trainer.aux_loss_enabled:
        return scored.loss
    log_aux_loss(trainer, outputs.aux_loss)
    scale = trainer.router_aux_loss_coef / accumulation_steps(trainer)
    return scored.loss + scale * outputs.aux_loss


class CFPOTrainer(GRPOTrainer):
    """GRPOTrainer whose loss is CFPO, fused with its gradient.

    Takes GRPOTrainer's arguments and these. ``loss_type`` "cispo", "sapo", "vespo" and "luspo" are
    TRL's own losses, fused; the others choose the normalisation only.

    Args:
        objective: None: see above. ``PPOClip(...)`` gives TRL's own loss, fused.
        logits_tokens, inplace, backend: see :func:`compute_cfpo_loss`.

    Raises:
        ValueError: a setting of `args` that the loss cannot take; the message says what to set.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *positional: Any,
        objective: Objective | None = None,
        logits_tokens: int | None = 1024,
        inplace: bool | None = None,
        backend: str = "auto",
        **named: Any,
    ) -> None:
        if args is not None:  # refused before a model is loaded
            resolve_objective(args, objective)
        check_options(logits_tokens, inplace, backend)
        self.loss_options: dict[str, Any] = {
            "objective": objective,
            "logits_tokens": logits_tokens,
            "inplace": inplace,
            "backend": backend,
        }
        super().__init__(model, reward_funcs, args, *positional, **named)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return compute_cfpo_loss(self, model, inputs, **self.loss_options)
