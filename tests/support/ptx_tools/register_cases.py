"""Instructions that compute registers from registers: operands, and results by the PTX manual.

The results are written out, or follow from the manual's definition by exact integers. A test runs
each form with what is here; registers have garbage above the bits of an operand's type.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

NAN, INF = float("nan"), float("inf")
LEAST32, MOST32, LEAST64, MOST64 = -(2**31), 2**31 - 1, -(2**63), 2**63 - 1
TINY = 2.0**-149  # subnormal in float32


class Case(NamedTuple):
    form: str
    results: tuple[tuple[str, Any], ...]  # type, value
    operands: tuple[tuple[str, Any], ...]


def bits(kind: str, value: Any) -> int:
    """Of a value of a type of PTX; hexadecimal integers are the bits themselves."""
    if kind == "pred":
        return int(value)
    width = int(kind[1:])
    if kind[0] == "f" and isinstance(value, float):
        if value != value and width == 32:
            return 0x7FFFFFFF
        return int.from_bytes(struct.pack({16: "<e", 32: "<f", 64: "<d"}[width], value), "little")
    return int(value) & ((1 << width) - 1)


CASES: list[Case] = []


def add(form: str, result: str, operands: str, *rows: tuple[Any, ...]) -> None:
    """Rows of the operands' values and, last, the result's; types are separated by blanks."""
    kinds, to = operands.split(), result.split()
    for *values, wanted in rows:
        results = wanted if isinstance(wanted, tuple) else (wanted,)
        CASES.append(
            Case(
                form,
                tuple(zip(to, results, strict=True)),
                tuple(zip(kinds, values, strict=True)),
            )
        )


def same(form: str, kind: str, *rows: tuple[Any, ...]) -> None:
    """All operands and the result are of one type."""
    add(form, kind, " ".join([kind] * (len(rows[0]) - 1)), *rows)


# Integers wrap round.
same("add.s32 rrr", "s32", (5, -7, -2), (MOST32, 1, LEAST32))
same("add.s64 rrr", "s64", (2**40, -1, 2**40 - 1), (MOST64, 1, LEAST64))
same("sub.s32 rrr", "s32", (5, 7, -2), (LEAST32, 1, MOST32))
same("sub.s64 rrr", "s64", (2**40, 2**41, -(2**40)), (LEAST64, 1, MOST64))
same("mul.lo.s32 rrr", "s32", (-3, 7, -21), (65536, 65537, 65536))
same("mul.lo.s64 rrr", "s64", (-3, 2**33, -3 * 2**33), (2**32, 2**32 + 1, 2**32))
add("mul.wide.s32 rrr", "s64", "s32 s32", (-3, MOST32, -3 * MOST32), (LEAST32, LEAST32, 2**62))
add("mul.wide.u32 rrr", "u64", "u32 u32", (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE00000001))
add("mul.wide.u16 rrr", "u32", "u16 u16", (0xFFFF, 0xFFFF, 0xFFFE0001))
same("mad.lo.s32 rrrr", "s32", (-3, 7, 30, 9), (65536, 65537, -1, 65535))
same("mad.lo.s64 rrrr", "s64", (-3, 2**33, 5, 5 - 3 * 2**33), (2**32, 2**32, 7, 7))
add("mad.wide.s32 rrrr", "s64", "s32 s32 s64", (-3, MOST32, 2**40, 2**40 - 3 * MOST32))
add("mad.wide.u32 rrrr", "u64", "u32 u32 u64", (0xFFFFFFFF, 2, 3, 0x200000001))
# Division truncates; the remainder has the dividend's sign.
same("div.s32 rrr", "s32", (7, -2, -3), (-7, 2, -3), (LEAST32, -1, LEAST32))
same("div.u32 rrr", "u32", (0xFFFFFFFE, 2, 0x7FFFFFFF))
same("div.s64 rrr", "s64", (-(2**40) - 1, 2, -(2**39)), (7, -2, -3))
same("rem.s32 rrr", "s32", (7, -2, 1), (-7, 2, -1), (LEAST32, -1, 0))
same("max.s32 rrr", "s32", (-5, 3, 3), (LEAST32, -1, -1))
same("max.s64 rrr", "s64", (-5, 2**40, 2**40))
same("min.s32 rrr", "s32", (-5, 3, -5))
same("min.s64 rrr", "s64", (-5, 2**40, -5))
same("neg.s32 rr", "s32", (5, -5), (LEAST32, LEAST32))

# Floats: to the nearest, ties to even; one NaN in float32.
EPS = 2.0**-24
same(
    "add.rn.f32 rrr", "f32",
    (1.0, EPS, 1.0), (1 + 2 * EPS, EPS, 1 + 4 * EPS), (INF, -INF, NAN), (TINY, TINY, 2 * TINY),
)  # fmt: skip
same("add.rn.f64 rrr", "f64", (1.0, 2.0**-53, 1.0), (0.1, 0.2, 0.30000000000000004))
same("sub.rn.f32 rrr", "f32", (1.0, EPS / 2, 1.0), (1.0, 0.75, 0.25), (0.0, 0.0, 0.0))
same("sub.rn.f64 rrr", "f64", (1.0, 0.9, 0.09999999999999998))
same("mul.rn.f32 rrr", "f32", (1 + 2 * EPS, 1 + 2 * EPS, 1 + 4 * EPS), (0.0, INF, NAN))
same("mul.rn.f64 rrr", "f64", (0.1, 3.0, 0.30000000000000004), (-0.0, 5.0, -0.0))
# One rounding: (1 + e)^2 - 1 - 2e = e^2.
same("fma.rn.f32 rrrr", "f32", (1 + 2 * EPS, 1 + 2 * EPS, -1 - 4 * EPS, 4 * EPS * EPS))
same("fma.rn.f64 rrrr", "f64", (1 + 2.0**-52, 1 + 2.0**-52, -1 - 2.0**-51, 2.0**-104))
for name in ("div.rn.f32 rrr", "div.full.f32 rrr", "div.approx.ftz.f32 rrr"):
    same(name, "f32", (1.0, 4.0, 0.25), (1.0, 0.0, INF), (0.0, 0.0, NAN))
same("div.rn.f32 rrr", "f32", (1.0, 3.0, 0.3333333432674408))
same("div.rn.f64 rrr", "f64", (1.0, 3.0, 0.3333333333333333), (-1.0, 0.0, -INF))
same("rcp.rn.f64 rr", "f64", (3.0, 0.3333333333333333), (-0.0, -INF), (2.0**1023, 2.0**-1023))
# A NaN loses, and -0 is below +0.
for kind in ("f32", "f64"):
    same(f"max.{kind} rrr", kind, (NAN, -1.0, -1.0), (2.0, NAN, 2.0), (-0.0, 0.0, 0.0))
    same(f"max.{kind} rrr", kind, (0.0, -0.0, 0.0), (-3.0, 2.0, 2.0))
    same(f"min.{kind} rrr", kind, (NAN, -1.0, -1.0), (2.0, NAN, 2.0), (0.0, -0.0, -0.0))
    same(f"min.{kind} rrr", kind, (-3.0, 2.0, -3.0))
    same(f"neg.{kind} rr", kind, (0.0, -0.0), (-2.5, 2.5))
    same(f"abs.{kind} rr", kind, (-0.0, 0.0), (-2.5, 2.5), (-INF, INF))
for kind, inf in (("f16", 0x7C00), ("bf16", 0x7F80)):
    rows = [(0x8000, 0), (0xBF81, 0x3F81), (0x8000 | inf, inf), (0xFFC1, 0x7FFF), (inf + 1, 0x7FFF)]
    add(f"abs.{kind} rr", "b16", "b16", *rows)
    rows = [(0x8000_BF81, 0x0000_3F81), (0xFFC1_8000 | inf, 0x7FFF_0000 | inf)]
    add(f"abs.{kind}x2 rr", "b32", "b32", *rows)
    same(
        f"max.{kind}x2 rrr", "b32",
        (0x8000_0001, 0x0000_8002, 0x0000_0001),  # zeros, and the smallest numbers
        (0xBF81_3F81, 0x3F81_BF82, 0x3F81_3F81),
        (0xFFC1_0000 | inf, 0xBF81_7FFF, 0xBF81_0000 | inf),
        (0x7FFF_FFFF, 0xFFC1_8000, 0x7FFF_8000),
    )  # fmt: skip
for kind in ("f32", "f64"):  # the first one's sign
    same(f"copysign.{kind} rrr", kind, (-0.0, 3.0, -3.0), (2.0, -3.0, 3.0))
# Without error, as the test asks for; subnormals, also results, are zeros.
same(
    "ex2.approx.ftz.f32 rr", "f32",
    (3.0, 8.0), (-126.0, 2.0**-126), (-127.0, 0.0), (-INF, 0.0), (INF, INF), (NAN, NAN),
    (TINY, 1.0), (128.0, INF),
)  # fmt: skip
# The upper word of the result, by that of the argument: 1/3 is 3FD5555555555555.
same(
    "rcp.approx.ftz.f64 rr", "f64",
    (2.0, 0.5), (3.0, 0x3FD5555500000000), (0x4008000000000001, 0x3FD5555500000000),
    (-0.0, -INF), (2.0**-1074, INF), (2.0**1023, 0.0), (-INF, -0.0),
)  # fmt: skip

# Bits.
for width, a, b in ((16, 0xF0F0, 0xFF00), (32, 0xF0F0F0F0, 0xFFFF0000), (64, 15 << 60, 255 << 56)):
    same(f"and.b{width} rrr", f"b{width}", (a, b, a & b))
    same(f"or.b{width} rrr", f"b{width}", (a, b, a | b))
same("xor.b32 rrr", "b32", (0xF0F0F0F0, 0xFFFF0000, 0x0F0FF0F0))
same("not.b32 rr", "b32", (0xF0F0F0F0, 0x0F0F0F0F))
same("not.b64 rr", "b64", (1, 0xFFFFFFFFFFFFFFFE))
BOTH = ((0, 0), (0, 1), (1, 0), (1, 1))
same("and.pred rrr", "pred", *((a, b, a & b) for a, b in BOTH))
same("or.pred rrr", "pred", *((a, b, a | b) for a, b in BOTH))
same("xor.pred rrr", "pred", *((a, b, a ^ b) for a, b in BOTH))
same("not.pred rr", "pred", (0, 1), (1, 0))
for width in (16, 32, 64):  # by the width or more: nothing is left, or the sign
    add(f"shl.b{width} rrr", f"b{width}", f"b{width} u32", (3, 4, 48), (3, width, 0), (1, 200, 0))
for width in (32, 64):
    s, u = f"s{width}", f"u{width}"
    add(f"shr.{s} rrr", s, f"{s} u32", (-16, 2, -4), (-16, width, -1), (16, 200, 0))
    add(f"shr.{u} rrr", u, f"{u} u32", (-16, width - 4, 15), (-16, width, 0))
# (b:a) to the right, by the lowest five bits.
add(
    "shf.r.wrap.b32 rrrr", "b32", "b32 b32 u32",
    (0x44332211, 0x88776655, 8, 0x55443322), (0x44332211, 0x88776655, 40, 0x55443322),
    (7, 9, 0, 7),
)  # fmt: skip
add(
    "bfe.u32 rrrr", "u32", "u32 u32 u32",
    (0x12345678, 8, 8, 0x56), (0x12345678, 28, 8, 1), (0x12345678, 4, 0, 0),
    (0x12345678, 0, 40, 0x12345678), (5, 32, 4, 0),
)  # fmt: skip
same("brev.b32 rr", "b32", (1, 0x80000000), (0x12345678, 0x1E6A2C48))
same("bfind.shiftamt.u32 rr", "u32", (1, 31), (0x80000000, 0), (0, 0xFFFFFFFF), (0x00F00000, 8))

# Comparisons: of a below, equal to, above and unordered with b.
TRUE = {
    "eq": "0100", "ne": "1010", "lt": "1000", "le": "1100", "gt": "0010", "ge": "0110",
    "neu": "1011", "ltu": "1001", "leu": "1101", "gtu": "0011", "geu": "0111",
    "num": "1110", "nan": "0001",
}  # fmt: skip
OF_TYPE = {
    "b16": "ne", "b32": "eq ne", "b64": "eq ne", "s16": "eq ne gt",
    "s32": "eq ne lt le gt ge", "s64": "eq ne lt le gt ge", "u32": "lt gt ge", "u64": "lt gt",
    "f32": "eq ne lt le gt ge neu ltu leu gtu geu num nan",
    "f64": "eq ne lt gt ge neu ltu leu gtu geu num nan",
}  # fmt: skip
for kind, names in OF_TYPE.items():
    top = 1 << (int(kind[1:]) - 1)
    low, high = {"s": (-1, 1), "f": (-1.5, 1.5)}.get(kind[0], (1, top))
    pairs = [(low, high), (high, high), (high, low)]
    if kind[0] == "f":
        pairs += [(NAN, low), (low, NAN), (NAN, NAN)]
    for name in names.split():
        truth = TRUE[name] + TRUE[name][3] * 2
        rows = [(*pair, int(true)) for pair, true in zip(pairs, truth, strict=False)]
        add(f"setp.{name}.{kind} rrr", "pred", f"{kind} {kind}", *rows)
add("setp.eq.f32 rrr", "pred", "f32 f32", (-0.0, 0.0, 1))
for kind, nan in (("f16", 0x7C01), ("bf16", 0x7F81)):  # -1.5 and 0, zeros, and a NaN
    rows = [(0xBF80, 0, 1), (0, 0xBF80, 0), (0x8000, 0, 0), (nan, 0, 0), (0, 0x8000 | nan, 0)]
    add(f"setp.lt.{kind} rrr", "pred", "b16 b16", *rows)
    pairs = [(0x0000_BF80, 0xBF80_0000, (1, 0)), (0xBF80_0000, nan, (0, 1))]
    add(f"setp.lt.{kind}x2 prr", "pred pred", "b32 b32", *pairs)
add(
    "setp.le.f64 rrr",
    "pred",
    "f64 f64",
    (1.0, 2.0, 1),
    (2.0, 2.0, 1),
    (3.0, 2.0, 0),
    (NAN, 2.0, 0),
    (2.0, NAN, 0),
)
for kind in ("b16", "u16", "b32", "u32", "f32", "b64", "f64"):
    add(f"selp.{kind} rrrr", kind, f"{kind} {kind} pred", (0x1234, 0x4321, 1, 0x1234))
    add(f"selp.{kind} rrrr", kind, f"{kind} {kind} pred", (0x1234, 0x4321, 0, 0x4321))

# Conversions.
add("cvt.s64.s32 rr", "s64", "s32", (-5, -5), (MOST32, MOST32))
add("cvt.u16.u32 rr", "u16", "u32", (0x12345678, 0x5678))
add("cvt.u32.u64 rr", "u32", "u64", (0x123456789A, 0x3456789A))
add("cvt.u64.u32 rr", "u64", "u32", (0xFFFFFFFF, 0xFFFFFFFF))
add("cvt.f64.f32 rr", "f64", "f32", (1.5, 1.5), (TINY, TINY), (-INF, -INF))
add("cvt.rn.f32.f64 rr", "f32", "f64", (1 + EPS, 1.0), (1 + 3 * EPS, 1 + 4 * EPS), (1e39, INF))
add("cvt.rn.f64.s32 rr", "f64", "s32", (-7, -7.0))
add("cvt.rn.f64.s64 rr", "f64", "s64", (2**53 + 1, 2.0**53), (2**53 + 3, 2.0**53 + 4))
for kind in ("f32", "f64"):  # NaN gives the least
    rows = [(-2.75, -2), (2.75, 2), (2.0**63, MOST64), (-(2.0**70), LEAST64), (NAN, LEAST64)]
    add(f"cvt.rzi.s64.{kind} rr", "s64", kind, *rows)
add(
    "cvt.rzi.s32.f32 rr", "s32", "f32",
    (-2.75, -2), (2.0**31, MOST32), (-(2.0**31), LEAST32), (-3e9, LEAST32), (NAN, 0),
)  # fmt: skip
add(
    "cvt.rzi.s32.f64 rr", "s32", "f64",
    (-1022.0, -1022), (-2.75, -2), (2.0**31, MOST32), (-3e9, LEAST32), (NAN, LEAST32),
)  # fmt: skip
UP, DOWN = [(1.25, 2.0), (-1.25, -1.0), (5.0, 5.0)], [(1.75, 1.0), (-1.25, -2.0)]
same("cvt.rpi.f32.f32 rr", "f32", *UP, (TINY, 1.0))
same("cvt.rpi.f64.f64 rr", "f64", *UP, (2.0**-1074, 1.0))
same("cvt.rmi.f64.f64 rr", "f64", *DOWN, (-(2.0**-1074), -1.0))
same("cvt.rpi.ftz.f32.f32 rr", "f32", *UP, (TINY, 0.0))
same("cvt.rmi.ftz.f32.f32 rr", "f32", *DOWN, (-TINY, -0.0))
for kind in ("f32", "f64"):
    rows = [(0x3C00, 1.0), (0x0001, 2.0**-24), (0xFBFF, -65504.0), (0x8000, -0.0), (0x7C00, INF)]
    add(f"cvt.{kind}.f16 rr", kind, "b16", *rows)
    rows = [(0x3F80, 1.0), (0xC040, -3.0), (0x0001, 2.0**-133), (0xFF80, -INF)]
    add(f"cvt.{kind}.bf16 rr", kind, "b16", *rows)
TO_HALF = [
    (1.0, 0x3C00), (-0.0, 0x8000), (NAN, 0x7FFF), (65519.0, 0x7BFF), (65520.0, 0x7C00),
    (-INF, 0xFC00), (2.0**-24, 1), (2.0**-25, 0), (1.5 * 2.0**-24, 2), (2.5 * 2.0**-24, 2),
    (1 + 2.0**-11, 0x3C00), (1 + 3 * 2.0**-11, 0x3C02), (2047.9, 0x6800),
]  # fmt: skip
TO_BF16 = [
    (1.0, 0x3F80), (-0.0, 0x8000), (NAN, 0x7FFF), (3.4e38, 0x7F80), (INF, 0x7F80),
    (1 + 2.0**-8, 0x3F80), (1 + 3 * 2.0**-8, 0x3F82), (TINY, 0), (2.0**-133, 1),
]  # fmt: skip
add("cvt.rn.f16.f32 rr", "b16", "f32", *TO_HALF)
add("cvt.rn.bf16.f32 rr", "b16", "f32", *TO_BF16)
for kind, table in (("f16", TO_HALF), ("bf16", TO_BF16)):  # the first becomes the upper half
    others = table[1:] + table[:1]
    rows = [(x, y, a << 16 | b) for (x, a), (y, b) in zip(table, others, strict=True)]
    add(f"cvt.rn.{kind}x2.f32 rrr", "b32", "f32 f32", *rows)

for kind in ("b16", "u16", "b32", "u32", "f32", "b64", "u64", "f64"):
    same(f"mov.{kind} rr", kind, (0x1234, 0x1234), (-1, -1))
same("mov.pred rr", "pred", (0, 0), (1, 1))
# The first element is the lowest.
add("mov.b32 2r", "b16 b16", "b32", (0x12345678, (0x5678, 0x1234)))
add("mov.b64 2r", "b32 b32", "b64", (0x123456789ABCDEF0, (0x9ABCDEF0, 0x12345678)))
add("mov.b32 r2", "b32", "b16 b16", (0x5678, 0x1234, 0x12345678))
add("mov.b64 r2", "b64", "b32 b32", (0x9ABCDEF0, 0x12345678, 0x123456789ABCDEF0))
same("cvta.to.global.u64 rr", "u64", (0x7F0012345678, 0x7F0012345678))
