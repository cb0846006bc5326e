"""What a process's default dtype and device, and tensors of inference mode, change in what verl,
OpenRLHF and TRL call: nothing. tests/core/test_argument_kinds.py has the package's own functions.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from entry_points import Entry, H, V, outcome, tensors
from openrlhf_import import import_openrlhf


def entries_of_verl() -> dict[str, Entry]:
    ours = importlib.import_module("cfpo_kernels.integrations.verl")
    config = importlib.import_module("verl.workers.config")
    made = config.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2)

    def loss(logps: Any, old_logps: Any, advantages: Any, mask: Any, **given: Any) -> Any:
        how = {"config": made, "rollout_is_weights": given.get("token_weights")}
        return ours.compute_policy_loss_cfpo(old_logps, logps, advantages, mask != 0, **how)[0]

    plain = ("old_logps", "advantages", "mask", "token_weights")
    head = ("hidden", "weight")
    return {
        "verl-loss": Entry(loss, ("logps", *plain), ("logps",)),
        "verl-logprobs": Entry(
            lambda logits, token_ids: ours.logprobs_from_logits(logits * 1.0, token_ids),
            ("logits", "token_ids"),
            ("logits",),
        ),
        "verl-entropy": Entry(ours.entropy_from_logits, ("logits",), ("logits",)),
        "verl-fused": Entry(
            lambda hidden, weight, token_ids: ours.FusedLinearForPPO()(hidden, weight, token_ids),
            (*head, "token_ids"),
            head,
        ),
        "verl-cross-entropy": Entry(
            lambda hidden, weight, token_ids: ours.linear_cross_entropy(hidden, weight, token_ids),
            (*head, "token_ids"),
            head,
        ),
    }


def entries_of_openrlhf() -> dict[str, Entry]:
    import_openrlhf()
    ours = importlib.import_module("cfpo_kernels.integrations.openrlhf")

    def loss_of(kind: str) -> Any:
        def loss(logps: Any, old_logps: Any, advantages: Any, mask: Any) -> Any:
            return ours.PolicyLoss(policy_loss_type=kind)(logps, old_logps, advantages, mask)[0]

        return loss

    plain = ("logps", "old_logps", "advantages", "mask")
    return {
        "openrlhf-loss": Entry(loss_of("ppo"), plain, ("logps",)),
        "openrlhf-gspo": Entry(loss_of("gspo"), plain, ("logps",)),
        "openrlhf-logprobs": Entry(
            lambda logits, token_ids: ours.log_probs_from_logits(logits, token_ids),
            ("logits", "token_ids"),
            ("logits",),
        ),
    }


class Given(torch.nn.Module):
    """A model that gives its head the hidden states it was made with, whatever the prompt is."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> None:
        super().__init__()
        with torch.device("cpu"):
            self.head = torch.nn.Linear(H, V, bias=False, dtype=torch.float32)
        del self.head.weight
        self.head.weight = weight  # no parameter: it is the leaf
        self.hidden, self.softcap = hidden, softcap
        text = SimpleNamespace(final_logit_softcapping=softcap)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        outputs = importlib.import_module("transformers.modeling_outputs").CausalLMOutput
        logits = self.head(self.hidden)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return outputs(logits=logits)


