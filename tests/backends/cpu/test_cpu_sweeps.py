"""Where the CPU's sweeps change from one form to another: offsets, sizes of gradients, segments."""

from __future__ import annotations

import pytest
import torch
from oracle import check, logps64, make_case, with_everything

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [-5e3, -300.0, -72.0, -60.0, 300.0, 360.0, 5e3, 13e3])
def test_offsets(dtype: torch.dtype, offset: float, level: str) -> None:
    # Exponentials are taken apart exactly only for references from -100 to 16384; the exponent
    # field of a bfloat16 gradient is found without a detour for those up to some 500.
    case = make_case(6, 9001, dtype, offset=offset)
    check(case)
    check(with_everything(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-28, 1e20, 1e27, 1e32])
def test_sizes_of_gradients(dtype: torch.dtype, size: float, level: str) -> None:
    case = make_case(6, 9001, dtype, reduction="sum")
    case.old_logps = logps64(case.logits, case.token_ids).float() - 0.05
    case.advantages = torch.tensor([1.0, -1.0, 0.7, -0.7, 1.3, -1.3]) * size
    got = check(case)
    assert got.dlogits.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_peak_between_the_guess_and_the_guard(dtype: torch.dtype, level: str) -> None:
    # From 16 to 200 binades above the guess of the reference: summed again, and never lost.
    for height in (8.0, 12.0, 40.0, 85.0, 90.0, 140.0):
        case = make_case(4, 9001, dtype, spread=0.5)
        case.logits[:, 8500] = height
        case.token_ids[:2] = 8500
        case.old_logps = logps64(case.logits, case.token_ids).float() - 0.05
        check(case)
