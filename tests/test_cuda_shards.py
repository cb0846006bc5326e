"""Shards of rows, and softcaps, on the CUDA kernels; see test_cuda_kernels.py."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import test_shards as shards
import test_softcap as softcaps
import torch
from emulation import CXX, H100, ONE_SM
from oracle import make_case
from test_cuda_kernels import LEVEL, Target, target  # noqa: F401  # a fixture

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")

DTYPES = shards.DTYPES
ON_GPU_TOO = True
DEVICES = pytest.mark.parametrize("device", [ONE_SM, H100], ids=["rows", "split"])


@DEVICES
@pytest.mark.parametrize("v", [1, 1000, 33001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_that_is_elsewhere(
    dtype: torch.dtype,
    v: int,
    device: Any,
    target: Target,  # noqa: F811
) -> None:
    target.set_device(*device)
    shards.test_a_token_that_is_elsewhere(dtype, v, LEVEL)


# Of 70001 float32 columns each shard is long enough to be split.
GRADIENTS = pytest.mark.parametrize(
    ("v", "device", "inplace"),
    [
        pytest.param(3, ONE_SM, True, id="3"),
        pytest.param(1000, ONE_SM, False, id="1000"),
        pytest.param(20001, ONE_SM, True, id="rows"),
        pytest.param(70001, H100, True, id="split"),
    ],
)


@GRADIENTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_columns(
    dtype: torch.dtype,
    v: int,
    device: Any,
    inplace: bool,
    target: Target,  # noqa: F811
) -> None:
    target.set_device(*device)
    shards.test_gradient_of_columns(dtype, v, inplace, LEVEL)


@GRADIENTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_of_log_probs(
    dtype: torch.dtype,
    v: int,
    device: Any,
    inplace: bool,
    target: Target,  # noqa: F811
) -> None:
    target.set_device(*device)
    softcaps.test_gradient_of_log_probs(dtype, v, 4.0, inplace, LEVEL)


@pytest.mark.parametrize("kernel", ["rows", "split", "cluster"])
@pytest.mark.parametrize("v", [1, 1000, 33001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_of_a_loss(
    dtype: torch.dtype,
    v: int,
    kernel: str,
    target: Target,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target.set_device(*(H100 if kernel == "split" else ONE_SM))
    if kernel == "cluster":
        use_clusters(target, monkeypatch)
    for everything in (False, True):
        softcaps.test_gradient_of_a_loss(dtype, v, everything, not everything, LEVEL)


def use_clusters(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    if target.module is not None:
        target.module.set_device(*H100, True)
    elif torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this device has no clusters")
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "cluster")


def every_dtype(test: Callable[..., None], **arguments: Any) -> list[Any]:
    return [(test, arguments | {"dtype": dtype}) for dtype in DTYPES]


EDGES: list[tuple[Callable[..., None], dict[str, Any]]] = [
    *[
        (shards.test_shards_merge_into_the_row, {"shards": 3, "peak": peak})
        for peak in (0.5, 0.99, 0.999999)
    ],
    *[t for v in (7, 20001) for t in every_dtype(shards.test_a_shard_of_bans, v=v)],
    *[
        (shards.test_what_is_not_finite_stays_nan, {"junk": junk, "v": v})
        for junk in (math.nan, math.inf)
        for v in (7, 1000, 20001)
    ],
    (shards.test_only_shards_miss_their_token, {}),
    (shards.test_nothing_is_stored_for_a_token_that_is_elsewhere, {}),
    *every_dtype(shards.test_gradient_of_bans, inplace=True),
    (shards.test_a_loss_of_a_shard_is_refused, {}),
    (softcaps.test_a_loss_against_float64, {"softcap": 4.0}),
    *every_dtype(softcaps.test_bans_and_numbers_that_are_none),
    (softcaps.test_nothing_else_depends_on_it, {}),
]


@DEVICES
@pytest.mark.parametrize(("test", "arguments"), EDGES, ids=lambda x: getattr(x, "__name__", ""))
def test_the_edges_of_the_cpu_suite(
    test: Callable[..., None],
    arguments: dict[str, Any],
    device: Any,
    target: Target,  # noqa: F811
) -> None:
    target.set_device(*device)
    test(**arguments, level=LEVEL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_from_every_kernel(
    dtype: torch.dtype,
    target: Target,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those of a shard's sums, and of the sums for an entropy that is not wanted."""
    case = softcaps.capped(make_case(5, 33001, dtype), 4.0)
    rows = shards.rows_of(case.logits, case.token_ids, torch.ones(1), softcap=4.0)
    far = rows._replace(sharded=True, token_ids=case.token_ids - 20000)
    want, want_sums = softcaps.policy_gradient(rows, case), shards.sums(far)
    assert torch.equal(shards.sums(far, with_entropy=False).lse, want_sums.lse)
    target.set_device(*H100)
    assert torch.equal(softcaps.policy_gradient(rows, case), want)
    for x, y in zip(shards.sums(far), want_sums, strict=True):
        assert torch.equal(x, y)
    use_clusters(target, monkeypatch)
    assert torch.equal(softcaps.policy_gradient(rows, case), want)
