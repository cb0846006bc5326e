"""Mistakes planted in the inline PTX of the primitives, and in the kernels' proxy fences.

Each mutant is a header with one line changed, compiled by nvcc and run by the interpreter; what is
wrong has to be named. If a change of the headers makes a line unknown here, the test says so: plant
the same mistake in the new code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_mutants import MUTANTS
from ptx_tools import nvcc
from ptx_tools.build import run_check
from ptx_tools.interpreter import Module, every_how
from ptx_tools.nvcc import plant
from ptx_tools.wrappers import first_mistake
from repository import ROOT


class Planted(NamedTuple):
    line: str
    planted: str
    found: str  # what the wrappers' tests say, as a regular expression


SHUFFLE = "float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }"
EXPECT = '"r"(bytes)\n      : "memory");\n}\nCFPO_DEVICE void barrier_wait'
ARRIVE = "mbarrier.arrive.shared::cluster.b64 _, [peer];"
LOAD = '"l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))'
PORTABLE = {
    "cvt.rn.bf16x2: operands exchanged": Planted(
        '"cvt.rn.bf16x2.f32 %0, %1, %2;"', '"cvt.rn.bf16x2.f32 %0, %2, %1;"',
        "store_elements.*are wrong",
    ),
    "cvt.rn.f16x2: operands exchanged": Planted(
        '"cvt.rn.f16x2.f32 %0, %1, %2;"', '"cvt.rn.f16x2.f32 %0, %2, %1;"',
        "store_elements.*are wrong",
    ),
    "cvt.f32.f16: the bits taken for bfloat16": Planted(
        "cvt.f32.f16 %0, %1;", "cvt.f32.bf16 %0, %1;", "half_to_float.*are wrong"
    ),
    "max.f16x2: of bfloat16": Planted(
        '"max.f16x2 %0, %0, %1;"', '"max.bf16x2 %0, %0, %1;"', "max_pairs.*are wrong"
    ),
    "max.bf16x2: of float16": Planted(
        '"max.bf16x2 %0, %0, %1;"', '"max.f16x2 %0, %0, %1;"', "max_pairs.*are wrong"
    ),
    "ld.shared.v4: two words exchanged": Planted(
        "ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];", "ld.shared.v4.u32 {%0, %2, %1, %3}, [%4];",
        "copies.*are wrong",
    ),
    "st.shared.v4: two words exchanged": Planted(
        "st.shared.v4.u32 [%0], {%1, %2, %3, %4};", "st.shared.v4.u32 [%0], {%1, %2, %4, %3};",
        "vectors.*are wrong",
    ),
    "cp.async.wait_group: one group too few": Planted(
        '"cp.async.wait_group %0;" ::"n"(kPending)',
        '"cp.async.wait_group %0;" ::"n"(kPending + 1)',
        "cp.async under way|is on its way",
    ),
    "cp.async: addresses exchanged": Planted(
        '::"r"(shared_address(to)),\n      "l"(from)',
        '::"r"(shared_address(from)),\n      "l"(to)',
        "outside the 1024 of shared memory.*cp.async",
    ),
    "warp_max: negative numbers not turned round": Planted(
        "bits ^ ((bits >> 31) & 0x7FFFFFFF));", "bits);", "warp_max.*are wrong"
    ),
    "shuffle_xor: among 16 lanes": Planted(
        SHUFFLE, SHUFFLE.replace("mask)", "mask, 16)", 2).replace("int mask, 16)", "int mask)"),
        "shuffles.*are wrong",
    ),
    "shuffle_xor: half the warp in the mask": Planted(
        SHUFFLE, SHUFFLE.replace("~0u", "0xFFFFu"), "not in its own mask|that is not there"
    ),
    "funnel_shift: words exchanged": Planted(
        "__funnelshift_r(low, high, bits)", "__funnelshift_r(high, low, bits)",
        "funnel_shift.*are wrong",
    ),
    "ex2: of the negative": Planted(
        "ex2.approx.ftz.f32 %0, %1;", "{ .reg .f32 t; neg.f32 t, %1; ex2.approx.ftz.f32 %0, t; }",
        "exp2.*an error",
    ),
    "sync_threads: for all threads": Planted(
        "barrier.sync 1, %0;", "barrier.sync 1;", "deadlock"
    ),
    # No kernel uses both at once.
    "sync_threads: on the barrier of sync_block": Planted(
        "barrier.sync 1, %0;", "barrier.sync 0, %0;", "a barrier that others expect .* threads at",
    ),
}  # fmt: skip
OF_CLUSTERS = {
    "try_wait: the other parity": Planted(
        '"r"(shared_address(barrier)), "r"(parity)',
        '"r"(shared_address(barrier)), "r"(parity ^ 1)',
        "deadlock.*try_wait",
    ),
    "try_wait: the predicate's other sense": Planted(
        "selp.u32 %0, 1, 0, p;", "selp.u32 %0, 0, 1, p;", "never ends|is on its way|are wrong"
    ),
    "try_wait: asked only once": Planted(
        "while (ended == 0);", "while (false);", "are wrong|is on its way|nobody wrote"
    ),
    "expect_tx: 16 bytes too many": Planted(
        EXPECT, EXPECT.replace("(bytes)", "(bytes + 16)"), "deadlock"
    ),
    "expect_tx: half the bytes": Planted(
        EXPECT, EXPECT.replace("(bytes)", "(bytes / 2)"), "deadlock|more arrivals"
    ),
    "expect_tx: no arrival": Planted(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;",
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;", "deadlock",
    ),
    "mbarrier.init: one arrival too few": Planted(
        '"r"(shared_address(barrier)), "r"(count)',
        '"r"(shared_address(barrier)), "r"(count > 1 ? count - 1 : 1)',
        "are wrong|more arrivals|no proxy fence",
    ),
    "arrive_peer: at its own barrier": Planted(
        ARRIVE, "mbarrier.arrive.shared::cta.b64 _, [%0];", "are wrong|more arrivals|no proxy fence"
    ),
    "arrive_peer: at the next rank's": Planted(
        ARRIVE + '\\n"\n      "}" ::"r"(shared_address(barrier)),\n      "r"(rank)',
        ARRIVE + '\\n"\n      "}" ::"r"(shared_address(barrier)),\n      "r"(rank ^ 1)',
        "no such rank",
    ),
    "mapa: address and rank exchanged": Planted(
        "mapa.shared::cluster.u32 address, %0, %2;", "mapa.shared::cluster.u32 address, %2, %0;",
        "no such rank: 1024.*mapa",
    ),
    "st.async: counted by the sender": Planted(
        "[address], {%3, %4, %5, %6}, [counter];", "[address], {%3, %4, %5, %6}, [%1];",
        "another block counts",
    ),
    "st.async: data and counter exchanged": Planted(
        "[address], {%3, %4, %5, %6}, [counter];", "[counter], {%3, %4, %5, %6}, [address];",
        "no mbarrier was initialised|misaligned",
    ),
    "st.async: words exchanged": Planted(
        "{%3, %4, %5, %6}", "{%3, %5, %4, %6}", "send_peer.*are wrong"
    ),
    "st.async: the last word twice": Planted(
        "{%3, %4, %5, %6}", "{%3, %4, %6, %6}", "send_peer.*are wrong"
    ),
    "bulk_load: fewer bytes than were announced": Planted(
        LOAD, LOAD.replace("(bytes)", "(bytes - 16)"), "a bulk copy of 0 bytes"
    ),
    "bulk_wait_read: one store may be under way": Planted(
        "cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group.read 1;",
        "before its bulk stores had read",
    ),
    "bulk_wait_read: nothing": Planted(
        'asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");', "",
        "before its bulk stores had read",
    ),
    "bulk_commit: nothing": Planted(
        'asm volatile("cp.async.bulk.commit_group;" ::: "memory");', "",
        "before its bulk stores had read",
    ),
    "fence_async: nothing": Planted(
        'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");', "",
        "no proxy fence|not fenced",
    ),
    "cluster_wait: nothing": Planted(
        'asm volatile("barrier.cluster.wait.acquire;" ::: "memory");', "",
        "are wrong|second arrival|may not have begun",
    ),
    "cluster_rank: of the grid": Planted(
        "mov.u32 %0, %%cluster_ctarank;", "mov.u32 %0, %%ctaid.x;", "cluster_rank.*are wrong"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*PORTABLE, *OF_CLUSTERS])
def test_a_wrapper_that_is_wrong(name: str, interpreter: Path, tmp_path: Path) -> None:
    file = "primitives_ptx.h" if name in PORTABLE else "primitives_sm90.h"
    mutant = (PORTABLE | OF_CLUSTERS)[name]
    tree = plant(file, mutant.line, mutant.planted, tmp_path)
    source = ROOT / "tests" / "cpp" / "ptx_wrappers.cu"
    text = nvcc.compile_ptx(source, nvcc.CLUSTERS, tmp_path / "wrappers.ptx", tree)
    found = first_mistake(Module(interpreter, text), every_how(seeds=2))
    assert found is not None, "not found"
    assert re.search(mutant.found, found, re.DOTALL), found


def compile_kernels(tree: Path, folder: Path) -> Path:
    """Those that emulated_check.cpp runs."""
    folder.mkdir()
    source = tree / "csrc" / "cuda" / "instances" / f"{nvcc.CHECKED}.cu"
    nvcc.compile_ptx(source, nvcc.CLUSTERS, folder / "kernels.ptx", tree)
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cvt.rn.bf16x2: operands exchanged", r"row \d+ is wrong"),
        ("try_wait: the other parity", r"line \d+ of .*mbarrier"),
        ("mapa: address and rank exchanged", r"no such rank: .*line \d+ of .*mapa"),
        ("expect_tx: half the bytes", r"line \d+ of .*mbarrier"),
        ("st.async: words exchanged", r"row \d+ is wrong|line \d+ of "),
    ],
)
def test_whole_kernels_notice_too(name: str, found: str, ptx_check: Path, tmp_path: Path) -> None:
    file = "primitives_ptx.h" if name in PORTABLE else "primitives_sm90.h"
    mutant = (PORTABLE | OF_CLUSTERS)[name]
    ptx = compile_kernels(plant(file, mutant.line, mutant.planted, tmp_path), tmp_path / "ptx")
    done = run_check(ptx_check, ptx, "rows" if name in PORTABLE else "clusters")
    assert done.returncode != 0, "not found"
    assert re.search(found, done.stderr, re.DOTALL), done.stderr


# Those of test_cuda_mutants.py that take away a proxy fence of what was read; the first always.
FENCES = [name for name, mutant in MUTANTS.items() if "fenced" in name and mutant.found]


@pytest.mark.parametrize(
    "name", [FENCES[0], *(pytest.param(name, marks=pytest.mark.nightly) for name in FENCES[1:])]
)
def test_a_missing_fence(name: str, ptx_check: Path, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    tree = plant(mutant.file, mutant.line, mutant.planted, tmp_path)
    done = run_check(ptx_check, compile_kernels(tree, tmp_path / "ptx"), "clusters")
    assert done.returncode != 0, "not found"
    assert "ptx: no proxy fence" in done.stderr, done.stderr
    assert re.search(r": (st\.async|cp\.async\.bulk)", done.stderr), "names no instruction"
