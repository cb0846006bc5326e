"""From TRL's inputs through the model to the loss: from its hidden states, or from its logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..api import policy_loss
from ..linear import linear_policy_loss
from ..linear.module import forward_of
from ..runners import may_overwrite
from ._head import (
    AfterHead,
    HeadOutputChangedError,
    after_head,
    replaceable_head,
    run_in_head,
)
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
# Gives the loss of a head with that many rows.
Prepare = Callable[[int], TokenLoss]


def score(
    trainer: Any,
    model: Any,
    inputs: dict[str, Any],
    prepare: Prepare,
    *,
    logits_tokens: int | None,
    inplace: bool | None,
    backend: str,
) -> tuple[Any, TokenLoss, Scored]:
    """The model's outputs, and the loss of the micro-batch; see :func:`.trl.compute_cfpo_loss`."""
    unwrapped = unwrap(trainer, model)

    def run() -> Any:
        return forward(trainer, model, inputs, unwrapped)

    head = None
    # A compiled model has the head's code in it: another forward would be compiled at every step.
    if logits_tokens is not None and not is_compiled(trainer, model):
        head = replaceable_head(unwrapped, own_forward=trainer.args.cast_lm_head_to_fp32)
    if head is None or logits_tokens is None:
        with _as_precise_as_trl(trainer, model, unwrapped):
            outputs = run()
    else:
        products = partial(_products, most=logits_tokens)
        outputs, found = from_hidden_states(
            trainer, run, unwrapped, head, prepare, products, backend
        )
        if found is not None:
            return outputs, *found
    return outputs, *score_all(outputs, prepare, inplace, backend)


def forward(trainer: Any, model: Any, inputs: dict[str, Any], unwrapped: Any) -> Any:
    """The model's outputs, with the logits of the completion before the temperature, (B, R, V)."""
    arguments = {name: inputs[name] for name in MODEL_INPUTS if inputs.get(name) is not None}
    arguments["input_ids"] = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    arguments["attention_mask"] = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    if "logits_to_keep" in inspect.signature(unwrapped.forward).parameters:
        arguments["logits_to_keep"] = inputs["completion_ids"].shape[1] + 1
    if trainer.aux_loss_enabled:
        arguments["output_router_logits"] = True
    with trainer.accelerator.autocast():
        return model(**arguments, use_cache=False)


def is_compiled(trainer: Any, model: Any) -> bool:
    return hasattr(trainer.accelerator.unwrap_model(model), "_orig_mod")


def unwrap(trainer: Any, model: Any) -> Any:
    """The model below the wrappers of several processes, of torch.compile and of adapters."""
    unwrapped = trainer.accelerator.unwrap_model(model)
    unwrapped = getattr(unwrapped, "_orig_mod", unwrapped)
    return unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped  # PEFT


def from_hidden_states(
    trainer: Any,
    run: Callable[[], Any],
    unwrapped: Any,
    head: nn.Linear,
    prepare: Prepare,
    products: Callable[[Tensor], dict[str, Any]],
    backend: str,
) -> tuple[Any, tuple[TokenLoss, Scored] | None]:
    """The model's outputs, and the loss computed in place of the head; None: its outputs hold the
    logits.

    Raises:
        RuntimeError: the model changes what its head returns, not as its config says.
    """
    after, results = after_head(unwrapped), []

    def loss_of_hidden(hidden: Tensor) -> Tensor:
        loss_of = prepare(hidden.shape[1])
        scored = loss_of(
            partial(
                linear_policy_loss,
                hidden,
                head.weight,
                bias=head.bias,
                backend=backend,
                logit_scale=after.scale,
                softcap=after.softcap,
                **products(loss_of.tokens.mask),
                **_precision(trainer, head, hidden, capped=after.softcap is not None),
            )
        )
        results.append((loss_of, scored))
        return scored.loss

    try:
        outputs, loss = run_in_head(run, head, after, loss_of_hidden)
    except HeadOutputChangedError as error:
        raise RuntimeError(
            "this model changes its logits after the head, not as its config says, or calls the "
            "head more than once: set logits_tokens=None, so that the loss gets the logits that "
            "the model returns"
        ) from error
    if loss is None:
        return outputs, None
    loss_of, scored = results[0]
    return outputs, (loss_of, scored._replace(loss=loss))


def _products(mask: Tensor, *, most: int) -> dict[str, Any]:
    """Unmasked tokens are multiplied in parts of one size, of which no more than `most` each.

    So a row's bits depend on the micro-batch, as they do in no call that chooses its chunk_tokens
    by itself. There they make r = 1 for the policy that scored; here TRL's own forward scores, from
    the logits of a whole batch, whose bits no size of a part would give. Parts of `most` rows would
    cost a micro-batch of few tokens many times its products, and bring nothing.
    """
    n_tokens = max(1, int(mask.sum()))  # waits for the device, as TRL does to leave out the others
    parts = -(-n_tokens // most)
    even = -(-n_tokens // parts)
    return {
        "chunk_tokens": min(most, -(-even // 16) * 16),
        "active_tokens": None if mask.device.type == "cpu" else n_tokens,
    }


def _precision(trainer: Any, head: nn.Linear, hidden: Tensor, *, capped: bool) -> dict[str, Any]:
    """As TRL computes log-probs, so that equal weights have a ratio of 1."""
    if trainer.args.cast_lm_head_to_fp32:
        return {"logits_dtype": torch.float32}
    autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else head.weight.dtype
    how: dict[str, Any] = {}
    if capped:  # TRL rounds before the cap
        how["logits_dtype"] = dtype
    if dtype == torch.float16:  # whose gradients need the loss scale that they will have
        scaler = trainer.accelerator.scaler
        how |= {"low_memory": True} if scaler is None else {"grad_scale": scaler.get_scale()}
    return how


def score_all(
    outputs: Any, prepare: Prepare, inplace: bool | None, backend: str
) -> tuple[TokenLoss, Scored]:
    logits = outputs.logits
    if logits.dtype == torch.float16:  # as accelerate does where the loss scale is its own
        logits = logits.float()
    loss_of = prepare(logits.shape[1])
    overwrite = may_overwrite(backend) if inplace is None else inplace
    return loss_of, loss_of(partial(policy_loss, logits, inplace=overwrite, backend=backend))


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
    elif after_head(unwrapped) != AfterHead() and not is_compiled(trainer, model):
        own, forward = head.forward, in_float32
    else:
        yield
        return
    with forward_of(head, forward):
        yield
