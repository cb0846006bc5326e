"""A head that FSDP2 or DDP wraps: the loss inside its forward, over two processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heads import relative
from ranks import found_by_ranks
from torch import Tensor, nn

import cfpo_kernels
from cfpo_kernels import LinearCFPOLoss
from cfpo_kernels.linear import module

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")

V, H, N, WORLD = 517, 32, 40, 2


class Model(nn.Module):
    """As much of a language model as matters here; its forward computes the loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.how = {"low_memory": True} if "slices" in name else {}
        self.embedding = nn.Embedding(V, H)
        self.hidden = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)
        if "tied" in name:
            self.head.weight = self.embedding.weight
        self.head.weight.requires_grad_("frozen" not in name)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        hidden = torch.tanh(self.hidden(self.embedding(batch["inputs"])))
        criterion = LinearCFPOLoss(head=self.head, chunk_tokens=16)
        return criterion(
            hidden,
            batch["ids"],
            batch["advantages"],
            batch["old"],
            mask=batch["mask"],
            return_stats=True,
            **self.how,
        )


def batch_of(rank: int, step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(10 * step + rank)
    return {
        "inputs": torch.randint(0, V, (N,), generator=g),
        "ids": torch.randint(0, V, (N,), generator=g),
        "advantages": torch.randn(N, generator=g),
        "old": torch.full((N,), -6.2),
        "mask": torch.rand(N, generator=g) < 0.8,
    }


LEARNING_RATE, FACTOR = 0.5, 2.0


def one_process(model: Model) -> list[dict[str, Tensor]]:
    """Parameters after each of two steps over the batches of all."""
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(WORLD):
            (model(batch_of(rank, step))[0] * FACTOR / WORLD).backward()
        optimizer.step()
        found.append({name: x.detach().clone() for name, x in model.named_parameters()})
    return found


# Over the vocabulary in slices the weight is read in backward too, where it is gathered again.
WRAPPED = ("own", "own-slices", "root", "tied", "tied-slices", "frozen", "ddp", "ddp-unused")


def wrapped(name: str) -> tuple[Model, nn.Module]:
    """The model, and as it is wrapped."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Model(name)
    start = copy.deepcopy(model)
    if "ddp" in name:
        unused = "unused" in name
        return start, nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    if "own" in name:
        fully_shard(model.head)
    fully_shard(model)
    return start, model


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x.detach().clone()


def run(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in WRAPPED:
        start, model = wrapped(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        steps = []
        for step in range(2):  # a handle of the first step's memory would show in the second
            optimizer.zero_grad()
            (model(batch_of(rank, step))[0] * FACTOR).backward()
            optimizer.step()
            steps.append({n: whole(x) for n, x in model.named_parameters()})
        want = one_process(start)
        results[name] = [
            max(relative(x, want[step][n.removeprefix("module.")]) for n, x in found.items())
            for step, found in enumerate(steps)
        ]
        moved = [relative(want[0][n], x) for n, x in wrapped_start(name).items()]
        results[f"{name}-moved"] = max(moved)
    results["ddp-outside"] = ddp_with_the_loss_outside(rank)
    results["own-unhooked"] = said_without_the_heads_hooks(rank)
    _, model = wrapped("root")
    batch = batch_of(rank, 0)
    try:
        cfpo_kernels.linear_cfpo_loss(
            torch.randn(N, H), model.head.weight, batch["ids"], batch["advantages"]
        )
    except ValueError as error:
        results["outside"] = str(error)
    return results


def ddp_with_the_loss_outside(rank: int) -> float:
    """The mistake: the model's own forward is called, which DDP knows nothing of."""
    start, model = wrapped("ddp")
    (model.module(batch_of(rank, 0))[0] * FACTOR).backward()
    for rank_of_batch in range(WORLD):
        (start(batch_of(rank_of_batch, 0))[0] * FACTOR / WORLD).backward()
    got, want = model.module.head.weight.grad, start.head.weight.grad
    assert got is not None and want is not None
    return relative(got, want)


def said_without_the_heads_hooks(rank: int) -> str:
    """The mistake: the module calls no forward of the head's, whose hooks would have gathered."""

    @contextmanager
    def in_no_forward(head: nn.Module, function: Any) -> Iterator[None]:
        with forward_of(head, function), pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(head), "__call__", lambda self, given: function(given))
            yield

    forward_of = module.forward_of
    _, model = wrapped("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "forward_of", in_no_forward)
        try:
            model(batch_of(rank, 0))
        except ValueError as error:
            return str(error)
    return ""


def wrapped_start(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Model(name)
    return {n: x.detach() for n, x in model.named_parameters()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return found_by_ranks(run, n=WORLD)


@pytest.mark.parametrize("name", WRAPPED)
def test_two_steps_are_those_of_one_process(results: Any, name: str) -> None:
    for found in results:
        assert max(found[name]) < 1e-6
        assert found[f"{name}-moved"] > 1e-4  # the control: there was something to get wrong


def test_outside_of_the_heads_forward_it_says_where_to_go(results: Any) -> None:
    for found in results:
        assert "sharded over processes (FSDP): only inside the head's forward" in found["outside"]
        assert "LinearCFPOLoss(head=lm_head)" in found["outside"]


def test_a_loss_outside_of_ddps_forward_is_noticed(results: Any) -> None:
    """The head's gradient stays the process's own, at which the tests above would fail."""
    for found in results:
        assert found["ddp-outside"] > 0.1


def test_a_module_that_passes_the_heads_hooks_by_is_noticed(results: Any) -> None:
    for found in results:
        assert "sharded over processes (FSDP)" in found["own-unhooked"]
