"""Numbers computed in the place of a model's head: under FSDP2, and what a model does after it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import found_by_ranks
from torch import Tensor, nn

from cfpo_kernels import linear_token_logps
from cfpo_kernels.integrations._head import (
    AfterHead,
    HeadOutputChangedError,
    after_head,
    replaceable_head,
    run_in_head,
)

V, H = 53, 8


class Model(nn.Module):
    """With tied embeddings or without, and a cap of 5 on 0.4 times its logits."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        text = SimpleNamespace(logit_scale=0.4, final_logit_softcapping=5.0, model_type="any")
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.layer(self.embedding(ids)).tanh()) * 0.4
        return {"logits": 5.0 * torch.tanh(logits / 5.0)}


IDS = torch.randint(0, V, (4, 6), generator=torch.Generator().manual_seed(0))


def logps_in_head(model: Any, ids: Tensor) -> Tensor:
    head, after = replaceable_head(model), after_head(model)
    assert head is not None

    def logps(hidden: Tensor) -> Tensor:
        found = linear_token_logps(
            hidden,
            head.weight,
            ids,
            bias=head.bias,
            logit_scale=after.scale,
            softcap=after.softcap,
            chunk_tokens=5,
        )
        assert isinstance(found, Tensor)
        return found

    _, values = run_in_head(lambda: model(ids), head, after, logps)
    assert values is not None
    return values


def loss_of(logps: Tensor, rows: slice) -> Tensor:
    factors = torch.randn(IDS.shape, generator=torch.Generator().manual_seed(1))
    return (logps * factors[rows]).sum()


def whole(tied: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = Model(tied)
    logps = torch.log_softmax(model(IDS)["logits"].double(), -1).gather(-1, IDS[..., None])[..., 0]
    loss_of(logps, slice(None)).backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_come_through_the_models_outputs(tied: bool) -> None:
    want, gradients = whole(tied)
    model = Model(tied)
    got = logps_in_head(model, IDS)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    loss_of(got, slice(None)).backward()
    check({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, gradients)
    assert "forward" not in vars(model.head)


def under_fsdp2(rank: int) -> dict[bool, dict[str, Tensor]]:
    from torch.distributed.fsdp import fully_shard

    found = {}
    for tied in (False, True):
        model = Model(tied)
        for part in [model.layer] if tied else [model.layer, model.head]:
            fully_shard(part)
        fully_shard(model)
        rows = slice(2 * rank, 2 * rank + 2)
        for _ in range(2):  # a weight that was left whole, or stale, would show
            for p in model.parameters():
                p.grad = None
            loss_of(logps_in_head(model, IDS[rows]), rows).backward()
        found[tied] = {n: p.grad.full_tensor() * 2 for n, p in model.named_parameters()}
    return found


@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")
def test_fsdp2_shards_and_gathers_the_head_around_it() -> None:
    """Its own group, and with tied embeddings the root's; log-probs multiply by it in backward."""
    found, _ = found_by_ranks(under_fsdp2, n=2)
    for tied in (False, True):
        check(found[tied], whole(tied)[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[..., :-1],
        lambda logits: logits.index_fill(-1, torch.tensor([7]), -1e9),
        lambda logits: logits * 1.001,
        lambda logits: logits + 1e-3,
        lambda logits: logits.bfloat16(),
        lambda logits: logits[:, :1],
        lambda logits: torch.cat([logits[:, :-1], logits[:, -1:] + 1], 1),
    ],
    ids=["dropped", "set", "scaled", "shifted", "rounded", "rows", "last row"],
)
def test_what_a_model_does_unsaid_is_noticed(change: Any) -> None:
    head = nn.Linear(H, V)

    def run(change: Any = change) -> dict[str, Tensor]:
        return {"logits": change(head(torch.randn(2, 3, H)))}

    def function(hidden: Tensor) -> Tensor:
        return hidden.sum(-1)

    with pytest.raises(HeadOutputChangedError):
        run_in_head(run, head, AfterHead(), function)
    with pytest.raises(HeadOutputChangedError):  # called twice
        run_in_head(lambda: [run(), run(lambda x: x)][1], head, AfterHead(), function)
    assert run_in_head(lambda: run(lambda x: x), head, AfterHead(), function)[1] is not None
    assert run_in_head(lambda: {"logits": None}, head, AfterHead(), function)[1] is None


def config_of(**values: Any) -> Any:
    text = SimpleNamespace(**{"model_type": "any"} | values)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({}, AfterHead()),
        ({"logit_scale": None, "final_logit_softcapping": None}, AfterHead()),
        ({"logit_scale": 0.0625}, AfterHead(0.0625)),
        ({"lm_head_multiplier": 3.0}, AfterHead(3.0)),
        ({"logits_scaling": 8.0}, AfterHead(0.125)),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, AfterHead(8.0)),
        ({"output_multiplier": 2.0, "final_logit_softcapping": 30.0}, AfterHead(2.0, 30.0)),
    ],
)
def test_what_configs_say(values: dict[str, Any], want: AfterHead) -> None:
    assert after_head(config_of(**values)) == want


def test_a_head_that_is_more_than_a_linear_layer_is_left_alone() -> None:
    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = Model()
    assert replaceable_head(model) is model.head
    model.head.forward = model.head.forward  # an instance's own
    assert replaceable_head(model) is None
    assert replaceable_head(model, own_forward=True) is model.head
    model.head._hf_hook = object()
    assert replaceable_head(model, own_forward=True) is None
    model.head = Head(H, V)
    assert replaceable_head(model) is None
    assert replaceable_head(nn.Linear(H, V)) is None
