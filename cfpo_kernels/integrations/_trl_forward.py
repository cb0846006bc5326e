"""From TRL's inputs through the model to the loss: with all logits at once, or a few at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._chunked_head import chunked_head_loss
from ._trl_batch import Tokens
from ._trl_loss import Scored, TokenLoss

# Beside the token ids; only multimodal models have them.
MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# What configs call that which models do to the logits after the head.
AFTER_THE_HEAD = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)

# Gives the tokens of a head with that many rows, and their loss.
Prepare = Callable[[int, torch.device], tuple[Tokens, TokenLoss]]


def forward(trainer: Any, model: Any, inputs: dict[str, Any], unwrapped: Any) -> Any:
    """The model's outputs, with the logits of the completion before the temperature, (B, R, V)."""
    arguments = {name: inputs[name] for name in MODEL_INPUTS if inputs.get(name) is not None}
    arguments["input_ids"] = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    arguments["attention_mask"] = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    if "logits_to_keep" in inspect.signature(unwrapped.forward).parameters:
        arguments["logits_to_keep"] = inputs["completion_ids"].shape[1] + 1
    if trainer.aux_loss_enabled:
        arguments["output_router_logits"] = True
    with trainer.accelerator.autocast(), _as_precise_as_trl(trainer, model, unwrapped):
        return model(**arguments, use_cache=False)


def is_compiled(trainer: Any, model: Any) -> bool:
    return hasattr(trainer.accelerator.unwrap_model(model), "_orig_mod")


def unwrap(trainer: Any, model: Any) -> Any:
    """The model below the wrappers of several processes, of torch.compile and of adapters."""
    unwrapped = trainer.accelerator.unwrap_model(model)
    unwrapped = getattr(unwrapped, "_orig_mod", unwrapped)
    return unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped  # PEFT


def changes_logits(unwrapped: Any) -> bool:
    """Whether the model does something to its logits after the head."""
    config = unwrapped.config.get_text_config()
    return any(getattr(config, name, None) not in (None, 1.0) for name in AFTER_THE_HEAD)


def plain_head(trainer: Any, unwrapped: Any) -> nn.Linear | None:
    """The model's head where its output is the logits, unchanged; None otherwise."""
    head = unwrapped.get_output_embeddings()
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not linear or "forward" in vars(head):  # TRL's float32 head, or moved between devices
        return None
    if changes_logits(unwrapped):
        return None
    # The gradient of float16 logits would underflow: a loss scale, accelerate's or DeepSpeed's, is
    # applied after it was rounded.
    float16 = trainer.accelerator.scaler is not None or head.weight.dtype == torch.float16
    return None if float16 else head


def score_all(outputs: Any, prepare: Prepare) -> tuple[Tokens, TokenLoss, Scored]:
    """The loss of all logits at once."""
    logits = outputs.logits
    if logits.dtype == torch.float16:  # as accelerate does where the loss scale is its own
        logits = logits.float()
    tokens, loss_of = prepare(logits.shape[1], logits.device)
    return tokens, loss_of, loss_of(logits, tokens)


def score_in_chunks(
    run: Callable[[], Any], head: nn.Linear, prepare: Prepare, chunk: int
) -> tuple[Any, tuple[Tokens, TokenLoss, Scored] | None]:
    """The loss computed in place of the head, inside the model's forward; returns its outputs too.

    There, hooks of wrappers (sharding, offloading) have the weight ready. None: the model does not
    call its head as a module, and its outputs hold the logits.

    Raises:
        RuntimeError: the model changes what its head returns.
    """
    results: list[tuple[Tokens, TokenLoss, Scored]] = []

    def loss_head(hidden: Tensor) -> Tensor:
        tokens, loss_of = prepare(hidden.shape[1], hidden.device)
        mask, chosen = tokens.mask, tokens[tokens.mask]
        loss, logps, entropy = chunked_head_loss(
            hidden[mask],
            head.weight,
            head.bias,
            lambda logits, rows: loss_of(logits, chosen[rows])[:3],
            chunk,
        )
        zeros = torch.zeros(mask.shape, device=mask.device)
        logps, entropy = (zeros.masked_scatter(mask, x) for x in (logps, entropy))
        results.append((tokens, loss_of, Scored(loss, logps, entropy, mask)))
        # As wide as logits, so that a model that drops or sets some columns is noticed as well.
        return loss.reshape(1, 1, 1).repeat(1, 1, head.out_features)

    with _forward_of(head, loss_head):
        outputs = run()
    if not results:
        return outputs, None
    tokens, loss_of, scored = results[0]
    found = outputs.logits
    unchanged = found.shape == (1, 1, head.out_features) and torch.allclose(
        found, scored.loss.expand_as(found), rtol=0, atol=0, equal_nan=True
    )
    if len(results) > 1 or not unchanged:
        raise RuntimeError(
            "this model changes its logits after the head, or calls the head more than once: set "
            "logits_tokens=None, so that the loss gets the logits that the model returns"
        )
    return outputs, (tokens, loss_of, scored._replace(loss=found[0, 0, 0]))


@contextmanager
def _as_precise_as_trl(trainer: Any, model: Any, unwrapped: Any) -> Iterator[None]:
    """The model's head, with logits in float32 where TRL's own scoring has them so.

    That is with the head that TRL made float32, out of which autocast is kept, and where the model
    changes its logits afterwards: a cap in bfloat16 would make ratios of 1 differ by some percent.
    """
    head = unwrapped.get_output_embeddings()

    def without_autocast(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return own(hidden)

    def in_float32(hidden: Tensor) -> Tensor:
        return own(hidden).float()

    if trainer.args.cast_lm_head_to_fp32:
        own, forward = head.forward, without_autocast
    elif changes_logits(unwrapped) and not is_compiled(trainer, model):
        own, forward = head.forward, in_float32
    else:
        yield
        return
    with _forward_of(head, forward):
        yield


@contextmanager
def _forward_of(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
