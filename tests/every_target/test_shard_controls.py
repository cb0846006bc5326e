"""Positive controls: kernels that get shards or softcaps wrong must fail the tests of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_entropy_confident as confident
import test_shards as shards
import test_softcap as softcaps
import torch
from stages import as_pair
from torch import Tensor

from cfpo_kernels import backends
from cfpo_kernels.backends.base import KernelRows
from cfpo_kernels.backends.cpu import CPU

pytestmark = pytest.mark.only_on("cpu", reason="one set of kernels is broken on purpose")

Defect = Callable[[KernelRows, Tensor], None]  # changes the gradient


class Broken:
    """The CPU kernels with a defect: `before` changes what they are told, `after` their gradient;
    `lse` what stage 1 leaves."""

    def __init__(
        self,
        before: Callable[[KernelRows], KernelRows] = lambda rows: rows,
        after: Defect = lambda rows, dlogits: None,
        lse: Callable[[Tensor], Tensor] = lambda lse: lse,
    ) -> None:
        self.before, self.after, self.lse = before, after, lse

    def token_logps(self, rows: KernelRows, **outputs: Any) -> None:
        CPU.token_logps(self.before(rows), **outputs)
        outputs["lse"].copy_(self.lse(outputs["lse"]))

    def token_logps_backward(self, rows: KernelRows, **tensors: Any) -> None:
        given = rows._replace(logits=rows.logits.clone())
        CPU.token_logps_backward(self.before(rows), **tensors)
        self.after(given, tensors["dlogits"])

    def policy_loss(self, rows: KernelRows, *terms: Any, **outputs: Any) -> None:
        given = rows._replace(logits=rows.logits.clone())
        CPU.policy_loss(self.before(rows), *terms, **outputs)
        self.after(given, outputs["dlogits"])


def wrapped(rows: KernelRows) -> KernelRows:
    """The token's low bits taken for its column."""
    return rows._replace(token_ids=rows.token_ids & 0xFFFFFFFF)


def clamped(rows: KernelRows) -> KernelRows:
    return rows._replace(token_ids=rows.token_ids.clamp(0, rows.logits.shape[1] - 1))


def without_softcap(rows: KernelRows) -> KernelRows:
    return rows._replace(softcap=0.0)


def without_slope(rows: KernelRows) -> KernelRows:
    capped = softcaps.capped(rows.logits, rows.softcap)
    return rows._replace(logits=capped.to(rows.logits.dtype), softcap=0.0)


def another_softcap(rows: KernelRows) -> KernelRows:
    return rows._replace(softcap=rows.softcap * 1.001)


def steep_target(rows: KernelRows, dlogits: Tensor) -> None:
    """The target's column without its slope."""
    ids = rows.token_ids[:, None]
    if rows.softcap and not rows.sharded:
        slope = softcaps.slope(rows.logits.gather(1, ids), rows.softcap)
        dlogits.scatter_(1, ids, (dlogits.gather(1, ids) / slope).to(dlogits.dtype))


def with_bans(rows: KernelRows) -> KernelRows:
    """-inf stays what it is."""
    banned, logits = rows.logits == -torch.inf, without_slope(rows).logits
    return rows._replace(logits=torch.where(banned, rows.logits, logits), softcap=0.0)


def rounded_twice(rows: KernelRows, dlogits: Tensor) -> None:
    """The slope, rounded to the storage type, times a gradient that was rounded to it too."""
    if rows.softcap:
        slope = softcaps.slope(rows.logits, rows.softcap).to(dlogits.dtype)
        free = dlogits.double() / softcaps.slope(rows.logits, rows.softcap)
        dlogits.copy_(torch.where(slope == 0, 0, free.to(dlogits.dtype) * slope))


FLOAT, BFLOAT = torch.float32, torch.bfloat16
ELSEWHERE = (shards.test_a_token_that_is_elsewhere, {"dtype": FLOAT, "v": 1000})
BANS = (shards.test_a_shard_of_bans, {"dtype": FLOAT, "v": 1000})
MERGED = (shards.test_shards_merge_into_the_row, {"shards": 3, "peak": 0.9999})
CONFIDENT = (confident.test_shards, {"dtype": BFLOAT})
COLUMNS = (shards.test_gradient_of_columns, {"dtype": FLOAT, "v": 1000, "inplace": False})
STORED = (shards.test_nothing_is_stored_for_a_token_that_is_elsewhere, {})
LOG_PROBS = {"dtype": FLOAT, "v": 1000, "softcap": 4.0, "inplace": False}
SLOPES = (softcaps.test_gradient_of_log_probs, LOG_PROBS)
LOSS = {"dtype": FLOAT, "v": 1000, "everything": False, "inplace": False}
LOSSES = (softcaps.test_gradient_of_a_loss, LOSS)
FLOAT64 = (softcaps.test_a_loss_against_float64, {"softcap": 4.0})
CAPPED_SUMS = (softcaps.test_sums, {"v": 1000, "softcap": 30.0})
VALUES = (softcaps.test_value_of_one_logit, {"softcap": 30.0})
INFINITIES = (softcaps.test_infinities_and_numbers_that_are_none, {"dtype": FLOAT})
DEFECTS: dict[str, tuple[Broken, list[tuple[Callable[..., None], dict[str, Any]]]]] = {
    "the low bits of a token": (Broken(before=wrapped), [ELSEWHERE, STORED]),
    "the nearest column": (Broken(before=clamped), [ELSEWHERE, STORED, COLUMNS]),
    "not a number without mass": (Broken(lse=lambda lse: lse - lse + lse), [BANS]),
    "an lse that is a little too large": (Broken(lse=lambda lse: lse + 1e-5), [MERGED, ELSEWHERE]),
    "an lse of one number": (Broken(lse=lambda lse: as_pair(lse.sum(1))), [CONFIDENT]),
    "no softcap": (Broken(before=without_softcap), [SLOPES, LOSSES, FLOAT64, VALUES, INFINITIES]),
    "another softcap": (Broken(before=another_softcap), [SLOPES, LOSSES, FLOAT64, VALUES]),
    "no slope": (Broken(before=without_slope), [SLOPES, LOSSES, FLOAT64]),
    "capped and rounded to storage": (
        Broken(before=without_slope),
        [(CAPPED_SUMS[0], CAPPED_SUMS[1] | {"dtype": BFLOAT})],
    ),
    "bans behind a softcap": (Broken(before=with_bans), [INFINITIES]),
    "a capped lse that is a little too large": (
        Broken(lse=lambda lse: lse + 1e-5),
        [(CAPPED_SUMS[0], CAPPED_SUMS[1] | {"dtype": FLOAT}), VALUES],
    ),
    "no slope at the target": (Broken(after=steep_target), [SLOPES, LOSSES]),
    "rounded twice": (
        Broken(after=rounded_twice),
        [(test, of | {"dtype": BFLOAT}) for test, of in (SLOPES, LOSSES)],
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, tests = DEFECTS[name]
    for test, arguments in tests:
        test(**arguments)
        with monkeypatch.context() as patched:
            patched.setattr(backends, "kernels", lambda _: broken)
            with pytest.raises(AssertionError):
                test(**arguments)
