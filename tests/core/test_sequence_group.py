"""Sequences that are split over two processes, as context parallelism splits them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import logps64
from ranks import found_by_ranks
from torch import Tensor

import cfpo_kernels

B, T, V = 3, 8, 50
# Of eight tokens a sequence one process has five and the other three; one sequence is all masked in
# one of them.
PARTS = (slice(0, 5), slice(5, 8))
SETTINGS: list[dict[str, Any]] = [
    {"ratio_level": "sequence", "reduction": "sum"},
    {"ratio_level": "sequence", "reduction": "seq-mean-token-mean"},
    {"reduction": "seq-mean-token-mean"},
]

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=g)
    ids = torch.randint(0, V, (B, T), generator=g)
    mask = torch.arange(T) < torch.tensor([8, 4, 7])[:, None]
    old = logps64(logits, ids) - 0.2 * torch.randn(B, T, generator=g)
    return {"logits": logits, "ids": ids, "mask": mask, "old": old.float()}


def loss_of(given: dict[str, Tensor], leaf: Tensor, **options: Any) -> Tensor:
    loss = cfpo_kernels.policy_loss(
        leaf,
        given["ids"],
        torch.tensor([1.0, -1.5, 0.7]),
        given["old"],
        mask=given["mask"],
        objective=cfpo_kernels.PPOClip(0.1, 0.1),
        **options,
    )
    assert isinstance(loss, Tensor)
    return loss


def part_of_a_batch(rank: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for options in SETTINGS:
        given = {name: x[:, PARTS[rank]].contiguous() for name, x in batch().items()}
        leaf = given["logits"].clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that something of torch will go, as well
            loss = loss_of(given, leaf, sequence_group=dist.group.WORLD, **options)
            loss.backward()
        found.append((loss.detach(), leaf.grad))
    return found


def test_two_processes_have_the_parts_of_one() -> None:
    parts = found_by_ranks(part_of_a_batch, n=2)
    for options, first, second in zip(SETTINGS, *parts, strict=True):
        given = batch()
        leaf = given["logits"].clone().requires_grad_()
        want = loss_of(given, leaf, **options)
        want.backward()
        torch.testing.assert_close(first[0] + second[0], want.detach())
        got = torch.cat([first[1], second[1]], 1)
        torch.testing.assert_close(got, leaf.grad, rtol=1e-5, atol=1e-9)
        # Without the group each process would take its part for the whole.
        alone = {name: x[:, PARTS[0]].contiguous() for name, x in given.items()}
        leaf = alone["logits"].clone().requires_grad_()
        loss_of(alone, leaf, **options).backward()
        assert not torch.allclose(leaf.grad, first[1], rtol=1e-3)
