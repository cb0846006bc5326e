"""What a process's default dtype and device, and tensors of inference mode, change in what verl and
OpenRLHF call: nothing. tests/core/test_argument_kinds.py has the package's own functions.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from entry_points import Entry, outcome, tensors
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


ENTRIES: dict[str, Entry] = {}
for trainer, entries in (("verl", entries_of_verl), ("openrlhf", entries_of_openrlhf)):
    if importlib.util.find_spec(trainer) is not None:
        ENTRIES |= entries()
each = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)  # and of one dtype


@each
def test_defaults_change_nothing(entry: Entry) -> None:
    want = outcome(entry, tensors())
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
    want = outcome(entry, tensors())
    with torch.inference_mode():
        made = tensors()
    others = {name: made[name] for name in entry.arguments if name not in entry.leaves}
    same(outcome(entry, tensors() | others), want)
