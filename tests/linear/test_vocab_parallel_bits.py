"""The split of a vocabulary or of a batch over processes changes no bit of what is promised."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import found_by_ranks
from targets import LEVELS
from torch import Tensor

from cfpo_kernels import CFPO, VocabParallel, policy_loss, sequences, token_logps, vocab_parallel

WORLD = 4
N, V = 24, 4 * 1024 + 517  # the last block is short, and so is a shard
# The first column of each shard, for groups of 1, 2 and 4 processes; uneven ones too.
SPLITS: dict[str, tuple[int, ...]] = {
    "one": (0,),
    "two": (0, 2048),
    "two, uneven": (0, 1024),
    "four": (0, 1024, 2048, 3072),
    "four, uneven": (0, 1024, 3072, 4096),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The CPU kernels of each level that this machine has, and plain torch.
BACKENDS = (*(f"cpu {level}" for level in LEVELS), "reference")


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in tensors)).hexdigest()


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(N, V, generator=g) * 3
    token_ids = torch.randint(0, V, (N,), generator=g)
    token_ids[:6] = torch.tensor([0, 1023, 1024, 3071, 4096, V - 1])  # on both sides of borders
    logits[6, token_ids[6]] = 30.0  # nearly all the mass
    logits[7, 1024:2048] = -math.inf  # nothing in one shard
    logits[8] += 1e4
    return {
        "logits": logits.to(dtype),
        "token_ids": token_ids,
        "advantages": torch.randn(N, generator=g),
        "old_logps": -8 + torch.randn(N, generator=g),
        "ref_logps": -8 + torch.randn(N, generator=g),
    }


def results(dtype: torch.dtype, backend: str, starts: tuple[int, ...], group: Any) -> list[str]:
    given = inputs(dtype)
    backend, _, level = backend.partition(" ")
    if level:
        os.environ["CFPO_KERNELS_CPU_LEVEL"] = level
    rank = group.rank()
    columns = slice(starts[rank], [*starts, V][rank + 1])
    shard = given.pop("logits")[:, columns].clone()
    how: dict[str, Any] = {
        "vocab_parallel": VocabParallel(group, columns.start, V),
        "temperature": 0.7,
        "backend": backend,
    }
    ids = given.pop("token_ids")
    scored = token_logps(shard, ids, return_entropy=True, return_lse=True, **how)
    leaf = shard.requires_grad_()
    loss = policy_loss(leaf, ids, **given, objective=CFPO(), kl_coef=0.1, entropy_coef=0.01, **how)
    assert isinstance(loss, Tensor)
    loss.backward()
    return [digest(x) for x in (*scored, loss)]


def data_parallel(group: Any) -> str:
    """The loss of 12 sequences that are split over the group's processes."""
    totals = totals_of(group.rank(), group.size())
    return digest(sequences.order_free_sum(totals, group=group) / 12)


def totals_of(rank: int, size: int) -> Tensor:
    """Each sequence's loss, of those that one process has of a batch."""
    g = torch.Generator().manual_seed(8)
    logits, noise = torch.randn(12, 9, 211, generator=g), torch.randn(12, 9, generator=g)
    ids, advantages = torch.randint(0, 211, (12, 9), generator=g), torch.randn(12, generator=g)
    mask = torch.arange(9) < torch.randint(1, 10, (12, 1), generator=g)
    mine = [x.chunk(size)[rank] for x in (logits, ids, advantages, noise - 5.4, mask)]
    losses = policy_loss(*mine[:4], mask=mine[4], objective=CFPO(), reduction="none")
    assert isinstance(losses, Tensor)
    return sequences.sequence_mean(losses, mine[4])


