"""OpenRLHF's Actor without logits, against its own forward: log-probs in the model's head's place.

Packed samples go through OpenRLHF's own code, with the few functions of flash-attn that it calls
written here; attention is eager and takes the packed sequences apart by their position ids.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from functools import wraps
from typing import Any

import pytest
import torch
from openrlhf_import import import_openrlhf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="requirements/trainers.txt")
if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("openrlhf is not installed", allow_module_level=True)

openrlhf_models = import_openrlhf()
openrlhf_actor, openrlhf_loss = openrlhf_models.actor, openrlhf_models.loss
ours = importlib.import_module("cfpo_kernels.integrations.openrlhf")
ring_attn_utils = importlib.import_module("openrlhf.models.ring_attn_utils")

V, H, PROMPT, ANSWER = 403, 32, 5, 6
SMALL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "softcap": transformers.Gemma2Config(
        **SMALL, query_pre_attn_scalar=8, final_logit_softcapping=5.0
    ),
    "scale": transformers.CohereConfig(**SMALL, logit_scale=0.3),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpad_input(x: Tensor, mask: Tensor) -> tuple[Any, ...]:
        indices = mask.flatten().nonzero()[:, 0]
        bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return x.flatten(0, 1)[indices], indices, bounds, int(mask.sum(1).max()), mask.sum(1)

    def pad_input(x: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
        return (
            x.new_zeros(batch * seqlen, *x.shape[1:])
            .index_copy(0, indices, x)
            .view(batch, seqlen, *x.shape[1:])
        )

    stand_ins = {
        "unpad_input": unpad_input,
        "pad_input": pad_input,
        "index_first_axis": lambda x, indices: x[indices],
        "rearrange": lambda x, pattern: x.flatten(0, 1),
    }
    for name, function in stand_ins.items():
        monkeypatch.setattr(ring_attn_utils, name, function)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """use_cfpo, undone afterwards."""
    for module in (openrlhf_loss, openrlhf_models):
        monkeypatch.setattr(module, "PolicyLoss", module.PolicyLoss)
    for name in ("compute_entropy", "log_probs_from_logits", "unpad_and_slice_tensor"):
        monkeypatch.setattr(openrlhf_actor, name, getattr(openrlhf_actor, name))
    monkeypatch.setattr(openrlhf_actor.Actor, "forward", openrlhf_actor.Actor.forward)
    yield


def make_actor(kind: str, packing: bool, temperature: float = 0.7) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[kind], attn_implementation="eager"
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20 if kind == "llama" else 10)
    model.config.use_cache = False  # as Actor's constructor has it
    actor = openrlhf_actor.Actor(model, temperature=temperature)
    actor.packing_samples = packing
    return actor


def batch() -> dict[str, Tensor]:
    """Prompts padded left, answers right; one token of a tool in the third answer."""
    g = torch.Generator().manual_seed(1)
    sequences = torch.randint(3, V, (3, PROMPT + ANSWER), generator=g)
    attention = torch.ones_like(sequences)
    attention[0, :2] = 0
    attention[1, -3:] = 0
    action_mask = attention[:, PROMPT:].clone()
    action_mask[2, 2] = 0
    return {"sequences": sequences, "attention_mask": attention, "action_mask": action_mask}


class Products(TorchDispatchMode):
    """Rows of every product with the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
            sizes = [*args[-2].shape[-2:], args[-1].shape[-1]]
            if V in sizes:
                sizes.remove(V)
                sizes.remove(H)
                self.rows += sizes
        return function(*args, **(kwargs or {}))


def step(actor: Any, *, entropy: bool = True, **given: Any) -> dict[str, Tensor]:
    """log-probs, entropies where actions are, and every gradient of a loss of both."""
    actor.model.zero_grad()
    log_probs, output = actor(**batch() | given, return_output=True, return_entropy=entropy)
    g = torch.Generator().manual_seed(2)
    loss = (log_probs * torch.randn(log_probs.shape, generator=g)).sum()
    found = {"log_probs": log_probs.detach()}
    if entropy:
        of_actions = output.entropy[:, -ANSWER:] * batch()["action_mask"]
        loss = loss + 0.3 * (of_actions * torch.randn(of_actions.shape, generator=g)).sum()
        found["entropy"] = of_actions.detach()
    loss.backward()
    found["logits"] = output["logits"]
    return found | {n: p.grad for n, p in actor.model.named_parameters() if p.grad is not None}


def check(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and len(got) > 8
    for name in got.keys() - {"logits"}:
        assert (got[name] - want[name]).norm() <= 2e-5 * want[name].norm(), name


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_actor_has_no_logits(
    in_place: None, flash_attn: None, kind: str, entropy: bool, packing: bool
) -> None:
    actor = make_actor(kind, packing)
    want = step(actor, entropy=entropy)
    ours.use_cfpo()
    with Products() as products:
        got = step(actor, entropy=entropy)
    check(got, want)
    assert want["logits"] is not None and got["logits"] is None
    # One tile of 128, though the head has 33 rows here; but the gradient of the head sums over
    # those that there are.
    assert products.rows == [128, 128, 14]
    assert "forward" not in vars(actor.model.get_output_embeddings())
    assert openrlhf_actor.unpad_and_slice_tensor is ring_attn_utils.unpad_and_slice_tensor


def test_prompts_and_padding_are_not_multiplied(
    in_place: None, flash_attn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what a mask leaves out in between: 14 rows of 33."""
    masks = []
    original = ours.linear_token_logps

    def spy(hidden: Tensor, *arguments: Any, **how: Any) -> Any:
        masks.append(how["mask"])
        return original(hidden, *arguments, **how)

    monkeypatch.setattr(ours, "linear_token_logps", spy)
    ours.use_cfpo()
    for packing in (False, True):
        output = step(make_actor("llama", packing))
        assert output["log_probs"].ne(0).sum() == 14
    padded, packed = masks
    assert padded.shape == (3, 11) and packed.shape == (1, 28)
    assert padded.sum() == packed.sum() == 14
    assert padded[0].nonzero()[0] == PROMPT - 1, "the last token of a prompt predicts an answer"


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_log_probs_of_whole_sequences(in_place: None, flash_attn: None, packing: bool) -> None:
    """As OpenRLHF's SFT and DPO ask for them, and with temperature 1, where it divides nothing."""
    actor = make_actor("llama", packing, temperature=1.0)
    given = {"action_mask": None, "return_logprobs": True, "entropy": False}
    want = step(actor, **given)
    ours.use_cfpo()
    got = step(actor, **given)
    check(got, want)
    assert got["log_probs"].shape == (3, PROMPT + ANSWER - 1) and got["logits"] is None


def test_a_model_that_changes_its_logits_keeps_them(in_place: None) -> None:
    actor = make_actor("llama", False)
    original, calls = actor.model.forward, []

    @wraps(original)
    def forward(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        output = original(*arguments, **named)
        output["logits"] = output["logits"] * 0.5
        return output

    actor.model.forward = forward
    want = step(actor)
    ours.use_cfpo()
    for of_calls in (3, 4):  # tried once
        got = step(actor)
        check(got, want)
        assert got["logits"] is not None and len(calls) == of_calls
