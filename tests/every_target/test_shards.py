"""Columns of longer rows (KernelRows.sharded): their sums, their gradient, and what they merge to.

The kernels are called as the parallel losses call them: below the operators.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from oracle import DTYPES, make_case
from stages import (
    Arrived,
    Sums,
    as_pair,
    borders,
    check_gradient,
    exact,
    gradient,
    kernels,
    merge,
    rows_of,
    sums,
    temperatures,
)
from targets import GPUS, Target
from torch import Tensor

from cfpo_kernels import CFPO, VocabParallel, reference, vocab_parallel
from cfpo_kernels.backends.base import KernelTerms
from cfpo_kernels.inputs import LossSettings, TokenInputs
from cfpo_kernels.vocab_parallel import BLOCK, Shards

pytestmark = pytest.mark.not_on("reference", reason="it has no kernels; test_the_reference")

FAR = (2**32 + 3, -(2**40), 2**62)  # ids whose low bits are columns


# --- Stage 1 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [1, 7, 1000, 20001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_that_is_elsewhere(dtype: torch.dtype, v: int) -> None:
    ids = torch.tensor([0, v - 1, v // 2, v, v + 3, -1, -v, *FAR])
    case, t = make_case(len(ids), v, dtype, seed=v), temperatures(len(ids))
    want = exact(case.logits, ids, t)
    for with_entropy in (False, True):
        got = sums(rows_of(case.logits, ids, t, sharded=True), with_entropy)
        assert torch.equal(got.logps == -math.inf, want.logps == -math.inf)
        torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.total, want.total, rtol=1e-7, atol=1e-6)
        if with_entropy:
            torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=3e-6, atol=3e-6)
    whole = sums(rows_of(case.logits[:3], ids[:3], t[:3]))
    for name, x in whole._asdict().items():
        assert torch.equal(getattr(got, name)[:3], x), f"{name} of a token that is here"


def test_a_row_alone_has_the_same_bits() -> None:
    """Also where several threads or programs share it."""
    v = 40001
    ids = torch.tensor([0, v, -1, v - 1, v + 32768])
    case, t = make_case(5, v), temperatures(5)
    case.logits[4] = -math.inf
    rows = rows_of(case.logits, ids, t, sharded=True)
    want = sums(rows)
    arrived = Arrived(as_pair(want.total.clamp(min=3.0)), want.entropy, t, -t)
    dlogits = gradient(rows, arrived)
    for i in range(5):
        alone = rows_of(*(x[i : i + 1] for x in (case.logits, ids, t)), sharded=True)
        for x, y in zip(sums(alone), want, strict=True):
            assert torch.equal(x, y[i : i + 1])
        its = Arrived(*(x[i : i + 1] for x in arrived if x is not None))
        assert torch.equal(gradient(alone, its), dlogits[i : i + 1])


@pytest.mark.parametrize("peak", [0.5, 0.9, 0.99, 0.9999, 0.999999])
@pytest.mark.parametrize("shards", [2, 3, 4])
def test_shards_merge_into_the_row(shards: int, peak: float) -> None:
    v = 9001
    pieces = borders(v, shards)
    ids = torch.tensor(
        [column for first, last in pieces for column in (first, last - 1, first + 9)]
    )
    n, t = len(ids), temperatures(len(ids))
    logits = torch.randn(n, v, generator=torch.Generator().manual_seed(shards))
    logits.scatter_(1, ids[:, None], -math.inf)
    others = (logits / t[:, None]).logsumexp(-1)
    logits.scatter_(1, ids[:, None], ((others + math.log(peak / (1 - peak))) * t)[:, None])
    parts = []
    for first, last in pieces:
        part = rows_of(logits[:, first:last], ids - first, t, sharded=True)
        parts.append(sums(part))
    got, want = merge(parts, t), exact(logits, ids, t)
    # log p = -1e-6 of a likely token: the shard that has it knows the rest of itself as exactly.
    torch.testing.assert_close(got.logps, want.logps, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.total, want.total, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=3e-6, atol=3e-6)


def of_blocks(logits: Tensor, ids: Tensor, t: Tensor, starts: tuple[int, ...]) -> list[Tensor]:
    """Sums and entropies of the vocabulary's blocks, which shards that begin there have found."""
    v, found = logits.shape[1], []
    ranges = [(first, last - first) for first, last in pairwise((*starts, v))]
    for first, size in ranges:
        shards = Shards._from_ranges(VocabParallel(None, first, v), size, ranges)
        part = logits[:, first : first + size].clone()
        rows = rows_of(part, ids - first, t, sharded=True)
        its = shards._of_blocks(SimpleNamespace(score=sums), rows, True)  # type: ignore[arg-type]
        found.append([x[: -(-size // shards.block)] for x in its])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_have_the_bits_of_any_split(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = 3 * BLOCK + 517
    ids = torch.tensor([0, BLOCK - 1, BLOCK, 3 * BLOCK, v - 1])
    logits, t = make_case(len(ids), v, dtype, seed=v).logits, temperatures(len(ids))
    splits = ((0,), (0, 2 * BLOCK), (0, BLOCK), (0, BLOCK, 2 * BLOCK, 3 * BLOCK))

    def same_bits() -> bool:
        one, *others = (of_blocks(logits, ids, t, starts) for starts in splits)
        return all(x.equal(y) for found in others for x, y in zip(one, found, strict=True))

    assert same_bits()
    monkeypatch.setattr(vocab_parallel, "BLOCK", 1 << 20)
    assert not same_bits(), "the control: of whole shards"


@pytest.mark.parametrize("v", [7, 1000, 20001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shard_of_bans(dtype: torch.dtype, v: int) -> None:
    """No mass, and no NaN: other shards have all of the row."""
    fills = [-math.inf, torch.finfo(dtype).min]
    fills += [-1e10, -1e30] if dtype == torch.float32 else []
    fills = [fill for fill in fills if fill < -2e9]  # others are logits
    case = make_case(3 * len(fills), v, dtype)
    ids, t = case.token_ids, temperatures(3 * len(fills))
    clean = sums(rows_of(case.logits, ids, t, sharded=True))
    banned = torch.arange(len(ids)) % 3 != 0
    case.logits[banned] = torch.tensor(fills, dtype=dtype).repeat_interleave(3)[banned, None]
    ids[2::3] = v + 1
    for with_entropy in (False, True):
        got = sums(rows_of(case.logits, ids, t, sharded=True), with_entropy)
        assert (got.total[banned] == -math.inf).all() and (got.logps[banned] == -math.inf).all()
        if with_entropy:
            assert (got.entropy[banned] == 0).all()
            for name, x in clean._asdict().items():
                assert torch.equal(getattr(got, name)[~banned], x[~banned])
    # Beside a token that is not banned nothing has mass either.
    case.logits[banned] = -math.inf
    ids[:] = v // 2
    case.logits[:, v // 2] = 0.25
    got = sums(rows_of(case.logits, ids, t, sharded=True))
    assert ((got.total[banned] - 0.25).abs() < 1e-12).all() and (got.logps[banned] == 0).all()
    assert (got.entropy[banned].abs() < 1e-12).all()


@pytest.mark.parametrize("v", [7, 1000, 20001])
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_what_is_not_finite_stays_nan(junk: float, v: int) -> None:
    for base in (0.0, -math.inf, -1e30):
        logits = torch.full((4, v), base)
        logits[:3, v // 2] = junk
        logits[3, v // 2] = 0.0
        ids = torch.tensor([0, v // 2, v, v])
        got = sums(rows_of(logits, ids, torch.ones(1), sharded=True))
        for x in (got.logps, got.total, got.entropy):
            assert x.isnan().tolist() == [True, True, True, False]


def test_only_shards_miss_their_token(target: Target) -> None:
    logits, t = torch.randn(3, 100), torch.ones(1)
    rows = rows_of(logits, torch.tensor([0, 100, 5]), t)
    if not target.name.startswith("triton") and target.name not in GPUS:  # where nobody looks
        with pytest.raises((ValueError, IndexError), match="100"):
            sums(rows)
    masked = rows._replace(weights=torch.tensor([1.0, 0.0, 1.0]), sharded=True)
    got = sums(masked)
    assert got.logps[1] == 0 and not got.lse[1].any() and got.entropy[1] == 0


# --- Stage 3 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("v", [3, 1000, 20001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_columns(dtype: torch.dtype, v: int, inplace: bool) -> None:
    g = torch.Generator().manual_seed(v)
    pieces = borders(v, 3)
    ids = torch.tensor([column for first, last in pieces for column in (first, last - 1)])
    n = len(ids)
    case, t = make_case(n, v, dtype, seed=v), temperatures(n)
    whole = rows_of(case.logits, ids, t)
    known = sums(whole)
    for dentropy in (None, torch.randn(n, generator=g)):
        arrived = Arrived(known.lse, known.entropy, torch.randn(n, generator=g), dentropy)
        parts = []
        for first, last in pieces:
            part = rows_of(case.logits[:, first:last], ids - first, t, sharded=True)
            parts.append(gradient(part, arrived, inplace))
        got = torch.cat(parts, 1)
        assert torch.equal(got, gradient(whole, arrived))
        check_gradient(got, case.logits, ids, t, arrived)


def test_nothing_is_stored_for_a_token_that_is_elsewhere() -> None:
    for v in (7, 1000, 20001):
        ids = torch.tensor([v, v + 5, -1, -8, -9000, v + 9000, *FAR])
        n = len(ids)
        logits, t = make_case(n, v).logits, temperatures(n)
        lse = exact(logits, ids, t).total + 0.5
        arrived = Arrived(
            as_pair(lse), torch.full((n,), 2.0), torch.linspace(-1, 1, n), torch.ones(n)
        )
        got = gradient(rows_of(logits, ids, t, sharded=True), arrived)
        log_p = (logits.double() - lse[:, None]) / t[:, None]
        c, h = arrived.dlogps.double()[:, None], -1.0
        want = log_p.exp() * (h * (log_p + 2.0) - c) / t[:, None]
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item()
        )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_bans(dtype: torch.dtype, inplace: bool) -> None:
    for v in (7, 1000, 20001):
        for fill in (-math.inf, torch.finfo(dtype).min):
            n, ids = 3, torch.tensor([v, -1, v + 9000])
            logits = torch.full((n, v), fill, dtype=dtype)
            ones, lse = torch.ones(n), as_pair(torch.full((n,), 3.0).double())
            arrived = Arrived(lse, ones, ones, None)
            for dentropy in (None, ones):
                rows = rows_of(logits, ids, torch.ones(1), sharded=True)
                got = gradient(rows, arrived._replace(dentropy=dentropy), inplace)
                assert not got.any()


def test_a_loss_of_a_shard_is_refused() -> None:
    case = make_case(3, 100)
    rows = rows_of(case.logits, case.token_ids, torch.ones(1), sharded=True)
    terms = KernelTerms(
        TokenInputs(case.advantages, case.old_logps), LossSettings(CFPO().shape(), "k3"), None
    )
    loss, logps = torch.empty(3), torch.empty(3)
    with pytest.raises(ValueError, match="sharded"):
        kernels(case.logits).policy_loss(
            rows, terms, loss=loss, logps=logps, entropy=None, dlogits=None
        )


# --- Plain torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference(dtype: torch.dtype) -> None:
    """Merges into the row, and so does the gradient of what was merged."""
    v = 101
    ids = torch.tensor([0, 33, 34, 100, 50, 7])
    n, t = len(ids), temperatures(len(ids))
    logits = make_case(n, v).logits.to(dtype)
    logits[4, 35:] = -math.inf
    logits[4, 50] = 2.0
    active = torch.ones(n, dtype=torch.bool)
    leaf, whole = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    parts = []
    for first, last in borders(v, 4):
        logps, entropy, lse = reference.token_logps(
            leaf[:, first:last], ids - first, active, t, True, True, sharded=True
        )
        parts.append(Sums(logps, lse, entropy))
    got, want = merge(parts, t), exact(logits, ids, t)
    assert any((part.total == -math.inf).any() for part in parts)
    for x, y in ((got.logps, want.logps), (got.total, want.total), (got.entropy, want.entropy)):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    (got.logps + 0.3 * got.entropy).sum().backward()
    logps, entropy, _ = reference.token_logps(whole, ids, active, t, True, False)
    (logps + 0.3 * entropy).sum().backward()
    assert leaf.grad is not None and whole.grad is not None
    torch.testing.assert_close(leaf.grad, whole.grad, rtol=1e-4, atol=1e-6)
