"""Instructions that touch memory or wait, in small kernels: what they have to do.

A kernel's %a0 is the address of 4 KiB, of which the first are input, word i being 0x01010101 * i,
and those from 1024 on output; %a1 is %tid.x, %a2 the address of input word %tid.x, %a3 that of
shared memory, %a4 that of its word %tid.x, %a5 the block, %a6 a cache policy.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

from .interpreter import How, Module, every_how, pack, text_of

PROLOGUE = """\
ld.param.u64 %a0, [p0];
mov.u32 %a1, %tid.x;
mul.wide.u32 %a2, %a1, 4;
add.s64 %a2, %a2, %a0;
mov.u32 %a3, memory;
shl.b32 %a4, %a1, 2;
add.s32 %a4, %a4, %a3;
mov.u32 %a5, %ctaid.x;
createpolicy.fractional.L2::evict_first.b64 %a6, 1.0;
"""
SHARED = 512


class Kernel(NamedTuple):
    body: str
    wanted: list[int]  # words of the output
    threads: int = 1
    blocks: int = 1
    cluster: int = 0


def word(i: int) -> int:
    return 0x01010101 * i


def halves(n: int) -> list[int]:
    return [word(4 + i // 2) >> 16 * (i % 2) & 0xFFFF for i in range(n)]


def memory_kernels() -> dict[str, Kernel]:
    """Each width in each space, by words from and to a place that another width uses."""
    made = {}
    hinted = [f"global.L1::evict_{x}.L2::cache_hint" for x in ("first", "last")]
    forms = [(h, kind, n) for h in hinted for kind, n in (("b16", 1), ("b32", 1), ("b32", 4))]
    for kind in ("b16", "u16", "b32", "u32", "f32", "b64", "u64", "f64"):
        forms.append(("global", kind, 1))
    forms += [("global", kind, 4) for kind in ("b32", "u32", "f32")]
    forms += [("shared", kind, 1) for kind in ("u16", "b32", "u32", "f32", "b64", "u64", "f64")]
    forms += [("shared", kind, n) for kind in ("b32", "u32", "f32") for n in (2, 4)]
    forms += [
        ("shared", "u64", 2),
        ("shared", "f64", 2),
        ("volatile.global", "u32", 1),
        ("volatile.shared", "u32", 1),
    ]
    forms += [("", "u32", 1)]
    stores = [("global.cs", "u16", 1), ("global.cs", "f32", 1), ("global.cs", "u32", 4)]
    for space, kind, n in forms + stores:
        name = ".".join(filter(None, (space, f"v{n}" if n > 1 else "", kind)))
        width = int(kind[1:])
        words = max(1, n * width // 32)
        shared = "shared" in space
        at, hint = ("%a3" if shared else "%a0"), ", %a6" if "hint" in space else ""
        registers = [f"%a{20 + i}" for i in range(n)]
        vector = registers[0] if n == 1 else "{" + ", ".join(registers) + "}"
        fill = "".join(
            f"ld.global.u32 %a9, [%a0+{16 + 4 * i}];\nst.shared.u32 [%a3+{16 + 4 * i}], %a9;\n"
            for i in range(words)
        )
        wanted = halves(1) if width == 16 else [word(4 + i) for i in range(words)]
        if (space, kind, n) not in stores:
            body = (fill if shared else "") + f"ld.{name} {vector}, [{at}+16]{hint};\n"
            for i, register in enumerate(registers):
                body += f"st.global.u{width} [%a0+{1024 + i * width // 8}], {register};\n"
            made[f"ld.{name}"] = Kernel(body.replace("ld..", "ld."), wanted)
        body = ""
        for i, register in enumerate(registers):
            body += f"ld.global.u{width} {register}, [%a0+{16 + i * width // 8}];\n"
        if shared:
            body += "mov.u32 %a9, 0;\nst.shared.u32 [%a3+32], %a9;\n"
            body += f"st.{name} [%a3+32], {vector};\n"
            for i in range(words):
                body += f"ld.shared.u32 %a9, [%a3+{32 + 4 * i}];\n"
                body += f"st.global.u32 [%a0+{1024 + 4 * i}], %a9;\n"
        else:
            body += f"st.{name} [%a0+1024], {vector}{hint};\n"
        made[f"st.{name}"] = Kernel(body.replace("st..", "st."), wanted)
    return made


def out(register: str, place: str = "%a2") -> str:
    return f"st.global.u32 [{place}+1024], {register};\n"


# Each lane's own word in %a7.
OWN = "ld.global.u32 %a7, [%a2];\n"
MBARRIER = """\
setp.eq.s32 %a8, %a1, 0;
@%a8 mbarrier.init.shared::cta.b64 [%a3], COUNT;
@%a8 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
WAIT = """\
WAIT_NAME:
mbarrier.try_wait.parity.shared::cta.b64 %a9, [%a3], PARITY;
@!%a9 bra WAIT_NAME;
"""


