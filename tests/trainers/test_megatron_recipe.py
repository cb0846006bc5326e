"""The recipes of docs/trainers.md: Megatron's output layer on two processes and on one, FSDP2 and
tensor parallelism on one, whose examples run on two."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from entry_points import one_process
from ranks import found_by_ranks
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax

from cfpo_kernels import cfpo_loss

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
S, B, H, V, TP = 10, 3, 16, 301, 2
PADDED = 384  # so that the last process has 109 rows of the vocabulary and 83 of padding

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")


def run_recipe(heading: str, **namespace: Any) -> dict[str, Any]:
    section = PAGE.read_text().split(f"# {heading}\n")[1].split("\n##")[0]
    (text,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    exec(compile(text, str(PAGE), "exec"), namespace)
    return namespace


def recipe() -> Callable[..., Tensor]:
    return run_recipe("Megatron's output layer")["output_layer_loss"]  # type: ignore[no-any-return]


class ColumnParallelLinear(nn.Module):
    """What the recipe sees of Megatron's: a part of the rows. Calling it would make logits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int) -> None:
        super().__init__()
        rows = slice(rank * (PADDED // TP), (rank + 1) * (PADDED // TP))
        self.weight = nn.Parameter(weight[rows].clone())
        self.bias = None if bias is None else nn.Parameter(bias[rows].clone())


def case() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, S), generator=g)
    ids[0, :4] = torch.tensor([0, PADDED // TP - 1, PADDED // TP, V - 1])  # at every bound
    return {
        "hidden": torch.randn(S, B, H, generator=g),
        "weight": torch.randn(PADDED, H, generator=g),
        "bias": torch.randn(PADDED, generator=g),
        "token_ids": ids,
        "advantages": torch.randn(B, S, generator=g),
        "noise": 0.3 * torch.randn(B, S, generator=g),
        "mask": torch.arange(S) < torch.tensor([10, 4, 7])[:, None],
    }


def in_one_process() -> list[Tensor]:
    """Old log-probs; the loss, and the gradients of hidden states, weight and bias, in float64."""
    given = case()
    leaves = [given[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    logits = linear(leaves[0].transpose(0, 1), leaves[1], leaves[2])[..., :V]
    ids = given["token_ids"]
    logps = log_softmax(logits.detach(), -1).gather(-1, ids[..., None])[..., 0]
    old = logps + given["noise"]
    loss = cfpo_loss(
        logits, ids, given["advantages"].double(), old, mask=given["mask"], backend="reference"
    )
    assert isinstance(loss, Tensor)
    return [old, loss.detach(), *torch.autograd.grad(loss, leaves)]


def on_rank(rank: int, old_logps: Tensor) -> dict[tuple[bool, bool], Any]:
    given, found = case(), {}
    for sequence_parallel in (False, True):
        for tied in (False, True):
            layer = ColumnParallelLinear(given["weight"], given["bias"], rank)
            weight = layer.weight
            if tied:  # Megatron's output layer has no weight then
                layer.weight = None
            hidden = given["hidden"]
            if sequence_parallel:
                hidden = hidden.chunk(TP)[rank]
            hidden = hidden.clone().requires_grad_()
            loss = recipe()(
                hidden,
                layer,
                weight if tied else None,
                dist.group.WORLD,
                V,
                sequence_parallel,
                *(given[name] for name in ("token_ids", "advantages")),
                old_logps,
                given["mask"],
                chunk_tokens=8,
            )
            loss.backward()
            assert layer.bias is not None and layer.bias.grad is not None
            results = [loss.detach(), hidden.grad, weight.grad, layer.bias.grad]
            found[sequence_parallel, tied] = results
    return found


def test_the_recipe_is_one_process_split_in_two() -> None:
    old, loss, *want = in_one_process()
    first, second = found_by_ranks(on_rank, old.float(), n=TP)
    for way, (of_first, *gradients) in first.items():
        of_second, *others = second[way]
        assert torch.equal(of_first, of_second)
        assert of_first.item() == pytest.approx(loss.item(), abs=5e-7)
        sequence_parallel, _ = way
        if not sequence_parallel:
            assert torch.equal(gradients[0], others[0])
        hidden = torch.cat([gradients[0], others[0]]) if sequence_parallel else gradients[0]
        joined = [
            hidden,
            *(torch.cat(pair) for pair in zip(gradients[1:], others[1:], strict=True)),
        ]
        for got, expected in zip(joined, want, strict=True):
            assert (got.double() - expected).norm() < 1e-5 * expected.norm(), way
        assert not joined[1][V:].any() and not joined[2][V:].any(), "padding has no gradient"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H))
        self.head = nn.Linear(H, V, bias=False)


@pytest.mark.parametrize("heading", ["FSDP2", "Tensor parallelism"])
def test_the_other_recipes(heading: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    made, model = case(), Small()
    batch = {
        "input_ids": made["token_ids"],
        "token_ids": made["token_ids"].roll(-1, 1),
        "advantages": made["advantages"],
        "mask": made["mask"],
        "old_logps": made["noise"] - 6,
    }
    hidden = model.body(batch["input_ids"])
    tokens = [batch[name] for name in ("token_ids", "advantages", "old_logps")]
    want = cfpo_loss(model.head(hidden), *tokens, mask=batch["mask"])
    want.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with one_process():
        found = run_recipe(
            heading,
            model=model,
            mesh=init_device_mesh("cpu", (1,)),
            body=model.body,
            head=model.head,
            layers=[model.body[1]],
            n_tokens=batch["mask"].sum(),
            n_ranks=1,
            **batch,
        )
        got = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
               for p in model.parameters()]  # fmt: skip
        torch.testing.assert_close(found["loss"].detach(), want.detach())
    for x, y in zip(got, gradients, strict=True):
        torch.testing.assert_close(x, y)