@cache
def trainer_of_trl() -> Any:
    """Made by a test's first call, which has the ordinary defaults."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = importlib.import_module("trl_setup").make_trainer(Path(folder))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 3
    return trainer


@contextmanager
def settings_of_trl(settings: dict[str, Any]) -> Iterator[None]:
    trainer = trainer_of_trl()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            owners = [x for x in (trainer, trainer.args) if hasattr(x, name)]
            assert owners, name
            for owner in owners:
                patch.setattr(owner, name, value)
        yield


CORRECTED = {"use_vllm": True, "vllm_importance_sampling_correction": True}
# Each way through the integration: one pass and two, weights of tokens and of sequences, what is
# added to the policy term and what leaves tokens out of it.
TRL: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo", "beta": 0.3},
    "bnpo": {"loss_type": "bnpo", "top_entropy_quantile": 0.5},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.3},
    "vespo": {"loss_type": "vespo", **CORRECTED},
    "off-policy-mask": {"off_policy_mask_threshold": 0.1, **CORRECTED},
    "bonus": {
        "loss_type": "grpo",
        "_entropy_bonus_enabled": True,
        "use_adaptive_entropy": True,
        "entropy_target": 9.0,
        "entropy_coef": 0.1,
        "_last_world_entropy": 1.0,  # which a call moves, as it does the window and the coefficient
        "_entropy_window_stats": None,
    },
    "correction": CORRECTED,
    "float32-head": {"cast_lm_head_to_fp32": True},
}


def entries_of_trl() -> dict[str, Entry]:
    ours = importlib.import_module("cfpo_kernels.integrations.trl")
    head = ("hidden", "weight")
    plain = ("token_ids", "by_sequence", "old_logps", "ref_logps", "mask", "token_weights")

    def loss(softcap: float | None, logits_tokens: int | None, **given: Any) -> Any:
        trainer = trainer_of_trl()
        ids, mask = given["token_ids"], given["mask"].to(torch.int64)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": ids[:, 1:],
            "completion_mask": mask[:, 1:],
            "num_items_in_batch": mask.sum(),
            "advantages": given["by_sequence"],
            "old_per_token_logps": given["old_logps"][:, 1:],
            "ref_per_token_logps": given["ref_logps"][:, 1:],
            "sampling_per_token_logps": given["ref_logps"][:, 1:],
            "importance_sampling_ratio": given["token_weights"][:, 1:],
        }
        trainer._metrics["train"].clear()
        model = Given(given["hidden"], given["weight"], softcap)
        found = ours.compute_cfpo_loss(trainer, model, inputs, logits_tokens=logits_tokens)
        logged = sorted(trainer._metrics["train"].items())
        numbers = [float(x) for _, values in logged for x in values]
        # NaN: how much is outside of a region that the objective has not.
        return found, torch.tensor(numbers, dtype=torch.float64, device="cpu").nan_to_num(nan=-1.0)

    def around(settings: dict[str, Any]) -> Callable[[], AbstractContextManager[None]]:
        return lambda: settings_of_trl(settings)

    return {
        f"trl-{name}-{'logits' if tokens is None else 'hidden'}": Entry(
            partial(loss, 5.0 if name == "capped" else None, tokens),
            (*head, *plain),
            head,
            around(settings),
        )
        for name, settings in (TRL | {"capped": {}}).items()
        for tokens in (None, 2)
    }


ENTRIES: dict[str, Entry] = {}
for trainer, entries in (
    ("verl", entries_of_verl),
    ("openrlhf", entries_of_openrlhf),
    ("trl", entries_of_trl),
):
    if importlib.util.find_spec(trainer) is not None:
        ENTRIES |= entries()
each = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        # Of what the tensor has: gradients of weights are as small as 1e-8. And of one dtype.
        largest = y.abs().max().item()
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6 * largest)


def ordinary(entry: Entry) -> list[torch.Tensor]:
    """What is to come; gradients last, which say nothing where they are zeros."""
    found = outcome(entry, tensors())
    assert all(x.any() for x in found[-len(entry.leaves) :])
    return found


@each
def test_defaults_change_nothing(entry: Entry) -> None:
    want = ordinary(entry)
    before = torch.get_default_dtype()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            same(outcome(entry, tensors()), want)
        finally:
            torch.set_default_dtype(before)
    with torch.device("meta"):
        same(outcome(entry, tensors()), want)


@each
def test_tensors_of_inference_mode(entry: Entry, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.id in ("openrlhf-loss", "openrlhf-gspo"):
        pytest.skip("OpenRLHF's own loss, which gives the tokens' weights, saves them for backward")
    want = ordinary(entry)
    with torch.inference_mode():
        made = tensors()
    others = {name: made[name] for name in entry.arguments if name not in entry.leaves}
    same(outcome(entry, tensors() | others), want)
