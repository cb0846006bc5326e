"""What TRL's trainer knows about a micro-batch, token by token.

Nothing here imports TRL: a trainer is anything with GRPOTrainer's attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import padded_sequence_index, row_weights

# Loss types that are means over sequences of their tokens' means, and those that are divided by the
# number of tokens of all accumulated micro-batches.
MEANS_OF_SEQUENCES = ("grpo", "sapo")
SPANNING = ("dapo", "cispo", "vespo")


@dataclass(frozen=True)
class Tokens:
    """A micro-batch aligned with the rows of the model's head, (B, R): row i scores token i + 1.

    TRL keeps K numbers a completion. The head's last row scores nothing, and a model that does not
    know ``logits_to_keep`` also has the prompt's; these rows are masked. Slicing them off would
    make autograd pad the gradient again: a second one of the logits' size.
    """

    token_ids: Tensor  # int64
    mask: Tensor  # bool
    weights: Tensor  # float32: TRL's loss is the weighted sum of the tokens'
    advantages: Tensor
    old_logps: Tensor | None  # None: on-policy
    ref_logps: Tensor | None
    sampling_logps: Tensor | None
    correction: Tensor | None  # rollout correction, a factor of the policy term


def align(trainer: Any, inputs: dict[str, Any], n_rows: int) -> Tokens:
    """Pads what TRL keeps for the K completion tokens to the R rows of the head.

    Raises:
        ValueError: beta needs reference log-probs that the batch has not.
    """
    ids = inputs["completion_ids"]
    before = n_rows - 1 - ids.shape[1]

    def pad(x: Tensor, value: float = 0.0) -> Tensor:
        return F.pad(x.expand(ids.shape), (before, 1), value=value)

    def optional(name: str) -> Tensor | None:
        return pad(inputs[name]) if inputs.get(name) is not None else None

    if trainer.beta != 0 and inputs.get("ref_per_token_logps") is None:
        raise ValueError(
            f"beta={trainer.beta} needs inputs['ref_per_token_logps'], which this batch has not: "
            "set beta=0.0 in the GRPOConfig, or score the completions with the reference model"
        )
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    mask = pad(mask) != 0
    advantages = inputs["advantages"]
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return Tokens(
        token_ids=pad(ids),
        mask=mask,
        weights=_weights(trainer, inputs, mask),
        advantages=pad(advantages[:, None] if advantages.dim() == 1 else advantages),
        old_logps=optional("old_per_token_logps"),
        ref_logps=optional("ref_per_token_logps"),
        sampling_logps=optional("sampling_per_token_logps"),
        correction=pad(inputs["importance_sampling_ratio"], 1.0) if corrected else None,
    )


def accumulation_steps(trainer: Any) -> int:
    """By how many micro-batches TRL divides; an evaluation has one."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def denominator(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> float | Tensor:
    """TRL's normalisation, ``loss_type``: of sequences for some, of tokens for others."""
    steps, n_sequences = accumulation_steps(trainer), mask.shape[0]
    if trainer.loss_type in ("luspo", *MEANS_OF_SEQUENCES):
        return float(n_sequences * steps)
    if trainer.loss_type == "dr_grpo":
        return float(n_sequences * trainer.max_completion_length * steps)
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1) * steps
    # Tokens of all processes in one optimizer step; TRL counted those of a generation batch.
    tokens = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    if trainer.model.training:
        tokens = tokens * steps / trainer.args.steps_per_generation
    return tokens


def _weights(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    sequences, n_sequences = padded_sequence_index(mask.shape, mask.device)
    weights = row_weights(
        mask.flatten(),
        "seq-mean-token-mean" if trainer.loss_type in MEANS_OF_SEQUENCES else "sum",
        sequence_index=sequences,
        n_sequences=n_sequences,
        normalizer=denominator(trainer, inputs, mask),
        dtype=torch.float32,
    )
    return weights.view(mask.shape)
