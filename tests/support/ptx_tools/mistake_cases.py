"""Small kernels that are wrong, and what the interpreter says; registers as in kernel_cases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from .interpreter import How, PtxError
from .kernel_cases import ARRIVE, CLUSTER, COPY, EXPECT, LOAD, SEND, STORE, launch, mbarrier, wait


class Mistake(NamedTuple):
    body: str
    what: str  # of the message, a regular expression
    threads: int = 1
    blocks: int = 1
    cluster: int = 0
    how: How = How("late", "forward")


def check_mistake(library: Path, name: str) -> None:
    mistake = MISTAKES[name]
    try:
        body, _, threads, blocks, cluster, how = mistake
        launch(library, body, how, threads, blocks, cluster)
    except PtxError as error:
        assert re.search(mistake.what, str(error), re.DOTALL), f"{name}: {error}"
    else:
        raise AssertionError(f"not found: {name}")


MISTAKES: dict[str, Mistake] = {
    "a misaligned access": Mistake(
        "ld.global.u32 %a7, [%a0+2];\n", "misaligned.*line 17 of small: ld"
    ),
    "a vector's misaligned access": Mistake(
        "ld.shared.v4.u32 {%a7, %a8, %a9, %a10}, [%a3+8];\n", "misaligned access of 16 bytes"
    ),
    "a read outside": Mistake("ld.global.u32 %a7, [%a0+4096];\n", "a read outside the memory"),
    "a write where only reads are allowed": Mistake(
        "st.global.u32 [%a0], %a1;\n", "a write outside the memory"
    ),
    "outside of shared memory": Mistake(
        "st.shared.u64 [%a3+512], %a1;\n", "outside the 512 of shared.*at 512"
    ),
    "before shared memory": Mistake("st.shared.u32 [%a3+-4], %a1;\n", "outside the 512.*at -4"),
    "a shared address as a global one": Mistake(
        "cvt.u64.u32 %a7, %a3;\nst.global.u32 [%a7], 1;\n", "a write outside the memory"
    ),
    "outside the parameters": Mistake("ld.param.u32 %a7, [p0+8];\n", "outside the parameters"),
    "a read of what nobody wrote": Mistake("ld.shared.u32 %a7, [%a3];\n", "nobody wrote, at 0"),
    "a read of what is on its way": Mistake(
        COPY + "ld.shared.u32 %a7, [%a3+32];\n", "on its way, at 32"
    ),
    "copies left under way": Mistake(COPY, "ended with cp.async under way"),
    "a bulk copy of an odd size": Mistake(
        mbarrier(1) + f"{LOAD} [%a3+16], [%a0], 20, [%a3], %a6;\n", "a bulk copy of 20 bytes"
    ),
    "a bulk load left under way": Mistake(
        mbarrier(1) + EXPECT + f"{LOAD} [%a3+32], [%a0], 32, [%a3], %a6;\n",
        "ended with work on its shared memory under way: cp.async.bulk",
    ),
    "a bulk store left under way": Mistake(
        "mov.u32 %a7, 1;\nst.shared.v4.u32 [%a3], {%a7, %a7, %a7, %a7};\n"
        f"fence.proxy.async.shared::cta;\n{STORE} [%a0+1024], [%a3], 16, %a6;\n"
        "cp.async.bulk.commit_group;\n",
        "ended before its bulk stores had read",
    ),
    "a bulk store of what is not fenced": Mistake(
        "mov.u32 %a7, 1;\nst.shared.v4.u32 [%a3], {%a7, %a7, %a7, %a7};\n"
        f"{STORE} [%a0+1024], [%a3], 16, %a6;\ncp.async.bulk.commit_group;\n"
        "cp.async.bulk.wait_group.read 0;\n",
        "their writer has not fenced",
    ),
    "a bulk load over what is not fenced": Mistake(
        mbarrier(1)
        + "st.shared.u32 [%a3+32], 1;\n"
        + EXPECT
        + f"{LOAD} [%a3+32], [%a0], 32, [%a3], %a6;\n"
        + wait(),
        "no proxy fence",
    ),
    "too many arrivals": Mistake(
        mbarrier(1) + EXPECT + ARRIVE, "more arrivals at an mbarrier than it counts"
    ),
    "a parity of 2": Mistake(mbarrier(1) + wait(2), "neither 0 nor 1"),
    "an mbarrier overwritten": Mistake(
        mbarrier(1) + "st.shared.u32 [%a3+4], 1;\n" + ARRIVE, "the mbarrier was overwritten"
    ),
    "no mbarrier": Mistake(ARRIVE, "no mbarrier was initialised"),
    "an arrival that nobody makes": Mistake(
        mbarrier(2) + ARRIVE + wait(), "deadlock.*1 threads of block 0 warp 0 wait at an mbarrier"
    ),
    "a warp that some lanes miss": Mistake(
        "setp.eq.s32 %a8, %a1, 5;\n@%a8 ret;\nbar.warp.sync -1;\n", "deadlock.*31 threads", 32
    ),
    "a lane that is not in its mask": Mistake(
        "shfl.sync.bfly.b32 %a7, %a1, 1, 31, 0xFFFF;\n", "not in its own mask", 32
    ),
    "another mask": Mistake(
        "setp.lt.s32 %a8, %a1, 16;\nselp.b32 %a9, -1, 0xFFFF0000, %a8;\nbar.warp.sync %a9;\n",
        "lanes with other masks|deadlock",
        32,
    ),
    "a shuffle from nobody": Mistake(
        "shfl.sync.bfly.b32 %a7, %a1, 16, 31, 0xFFFF;\n", "from a lane that is not there", 16
    ),
    "incomplete warps at a barrier": Mistake("barrier.sync 1, 40;\n", "incomplete warps", 64),
    "a barrier of other counts": Mistake(
        "setp.lt.s32 %a8, %a1, 32;\n@%a8 barrier.sync 1, 64;\n@!%a8 barrier.sync 1;\n",
        "that others expect 64 threads at",
        64,
    ),
    "waiting for nothing, for ever": Mistake("again:\nbra again;\n", "never ends.*bra again"),
    "a division by zero": Mistake("mov.u32 %a7, 0;\ndiv.s32 %a8, %a1, %a7;\n", "divided by 0"),
    "trap": Mistake("trap;\n", r"ptx: trap.*block 0,0 thread 0"),
    "a write that races with a write": Mistake("st.shared.u32 [%a3], %a1;\n", "a race", 2),
    "a write that races with a read": Mistake(
        "st.shared.u32 [%a4], %a1;\nbar.sync 0;\nld.shared.u32 %a7, [%a3+4];\n"
        "add.s32 %a8, %a1, 7;\nst.shared.u32 [%a4], %a8;\n",
        "a race with thread . for shared memory at 4",
        2,
    ),
    "a read that a shuffle does not order behind a write": Mistake(
        "st.shared.u32 [%a4], %a1;\nshfl.sync.bfly.b32 %a7, %a1, 1, 31, 3;\n"
        "ld.shared.u32 %a8, [%a3+4];\n",
        "a race",
        2,
    ),
    "a cp.async that only its thread has waited for": Mistake(
        "setp.eq.s32 %a8, %a1, 0;\nadd.s32 %a10, %a3, 32;\n@%a8 cp.async.cg.shared.global."
        "L2::cache_hint [%a10], [%a0], 16, %a6;\ncp.async.commit_group;\ncp.async.wait_group 0;\n"
        "ld.shared.u32 %a7, [%a3+32];\n",
        "a race|on its way",
        2,
    ),
    "no cluster": Mistake("mapa.shared::cluster.u32 %a7, %a3, 0;\n", "launched without clusters"),
    "no such rank": Mistake("mapa.shared::cluster.u32 %a7, %a3, 2;\n", "no such rank: 2", 1, 2, 2),
    "a peer that may not have begun": Mistake(
        mbarrier(1) + "mapa.shared::cluster.u32 %a7, %a3, 1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [%a7];\n" + CLUSTER,
        "a block that may not have begun",
        1,
        2,
        2,
    ),
    "a peer that has ended": Mistake(
        mbarrier(1) + CLUSTER + "setp.eq.s32 %a9, %a5, 0;\n@%a9 ret;\n"
        "mapa.shared::cluster.u32 %a7, %a3, 0;\nmbarrier.arrive.shared::cluster.b64 _, [%a7];\n",
        "a block that has ended",
        1,
        2,
        2,
        How("late", "backward"),
    ),
    "a message that another block counts": Mistake(
        mbarrier(1) + CLUSTER + "mapa.shared::cluster.u32 %a7, %a3, 1;\n"
        f"{SEND} [%a7], {{%a1, %a1, %a1, %a1}}, [%a3];\n" + CLUSTER,
        "that another block counts",
        1,
        2,
        2,
    ),
    "two arrivals at the cluster's barrier": Mistake(
        "barrier.cluster.arrive.release;\nbarrier.cluster.arrive.release;\n",
        "a second arrival",
        1,
        2,
        2,
    ),
    "an unknown modifier": Mistake(
        "add.sat.s32 %a7, %a1, %a1;\n", "unknown form 'add.sat.s32 rrr'"
    ),
    "an operand too many": Mistake("not.b32 %a7, %a1, %a1;\n", "unknown form 'not.b32 rrr'"),
    "an unknown register": Mistake("mov.u32 %a7, %clock;\n", "unknown register %clock"),
    "an unknown name": Mistake("mov.u32 %a7, elsewhere;\n", "unknown operand 'elsewhere'"),
    "no such label": Mistake("bra elsewhere;\n", "no label 'elsewhere'"),
}
