"""What each wrapper of csrc/cuda/primitives_ptx.h and primitives_sm90.h has to do.

A kernel of tests/cpp/ptx_wrappers.cu each; `check` runs it and compares with NumPy, or with values
that are written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .interpreter import How, Module, PtxError, pack

Array = Any  # numpy's types say nothing here
Check = Callable[["Runner"], None]

CHECKS: dict[str, Check] = {}
OF_CLUSTERS: set[str] = set()


def wrapper(check: Check) -> Check:
    CHECKS[check.__name__] = check
    return check


def of_clusters(check: Check) -> Check:
    OF_CLUSTERS.add(check.__name__)
    return wrapper(check)


class Runner:
    """Launches the kernels of one module in one way."""

    def __init__(self, module: Module, how: How) -> None:
        self.module, self.how = module, how
        self.rng = np.random.default_rng(how.seed)

    def __call__(
        self, name: str, block: int, *arguments: Any, grid: Any = 1, **options: Any
    ) -> None:
        memory, values = [], []
        for a in arguments:
            if isinstance(a, np.ndarray):
                memory.append((a.ctypes.data, a.nbytes, True))
                values.append(("q", a.ctypes.data))
            else:
                values.append(("?" if isinstance(a, bool) else "i", a))
        grid = grid if isinstance(grid, tuple) else (grid,)
        self.module.launch(
            f"test_{name}", grid, (block,), pack(*values), how=self.how, memory=memory, **options
        )

    def words(self, n: int) -> Array:
        """Random ones from a 16-byte boundary on."""
        x = aligned(n)
        x[:] = self.rng.integers(0, 2**32, n, dtype=np.uint64)
        return x

    def floats(self, n: int) -> Array:
        return self.rng.standard_normal(n).astype(np.float32)


def aligned(n: int) -> Array:
    memory = np.zeros(4 * n + 16, np.uint8)
    at = -memory.ctypes.data % 16
    return memory[at : at + 4 * n].view(np.uint32)


def equal(got: Array, want: Array) -> None:
    wrong = np.flatnonzero(np.asarray(got).ravel() != np.asarray(want).ravel())
    assert wrong.size == 0, f"{wrong.size} of {np.size(got)} are wrong, the first at {wrong[0]}"


@wrapper
def indices(run: Runner) -> None:
    out = np.full(2 * 3 * 64 * 4, -1, np.int64)
    run("indices", 64, out, grid=(3, 2))
    t, x, y = np.arange(64), np.arange(3)[:, None], np.arange(2)[:, None, None]
    want = [np.broadcast_to(a, (2, 3, 64)) for a in (t, x * 1000 + 3, y * 1000 + 2, np.int64(64))]
    equal(out, np.stack(want, -1))


@wrapper
def stop(run: Runner) -> None:
    with pytest.raises(PtxError, match=r"trap\n.* thread 3,"):
        run("stop", 32)


@wrapper
def sync_block(run: Runner) -> None:
    out = np.zeros(96, np.int32)
    run("sync_block", 96, out, shared=384)
    equal(out, 7 * np.arange(96)[::-1])


@wrapper
def sync_warp(run: Runner) -> None:
    out = np.zeros(96, np.int32)
    run("sync_warp", 96, out, shared=384)
    equal(out, 3 * (np.arange(96) ^ 31))


@wrapper
def sync_threads(run: Runner) -> None:
    for count in (32, 64, 96):
        out = np.full(96, -1, np.int32)
        run("sync_threads", 96, out, count, shared=384)
        equal(out, np.append(5 * np.arange(count)[::-1], np.full(96 - count, -1)))


@wrapper
def shuffles(run: Runner) -> None:
    x, d = run.floats(64), run.rng.standard_normal(64)
    for mask, lane in ((16, 0), (8, 31), (4, 5), (2, 17), (1, 30), (31, 1)):
        got, of_doubles = np.zeros(128, np.float32), np.zeros(64)
        run("shuffles", 64, x, got, d, of_doubles, mask, lane)
        equal(got[::2], x[np.arange(64) ^ mask])
        equal(of_doubles, d[np.arange(64) ^ mask])
        equal(got[1::2], x[np.arange(64) // 32 * 32 + lane])


@wrapper
def ballot(run: Runner) -> None:
    for bits in (1, 0x80000000, 0x00F0A000, 0xFFFFFFFF):
        x, got = np.array([bits >> i & 1 for i in range(32)], np.int32), np.zeros(64, np.uint32)
        run("ballot", 32, x, got)
        equal(got[::2], bits)
        equal(got[1::2], (bits & -bits).bit_length() - 1)


@wrapper
def warp_max(run: Runner) -> None:
    lane = np.arange(32)
    for x in (
        run.floats(32),
        -abs(run.floats(32)),
        np.full(32, -np.inf),
        np.where(lane == 9, -1e-40, -1e30),
        np.where(lane == 31, np.inf, -np.inf),
    ):
        x, got = x.astype(np.float32), np.zeros(32, np.float32)
        run("warp_max", 32, x, got)
        equal(got, x.max())


@wrapper
def copies(run: Runner) -> None:
    """Those groups have landed that were waited for, and late no others."""
    for groups, pending in (
        *((1, 0), (9, 0), (9, 3), (9, 7), (9, 8), (9, 20)),
        *((4, 1), (4, 2), (7, 4), (8, 5), (8, 6)),
    ):
        landed = max(0, groups - min(pending, 7))
        x, got = run.words(64 * groups * 4), aligned(64 * groups * 4)

        options = {"shared": 64 * groups * 16}
        arguments = (x, got, groups, pending)
        run("copies", 64, *arguments, landed, groups % 2 == 1, **options)
        x, got = x.reshape(64, groups, 4), got.reshape(64, groups, 4)
        equal(got[:, :landed], x[:, :landed])
        if run.how.async_ == "late" and landed < groups:
            with pytest.raises(PtxError, match="on its way"):
                run("copies", 64, *arguments, landed + 1, False, **options)


@wrapper
def vectors(run: Runner) -> None:
    x, got = run.words(64 * 4), aligned(64 * 4)
    run("vectors", 64, x, got, shared=1024)
    equal(got, x.reshape(64, 4)[::-1] + np.array([1, 2, 0, 4], np.uint32))


@wrapper
def store_elements(run: Runner) -> None:
    x = run.floats(32)
    f, b, h = np.zeros(32, np.float32), np.zeros(32, np.uint16), np.zeros(32, np.uint16)
    run("store_elements", 32, x, f, b, h)
    equal(f, x), equal(b, to_bfloat16(x)), equal(h, to_half(x))


@wrapper
def exp2(run: Runner) -> None:
    x = run.rng.uniform(-125, 127, 32).astype(np.float32)
    x[:12] = [0, -0.0, 1, -1, -125, 127, -127, -150, -np.inf, 129, np.inf, np.nan]
    got = np.zeros(32, np.float32)
    run("exp2", 32, x, got)
    ordinary = (x >= -125) & (x <= 127)
    error = got[ordinary] / np.exp2(x[ordinary].astype(np.float64)) - 1
    assert abs(error).max() < 2.0**-21.5, f"an error of 2^{np.log2(abs(error).max()):.1f}"
    equal(got[6:11], [0, 0, 0, np.inf, np.inf])
    assert np.isnan(got[11])


@wrapper
def funnel_shift(run: Runner) -> None:
    x, got = run.words(96), np.zeros(32, np.uint32)
    x[2::3] = np.arange(32)
    run("funnel", 32, x, got)
    both = x[0::3].astype(np.uint64) | x[1::3].astype(np.uint64) << np.uint64(32)
    equal(got, (both >> x[2::3].astype(np.uint64)).astype(np.uint32))


@wrapper
def half_to_float(run: Runner) -> None:
    """Every half."""
    x, got = np.arange(65536, dtype=np.uint16), np.zeros(65536, np.float32)
    run("from_half", 256, x, got, grid=256)
    want = x.view(np.float16).astype(np.float32)
    nan = np.isnan(want)
    equal(np.isnan(got), nan)
    equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


def to_bfloat16(x: Array) -> Array:
    """To the nearest, ties to even; any NaN to 0x7FFF."""
    bits = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def to_half(x: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        bits = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint64)


# Ties, the ends of both formats, subnormals.
SPECIAL = [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, -65520, 1e-8]
SPECIAL += [2**-24, 2**-25, 2**-25 * 1.0001, 2**-14, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8]
SPECIAL += [1 + 3 * 2**-8, 3.4e38, -3.4e38, 1e-40, 0.1]


@wrapper
def floats_to_pairs(run: Runner) -> None:
    """The first argument becomes the lower half."""
    special = np.array(SPECIAL, np.float32)
    x = np.concatenate([np.repeat(special, len(special)), run.words(2048).view(np.float32)])
    y = np.concatenate([np.tile(special, len(special)), run.words(2048).view(np.float32)])
    n = len(x) // 32 * 32
    pairs = np.stack([x[:n], y[:n]], 1)
    halves, bfloats = np.zeros(n, np.uint32), np.zeros(n, np.uint32)
    run("to_halves", 32, pairs, halves, bfloats, grid=n // 32)
    equal(halves, to_half(x[:n]) | to_half(y[:n]) << np.uint64(16))
    equal(bfloats, to_bfloat16(x[:n]) | to_bfloat16(y[:n]) << np.uint64(16))


@wrapper
def max_pairs(run: Runner) -> None:
    """Of both halves; the other one of a NaN, and +0 of zeros."""
    special = np.array(SPECIAL, np.float32)
    # The NaN of halves is a number in bfloat16.
    for place, (to, nan) in enumerate(((to_half, 0x7E00), (to_bfloat16, 0x7FC0))):
        numbers = to(special).astype(np.uint32)
        numbers[np.isnan(special)] = nan
        a, b = np.repeat(numbers, len(numbers)), np.tile(numbers, len(numbers))
        n = len(a) // 32 * 32
        pairs = np.stack([a[:n] | b[:n] << 16, b[:n] | a[:n] << 16], 1)
        got = [np.zeros(n, np.uint32), np.zeros(n, np.uint32)]
        run("max_pairs", 32, pairs, *got, grid=n // 32)
        x, y = (np.repeat(special, len(special))[:n], np.tile(special, len(special))[:n])
        # fmax, but of zeros by their signs.
        larger = np.where(x == y, np.where(np.signbit(x), y, x), np.fmax(x, y))
        want = to(larger).astype(np.uint32)
        equal(got[place], want | want << 16)


@of_clusters
def cluster_rank(run: Runner) -> None:
    for n in (1, 2, 4, 8):
        out = np.zeros(2 * n, np.int32)
        run("cluster_rank", 32, out, grid=2 * n, cluster=n)
        equal(out, 100 + np.arange(2 * n) % n)


@of_clusters
def cluster_barrier(run: Runner) -> None:
    for n in (1, 2, 4, 8):
        x, out = np.zeros(64 * n, np.int32), np.zeros(64 * n, np.int32)
        run("cluster_barrier", 64, x, out, grid=n, cluster=n)
        equal(out, np.arange(64 * n)[::-1] + 1)


@of_clusters
def send_peer(run: Runner) -> None:
    """Every block to every block, in rounds that wait for arrive_peer."""
    for n in (1, 2, 4, 8):
        out = np.zeros(5 * n * n * 4, np.uint32)
        run("send", 32, out, 5, grid=n, cluster=n, shared=272)
        sent = np.arange(n)[:, None] + 10 * np.arange(4)
        equal(out, sent + 100 * np.arange(5)[:, None, None, None] + np.zeros((1, n, 1, 1), int))


@of_clusters
def send_to_one_rank(run: Runner) -> None:
    for n in (1, 2, 4, 8):
        for rank in range(n):
            out = np.zeros(n * 4, np.uint32)
            run("send_one", 32, out, rank, grid=n, cluster=n, shared=80)
            equal(out, np.where(np.arange(n)[:, None] == rank, np.arange(1, 5), 7))


@of_clusters
def bulk_copies(run: Runner) -> None:
    for bytes_, chunks in ((16, 1), (16, 5), (512, 7), (2064, 4)):
        x, got = run.words(bytes_ // 4 * chunks), aligned(bytes_ // 4 * chunks)
        run("bulk", 64, x, got, bytes_, chunks, shared=2 * bytes_ + 16)
        equal(got, x * np.uint32(3) + np.uint32(1))


@of_clusters
def barrier_wait(run: Runner) -> None:
    """Of the phase before the first it returns at once."""
    for count in (1, 5, 32):
        out = np.zeros(3 * 32, np.int32)
        run("parity", 32, out, count, shared=16)
        equal(out, np.repeat(np.arange(1, 4), 32))


def first_mistake(module: Module, hows: list[How], clusters: bool = True) -> str | None:
    """What the first wrapper that is wrong does wrong."""
    for how in hows:
        for name, check in CHECKS.items():
            if clusters or name not in OF_CLUSTERS:
                try:
                    check(Runner(module, how))
                except (AssertionError, PtxError, pytest.fail.Exception) as error:
                    return f"{name}, {how.async_}, {how.order}: {error}"
    return None