def found_by(groups: dict[int, Any], rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for backend in BACKENDS:
            for name, starts in SPLITS.items():
                if rank < len(starts):
                    group = groups[len(starts)]
                    found[f"{dtype} {backend} {name}"] = results(dtype, backend, starts, group)
    for size, group in groups.items():
        if rank < size:
            found[f"data parallel {size}"] = data_parallel(group)
    return found


def worker(rank: int) -> dict[str, Any]:
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}
    found = found_by(groups, rank)
    # Whole shards in place of blocks: the bits then tell where a shard ends.
    vocab_parallel.BLOCK = 1 << 20
    for name in ("one", "four"):
        if rank < len(SPLITS[name]):
            group = groups[len(SPLITS[name])]
            found[f"whole {name}"] = results(torch.float32, BACKENDS[0], SPLITS[name], group)
    for start in (0, 1000):  # an overlap; a gap
        try:
            shard = torch.zeros(2, 900 if rank else 1024)
            token_logps(
                shard,
                torch.zeros(2, dtype=torch.int64),
                vocab_parallel=VocabParallel(groups[4], start + 900 * rank, 4096),
            )
        except ValueError as error:
            found[f"error {start}"] = str(error)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return found_by_ranks(worker, n=WORLD)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_split_at_multiples_of_1024_gives_the_same_bits(
    dtype: torch.dtype, backend: str, found: list[dict[str, Any]]
) -> None:
    want = found[0][f"{dtype} {backend} one"]
    assert len(want) == 4  # log-probs, entropies, log-sum-exps, the loss
    for name, starts in SPLITS.items():
        for rank in range(len(starts)):
            assert found[rank][f"{dtype} {backend} {name}"] == want, (name, rank)


def test_whole_shards_would_not(found: list[dict[str, Any]]) -> None:
    assert found[0]["whole four"] != found[0]["whole one"]
    for rank in range(WORLD):
        assert found[rank]["whole four"] == found[0]["whole four"], "ranks always agree"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_shard_is_right(dtype: torch.dtype) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            given = inputs(dtype)
            logits, ids = given["logits"], given["token_ids"]
            where = VocabParallel(dist.group.WORLD, 0, V)
            logps, entropy, lse = token_logps(
                logits, ids, return_entropy=True, return_lse=True, vocab_parallel=where
            )
        finally:
            dist.destroy_process_group()
    exact = torch.log_softmax(logits.double(), -1)
    want = exact.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), want, rtol=2e-7, atol=0)
    parts = torch.where(exact.isinf(), 0.0, exact.exp() * exact)
    torch.testing.assert_close(entropy.double(), -parts.sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=0)


def test_the_loss_of_data_parallel_processes(found: list[dict[str, Any]]) -> None:
    digests = {found[rank][f"data parallel {size}"] for size in (1, 2, 4) for rank in range(size)}
    assert len(digests) == 1
    # Sums in the order of the split differ, here of one batch in other orders: the control.
    totals = totals_of(0, 1)
    orders = [
        totals[torch.randperm(12, generator=torch.Generator().manual_seed(i))] for i in range(9)
    ]
    assert len({sum(x.tolist()) for x in orders}) > 1
    assert len({sequences.order_free_sum(x).item() for x in orders}) == 1


@pytest.mark.parametrize("start", [0, 1000])
def test_columns_that_are_not_the_vocabulary(start: int, found: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        message = found[rank][f"error {start}"]
        assert "must be the vocabulary" in message
        assert "vocab_size=4096" in message


def test_order_free_sum() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=g, dtype=torch.float64).exp() ** 3
    x = x * torch.randn(500, generator=g, dtype=torch.float64).sign()
    want = sequences.order_free_sum(x)
    assert want.item() == math.fsum(x.tolist())
    assert torch.equal(sequences.order_free_sum(x[torch.randperm(500, generator=g)]), want)
    assert x.flip(0).sum() != x.sum(), "the control"
    assert sequences.order_free_sum(torch.tensor([1.0, math.nan])).isnan()
    assert sequences.order_free_sum(torch.tensor([math.inf, -math.inf])).isnan()
    assert sequences.order_free_sum(torch.tensor([math.inf, 1.0])) == math.inf
    assert sequences.order_free_sum(torch.empty(0)) == 0
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    sequences.order_free_sum(leaf * 3).backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [3.0, 3.0]
