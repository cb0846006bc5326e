"""Read registers, spills and memory instructions from compiled kernels: SASS and AMD assembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton.backends

CUOBJDUMP = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Access:
    """One instruction on global memory."""

    kind: str  # "load", "store", "atomic"; "async": cp.async; "bulk": by the copy engine
    bytes: int  # moved by a thread; 0 for bulk
    depth: int  # of enclosing loops
    text: str


@dataclass(frozen=True)
class Code:
    registers: int
    scalar_registers: int  # AMD only
    stack: int  # bytes of local memory of a thread
    spills: int
    spill_depth: int  # most loops around one; 0 on AMD, whose metadata only count them
    barriers: int
    instructions: int
    binary_size: int
    accesses: tuple[Access, ...]


@dataclass(frozen=True)
class _Instruction:
    position: int
    text: str
    target: int | None = None  # where a branch goes
    ends: bool = False  # what follows is not reached from here


_Graph = dict[int, set[int]]


def _reachable(graph: _Graph, start: int) -> set[int]:
    found: set[int] = set()
    stack = [start]
    while stack:
        new = graph[stack.pop()] - found
        found |= new
        stack.extend(new)
    return found


def _nesting(graph: _Graph) -> dict[int, int]:
    """How many loops enclose each block.

    A loop is a strongly connected component; those inside it show when the edges to its entries
    are cut. (Backward branches alone are no proof: compilers also place exit blocks early.)
    """
    reach = {node: _reachable(graph, node) for node in graph}
    depth = dict.fromkeys(graph, 0)
    for node in graph:
        if depth[node] or node not in reach[node]:
            continue
        loop = {other for other in reach[node] if node in reach[other]}
        entries = {v for u in graph.keys() - loop for v in graph[u] & loop} or {min(loop)}
        inner = _nesting({u: (graph[u] & loop) - entries for u in loop})
        depth |= {u: 1 + inner[u] for u in loop}
    return depth


def _depths(instructions: Sequence[_Instruction]) -> dict[int, int]:
    """Position of each instruction -> number of enclosing loops."""
    leaders = {instructions[0].position}
    for i, following in zip(instructions, [*instructions[1:], None], strict=True):
        if i.target is not None:
            leaders.add(i.target)
        if following and (i.ends or i.target is not None):
            leaders.add(following.position)
    graph: _Graph = {leader: set() for leader in leaders}
    block_of: dict[int, int] = {}
    block = instructions[0].position
    previous: _Instruction | None = None
    for i in instructions:
        if i.position in leaders:
            if previous and not previous.ends:
                graph[block].add(i.position)
            block = i.position
        block_of[i.position] = block
        if i.target is not None:
            graph[block].add(i.target)
        previous = i
    nesting = _nesting(graph)
    return {position: nesting[block] for position, block in block_of.items()}


# SASS

_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.M)
_SASS_GLOBAL = {
    "LDG": "load",
    "STG": "store",
    "LDGSTS": "async",
    "ATOMG": "atomic",
    "ATOM": "atomic",
    "REDG": "atomic",
    "RED": "atomic",
    "UBLKCP": "bulk",
    "UTMALDG": "bulk",
    "UTMASTG": "bulk",
    # Generic addresses: a kernel that takes pointers should have none, so they count as global.
    "LD": "load",
    "ST": "store",
}
_SASS_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def read_cubin(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage, f"cuobjdump gave no resource usage: {text[:500]}"
    assert text.count("Function : ") == 1, "more than one function in the binary"
    instructions = []
    for address, instruction in _SASS.findall(text):
        # Some versions append what the scheduler knows: "BRA 0x1c0   &req={0} ?trans5".
        instruction = re.split(r"\s+[&?]", instruction)[0]
        branch = re.match(r"(@\S+\s+)?BRA\S*\s(.*)0x([0-9a-f]+)$", instruction)
        assert branch or "BRA" not in instruction, f"branch to where? {instruction}"
        target = int(branch[3], 16) if branch else None
        # A predicate stands in front, or, on the uniform datapath, as an operand.
        always = branch and not branch[1] and not branch[2].strip()
        ends = bool(always) or instruction.startswith("EXIT")
        instructions.append(_Instruction(int(address, 16), instruction, target, ends))
    assert instructions, "cuobjdump gave no instructions"
    depths = _depths(instructions)
    accesses, spills, barriers = [], list[int](), 0
    for i in instructions:
        opcode, *modifiers = re.sub(r"^@!?U?P\w+\s+", "", i.text).split()[0].split(".")
        if opcode in ("LDL", "STL"):
            spills.append(depths[i.position])
        barriers += opcode == "BAR"
        if kind := _SASS_GLOBAL.get(opcode):
            widths = [_SASS_WIDTH[m] for m in modifiers if m in _SASS_WIDTH]
            width = 0 if kind == "bulk" else widths[-1] if widths else 4
            accesses.append(Access(kind, width, depths[i.position], i.text))
    return Code(
        registers=int(usage[1]),
        scalar_registers=0,
        stack=int(usage[2]) + int(usage[3]),
        spills=len(spills),
        spill_depth=max(spills, default=0),
        barriers=barriers,
        instructions=len(instructions),
        binary_size=len(cubin),
        accesses=tuple(accesses),
    )


# AMD

_AMD_GLOBAL = re.compile(r"^(?:global|buffer|flat)_(load|store|atomic)(?:_(\w+))?")
_AMD_WIDTH = {
    "ubyte": 1, "sbyte": 1, "byte": 1, "u8": 1, "i8": 1, "b8": 1,
    "ushort": 2, "sshort": 2, "short": 2, "u16": 2, "i16": 2, "b16": 2,
    "dword": 4, "b32": 4, "dwordx2": 8, "b64": 8,
    "dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16,
}  # fmt: skip


def read_amdgcn(text: str) -> Code:
    def metadata(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found, f"the assembly has no .{key}"
        return int(found[1])

    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text[: text.rindex("s_endpgm") + len("s_endpgm")].splitlines():
        line = line.split(";")[0].strip()
        if label := re.match(r"^([.\w$]+):$", line):
            labels[label[1]] = len(lines)
        elif line and not line.startswith("."):
            lines.append(line)
    instructions = []
    for position, line in enumerate(lines):
        branch = re.match(r"s_c?branch\w*\s+([.\w$]+)", line)
        ends = line.startswith(("s_branch", "s_endpgm", "s_setpc"))
        target = labels[branch[1]] if branch else None
        instructions.append(_Instruction(position, line, target, ends))
    depths = _depths(instructions)
    accesses = []
    for i in instructions:
        if found := _AMD_GLOBAL.match(i.text):
            kind, width = found[1], found[2] or ""
            if "lds" in width.split("_") or " lds" in i.text:
                kind = "async"
            width = next((w for w in width.split("_") if w in _AMD_WIDTH), "dword")
            accesses.append(Access(kind, _AMD_WIDTH[width], depths[i.position], i.text))
    return Code(
        registers=metadata("vgpr_count"),
        scalar_registers=metadata("sgpr_count"),
        stack=metadata("private_segment_fixed_size"),
        spills=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        spill_depth=0,
        barriers=sum(i.text.startswith("s_barrier") for i in instructions),
        instructions=len(instructions),
        binary_size=len(text),
        accesses=tuple(accesses),
    )