def mbarrier(count: int) -> str:
    return MBARRIER.replace("COUNT", str(count))


def wait(parity: int = 0, name: str = "again") -> str:
    return WAIT.replace("PARITY", str(parity)).replace("WAIT_NAME", name)


LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
STORE = "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint"
SEND = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%a3], 32;\n"
SKIP = "setp.ne.s32 %a9, %a1, 0;\n@%a9 bra done;\n"
CLUSTER = "barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n"
COPY = "add.s32 %a10, %a3, 32;\ncp.async.cg.shared.global.L2::cache_hint [%a10], [%a0], 16, %a6;\n"
COPY += "cp.async.commit_group;\n"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%a3];\n"
LANES = range(32)

KERNELS: dict[str, Kernel] = memory_kernels() | {
    "registers of the launch": Kernel(
        "mov.u32 %a7, %ntid.x;\nmov.u32 %a8, %nctaid.x;\nmov.u32 %a9, %ctaid.y;\n"
        "mad.lo.s32 %a10, %a7, 100, %a8;\nadd.s32 %a10, %a10, %a9;\n" + out("%a10"),
        [201, 201],
        2,
    ),
    # All of one parameter, whose value is known from elsewhere; a signed byte fills its register.
    "ld.param": Kernel(
        "".join(
            f"ld.param.{kind} %a{10 + i}, [p0];\n"
            for i, kind in enumerate(("b64", "u64", "f64", "b32", "u32", "s32", "s8", "u8", "f32"))
        )
        + "ld.param.v2.f32 {%a29, %a30}, [p0];\n"
        "sub.s64 %a20, %a10, %a0;\nsub.s64 %a21, %a11, %a0;\nsub.s64 %a22, %a12, %a0;\n"
        "or.b64 %a20, %a20, %a21;\nor.b64 %a20, %a20, %a22;\ncvt.u32.u64 %a7, %a0;\n"
        "sub.s32 %a23, %a13, %a7;\nsub.s32 %a24, %a14, %a7;\nsub.s32 %a25, %a15, %a7;\n"
        "or.b32 %a20, %a20, %a23;\nor.b32 %a20, %a20, %a24;\nor.b32 %a20, %a20, %a25;\n"
        "sub.s32 %a28, %a18, %a7;\nor.b32 %a20, %a20, %a28;\n"
        "sub.s32 %a29, %a29, %a7;\nor.b32 %a20, %a20, %a29;\n"
        "shl.b32 %a7, %a7, 24;\nshr.s32 %a7, %a7, 24;\nsub.s32 %a26, %a16, %a7;\n"
        "or.b32 %a20, %a20, %a26;\nand.b32 %a7, %a7, 255;\nsub.s32 %a27, %a17, %a7;\n"
        "or.b32 %a20, %a20, %a27;\nadd.s32 %a20, %a20, 5;\n" + out("%a20"),
        [5],
    ),
    "guards and branches": Kernel(
        "mov.u32 %a7, 0;\nagain:\nadd.s32 %a7, %a7, 3;\nsetp.lt.s32 %a8, %a7, 10;\n"
        "@%a8 bra again;\n"
        "bra.uni on;\nmov.u32 %a7, 99;\non:\n@!%a8 add.s32 %a7, %a7, 100;\n"
        "@%a8 mov.u32 %a7, 0;\n" + out("%a7"),
        [112],
    ),
    "the end of some threads": Kernel(
        "setp.eq.s32 %a8, %a1, 1;\n@%a8 ret;\nbar.sync 0;\n" + out("1"), [1, 0, 1], 3
    ),
    "nested registers": Kernel(
        "mov.u32 %a7, 5;\n{\n.reg .b32 %a7;\nmov.u32 %a7, 6;\n}\n" + out("%a7"), [5]
    ),
    # The lane that b differs by; what no lane has is its own, and the predicate says so.
    "shfl.bfly": Kernel(
        OWN + "shfl.sync.bfly.b32 %a8, %a7, 5, 31, -1;\n" + out("%a8"),
        [word(i ^ 5) for i in LANES],
        32,
    ),
    "shfl.bfly in segments of 8": Kernel(
        OWN
        + "shfl.sync.bfly.b32 %a8|%a9, %a7, 12, 0x181F, -1;\nselp.b32 %a8, %a8, 0, %a9;\n"
        + out("%a8"),
        [word(i ^ 12) if i & 8 else 0 for i in LANES],
        32,
    ),
    "shfl.idx": Kernel(
        OWN + "shfl.sync.idx.b32 %a8|%a9, %a7, 7, 31, -1;\n"
        "selp.b32 %a8, %a8, 0, %a9;\n" + out("%a8"),
        [word(7)] * 32 + [word(39)] * 32,
        64,
    ),
    "vote.ballot": Kernel(
        OWN + "setp.gt.u32 %a8, %a1, 28;\nvote.sync.ballot.b32 %a9, %a8, -1;\n" + out("%a9"),
        [0xE0000000] * 32,
        32,
    ),
    "redux.max": Kernel(
        "sub.s32 %a7, %a1, 40;\nredux.sync.max.s32 %a8, %a7, -1;\n" + out("%a8"),
        [2**32 - 9] * 32,
        32,
    ),
    "shfl among the lanes of the mask": Kernel(
        OWN
        + "setp.ge.s32 %a8, %a1, 4;\n@%a8 bra done;\nshfl.sync.bfly.b32 %a9, %a7, 3, 31, 15;\n"
        + out("%a9")
        + "done:\n",
        [word(3), word(2), word(1), word(0), 0],
        8,
    ),
    "bar.warp.sync": Kernel(
        OWN + "st.shared.u32 [%a4], %a7;\nbar.warp.sync -1;\nxor.b32 %a8, %a4, 124;\n"
        "ld.shared.u32 %a9, [%a8];\n" + out("%a9"),
        [word(i ^ 31) for i in LANES],
        32,
    ),
    "bar.sync and barrier.sync": Kernel(
        OWN + "st.shared.u32 [%a4], %a7;\nbarrier.sync 2;\nsub.s32 %a8, 63, %a1;\n"
        "shl.b32 %a8, %a8, 2;\nadd.s32 %a8, %a8, %a3;\nld.shared.u32 %a9, [%a8];\nbar.sync 2;\n"
        "st.shared.u32 [%a4], 7;\n" + out("%a9"),
        [word(63 - i) for i in range(64)],
        64,
    ),
    "barrier.sync of some warps": Kernel(
        "setp.ge.s32 %a8, %a1, 64;\n@%a8 bra done;\nbarrier.sync 1, 64;\n"
        + out("3")
        + "done:\nbarrier.sync 0;\n",
        [3] * 64 + [0] * 32,
        96,
    ),
    "generic addresses": Kernel(
        "mov.u32 %a7, memory;\ncvt.u64.u32 %a8, %a7;\ncvta.shared.u64 %a8, %a8;\n"
        "st.u32 [%a8+4], 17;\ncvta.to.shared.u64 %a9, %a8;\ncvt.u32.u64 %a9, %a9;\n"
        "ld.shared.u32 %a10, [%a9+4];\nld.u32 %a11, [%a8+4];\nadd.s32 %a10, %a10, %a11;\n"
        + out("%a10"),
        [34],
    ),
    "cache policies": Kernel(
        "createpolicy.fractional.L2::evict_last.b64 %a7, 1.0;\n"
        "createpolicy.fractional.L2::evict_normal.b64 %a8, 1.0;\n" + out("1"),
        [1],
    ),
    "mbarrier.arrive": Kernel(
        OWN
        + mbarrier(64)
        + "st.shared.u32 [%a4+16], %a7;\n"
        + ARRIVE
        + wait()
        + "sub.s32 %a8, 63, %a1;\nshl.b32 %a8, %a8, 2;\nadd.s32 %a8, %a8, %a3;\n"
        "ld.shared.u32 %a9, [%a8+16];\n" + out("%a9"),
        [word(63 - i) for i in range(64)],
        64,
    ),
    # The phase before the first has ended; then two more, by the one arrival and what is expected.
    "mbarrier.expect_tx": Kernel(
        mbarrier(1)
        + SKIP
        + wait(1, "before")
        + "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%a3], 32;\n"
        + ARRIVE
        + f"add.s32 %a10, %a3, 32;\n{LOAD} [%a10], [%a0], 32, [%a3], %a6;\n"
        + wait()
        + EXPECT
        + f"{LOAD} [%a10], [%a0+16], 32, [%a3], %a6;\n"
        + wait(1, "second")
        + "ld.shared.u32 %a7, [%a3+60];\n"
        + out("%a7")
        + "done:\n",
        [word(11)],
    ),
    "bulk copies": Kernel(
        mbarrier(1)
        + SKIP
        + EXPECT
        + "add.s32 %a10, %a3, 32;\n"
        + f"{LOAD} [%a10], [%a0], 32, [%a3], %a6;\n"
        + wait()
        + "ld.shared.u32 %a7, [%a3+36];\nst.shared.u32 [%a3+32], %a7;\n"
        "fence.proxy.async.shared::cta;\nadd.s64 %a11, %a0, 1024;\n"
        f"{STORE} [%a11], [%a10], 32, %a6;\ncp.async.bulk.commit_group;\n"
        "cp.async.bulk.wait_group.read 0;\ndone:\n",
        [word(1), *(word(i) for i in range(1, 8))],
    ),
    "cp.async": Kernel(
        COPY + "cp.async.wait_group 0;\nld.shared.u32 %a7, [%a3+44];\n" + out("%a7"), [word(3)]
    ),
    "cp.async, all but the last group": Kernel(
        COPY
        + COPY.replace("32;", "48;")
        + "cp.async.wait_group 1;\nld.shared.u32 %a7, [%a3+40];\n"
        + out("%a7")
        + "cp.async.wait_group 0;\n",
        [word(2)],
    ),
    # Block r of two sends words to the other, and waits for those that come.
    "st.async": Kernel(
        mbarrier(1) + CLUSTER + SKIP + "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%a3], 16;\n"
        "mov.u32 %a12, %cluster_ctarank;\nxor.b32 %a13, %a12, 1;\n"
        "mapa.shared::cluster.u32 %a14, %a3, %a13;\nadd.s32 %a15, %a14, 32;\n"
        "add.s32 %a16, %a12, 5;\n"
        + f"{SEND} [%a15], {{%a16, 2, 3, 4}}, [%a14];\n"
        + wait()
        + "ld.shared.u32 %a7, [%a3+32];\nld.shared.u32 %a8, [%a3+44];\n"
        "mad.lo.s32 %a7, %a7, 16, %a8;\n"
        "mad.wide.u32 %a17, %a12, 4, %a0;\n" + out("%a7", "%a17") + "done:\n" + CLUSTER,
        [16 * 6 + 4, 16 * 5 + 4],
        1,
        2,
        2,
    ),
    "mbarrier.arrive at a peer's": Kernel(
        mbarrier(1)
        + CLUSTER.replace("arrive.release", "arrive.relaxed")
        + SKIP
        + "mov.u32 %a12, %cluster_ctarank;\nxor.b32 %a13, %a12, 1;\n"
        "mapa.shared::cluster.u32 %a14, %a3, %a13;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [%a14];\n"
        + wait()
        + "mad.wide.u32 %a17, %a5, 4, %a0;\n"
        + out("1", "%a17")
        + "done:\n"
        + CLUSTER,
        [1, 1],
        1,
        2,
        2,
    ),
}


def launch(
    library: Path, body: str, how: How, threads: int = 1, blocks: int = 1, cluster: int = 0
) -> list[int]:
    """The output's words."""
    memory = (ctypes.c_uint32 * 1028)()
    at = (ctypes.addressof(memory) + 15) // 16 * 16
    words = (ctypes.c_uint32 * 1024).from_address(at)
    for i in range(256):
        words[i] = word(i) & 0xFFFFFFFF
    Module(library, text_of(PROLOGUE + body)).launch(
        "small",
        (blocks,),
        (threads,),
        pack(("q", at)),
        how=how,
        memory=[(at, 1024, False), (at + 1024, 3072, True)],
        cluster=cluster,
        shared=SHARED,
    )
    return list(words[256:])


def check_kernel(library: Path, name: str) -> None:
    kernel = KERNELS[name]
    for how in every_how(seeds=2):
        got = launch(library, kernel.body, how, kernel.threads, kernel.blocks, kernel.cluster)
        got = got[: len(kernel.wanted)]
        assert got == kernel.wanted, f"{name}, {how}: {list(map(hex, got))}"
