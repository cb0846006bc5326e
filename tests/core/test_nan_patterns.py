"""Every NaN is one: both signs, quiet and signalling, wherever in a row a sweep may meet it."""

from __future__ import annotations

import pytest
import torch
from oracle import make_case, run, with_everything

import cfpo_kernels

# x86's own default NaN is negative: 0xFFC0 in bfloat16. Compared as integers, or by min and max,
# it is not above +inf but far below everything.
PATTERNS = {
    torch.float32: (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),
    torch.bfloat16: (0x7FC0, 0xFFC0, 0x7F81, 0xFF81, 0x7FFF, 0xFFFF),
    torch.float16: (0x7E00, 0xFE00, 0x7C01, 0xFC01, 0x7FFF, 0xFFFF),
}
V = 20001
# The first columns decide the reference; then a whole vector block, each of its columns; the end.
COLUMNS = (0, 17, *range(8192, 8192 + 128, 5), *range(V - 3, V))


def with_nans(dtype: torch.dtype, bits: int) -> torch.Tensor:
    """(len(COLUMNS) + 1, V): a NaN in each row but the last."""
    logits = make_case(len(COLUMNS) + 1, V, dtype).logits
    integer, width = (torch.int32, 32) if dtype == torch.float32 else (torch.int16, 16)
    signed = bits - (1 << width) if bits >> (width - 1) else bits
    logits.view(integer)[torch.arange(len(COLUMNS)), torch.tensor(COLUMNS)] = signed
    assert torch.equal(logits.isnan().sum(-1)[:-1], torch.ones(len(COLUMNS), dtype=torch.long))
    return logits


@pytest.mark.parametrize("dtype", PATTERNS, ids=str)
@pytest.mark.parametrize("number", range(6))
def test_every_nan_gives_nan(dtype: torch.dtype, number: int, level: str) -> None:
    logits = with_nans(dtype, PATTERNS[dtype][number])
    plain = make_case(len(logits), V, dtype, reduction="none")
    for case in (plain, with_everything(plain)):
        case.logits, case.old_logps = logits.clone(), None
        case.advantages = torch.ones(len(logits))
        got = run(case)
        for what in (got.loss, got.logps, got.entropy):
            assert what[:-1].isnan().all() and what[-1].isfinite()
        assert got.dlogits[:-1].isnan().all() and got.dlogits[-1].isfinite().all()


@pytest.mark.parametrize("dtype", PATTERNS, ids=str)
@pytest.mark.parametrize("number", range(6))
def test_every_nan_gives_nan_when_it_is_scored(dtype: torch.dtype, number: int, level: str) -> None:
    logits = with_nans(dtype, PATTERNS[dtype][number])
    ids = torch.full((len(logits),), 5)
    ids[1] = COLUMNS[1]  # the target itself
    for entropy in (False, True):
        got = cfpo_kernels.token_logps(logits, ids, return_entropy=entropy)
        for what in got if isinstance(got, tuple) else (got,):
            assert what[:-1].isnan().all() and what[-1].isfinite()
