"""Walks compiled kernels (SASS): what a path costs in cycles, what is in a loop, what comes before.

Every instruction says how long the next has to wait (its stall count), which of six scoreboards is
released when its result is there, which when its operands are read, and for which scoreboards it
waits itself. A warp's own hardware goes by nothing else, so the time of one that has its scheduler
to itself follows from the code and the latencies of what has no fixed one. Those are assumptions,
and LATENCIES has all of them: what comes out is no measurement.

A state is the time and the times at which the scoreboards are released. Every instruction maps
states by sums and maxima alone, so the longest of all paths through a region is found in one pass,
by the maximum of the states where paths join.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

# Cycles from issue to release of the scoreboard, by the first that the opcode begins with. From
# public microbenchmarks of Volta to Hopper, rounded up; "LDG" is a miss of L2.
LATENCIES = {
    "MUFU.RCP64H": 30,
    "MUFU": 24,
    "F2F": 22,
    "F2I": 26,
    "I2F": 22,
    "FRND": 22,
    "LDSM": 33,
    "LDS": 28,
    "SHFL": 24,
    "REDUX": 24,
    "SYNCS.PHASECHK": 30,
    "SYNCS": 20,
    "FENCE": 20,
    "MEMBAR": 30,
    "LDC": 40,
    "S2": 30,
    "R2UR": 12,
    "LDG": 700,
    "STAS": 20,
    "": 25,
}
OPERANDS_READ = 12  # cycles until a scoreboard of operands is released
TAKEN = 8  # cycles more of a branch that is taken, and its instructions fetched

# Not on the usual path: divisions by what is no normal number, lanes that are apart.
SLOW = r"CALL|RET|WARPSYNC\.COLLECTIVE|BPT"

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]+ \*/\s*/\* 0x([0-9a-f]+) \*/")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    opcode: str
    stall: int
    sets: int | None  # scoreboard that its result releases
    reads: int | None  # the one that is released when its operands are read
    waits: tuple[int, ...]
    targets: tuple[int, ...]  # of a branch
    goes_on: bool  # whether what follows may be next

    @property
    def latency(self) -> int:
        return next(n for name, n in LATENCIES.items() if self.opcode.startswith(name))


Code = dict[int, Instruction]  # by address


def _instruction(address: int, text: str, control: int) -> Instruction:
    bare = re.sub(r"^@!?U?P\w+\s+", "", text)
    opcode, _, operands = bare.partition(" ")
    # BRA.DIV is taken by lanes that are apart. In "BRA P5, 0x40" the predicate is an operand.
    branch = re.match(r"BRA(?!\.DIV)", opcode) and re.search(r"0x([0-9a-f]+)$", operands)
    always = bare == text and "," not in operands
    waits = control >> 11 & 63
    if found := re.match(r"SB(\d)", operands):  # DEPBAR
        waits |= 1 << int(found[1])

    def scoreboard(bits: int) -> int | None:
        return None if bits & 7 == 7 else bits & 7

    return Instruction(
        address,
        text,
        opcode,
        max(control & 15, 1),
        scoreboard(control >> 5),
        scoreboard(control >> 8),
        tuple(i for i in range(6) if waits >> i & 1),
        (int(branch[1], 16),) if branch else (),
        not (always and re.match(r"BRA(?!\.DIV)|BRX|EXIT|RET|BPT", opcode)),
    )


def parse(text: str) -> Code:
    """One function as ``cuobjdump -sass`` prints it."""
    found = {}
    for address, instruction, control in _LINE.findall(text):
        at = int(address, 16)
        found[at] = _instruction(at, instruction.strip(), int(control, 16) >> 41)
    assert found, "no instructions"
    # Where a table of jumps leads is in the constants. It is where nothing else does; of several
    # tables each is taken to lead to all such places.
    tables = [i for i in found.values() if i.opcode == "BRX"]
    if tables:
        elsewhere = {b for i in found.values() for b in successors(found, i)}
        targets = tuple(a for a in found if a not in elsewhere and a != min(found))
        found |= {table.address: replace(table, targets=targets) for table in tables}
    return found


def disassemble(cuobjdump: str, file: str, function: str, arch: str = "") -> Code:
    where = ("-arch", arch) if arch else ()  # a cubin has one and does not say which
    command = [cuobjdump, "-sass", *where, "-fun", function, file]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def successors(code: Code, i: Instruction) -> list[int]:
    step = min((a - i.address for a in (i.address + 8, i.address + 16) if a in code), default=0)
    following = [i.address + step] if i.goes_on and step else []
    return [*following, *i.targets]


def reachable(code: Code, starts: Iterable[int], without: str = "(?!)") -> set[int]:
    """What comes after an instruction, on paths without any whose opcode is `without`."""
    found: set[int] = set()
    stack = list(starts)
    while stack:
        for after in successors(code, code[stack.pop()]):
            if after not in found and not re.match(without, code[after].opcode):
                found.add(after)
                stack.append(after)
    return found


def places(code: Code, opcode: str, within: Collection[int] | None = None) -> list[int]:
    return [a for a in sorted(within or code) if re.match(opcode, code[a].opcode)]


def loops_around(code: Code, opcode: str, region: Collection[int] | None = None) -> list[set[int]]:
    """The loops around the region's only instructions with this opcode, from the outermost in."""
    at = places(code, opcode, region)
    assert at, f"no {opcode}"
    before: dict[int, list[int]] = {}
    for a, i in code.items():
        for b in successors(code, i):
            before.setdefault(b, []).append(a)
    found: list[set[int]] = []
    within = set(code)
    while True:
        inside = {a for a in within if not re.match(SLOW, code[a].opcode)}
        sets = []
        for neighbours in (lambda a: successors(code, code[a]), lambda a: before.get(a, [])):
            reached: set[int] = set()
            stack = at[:1]
            while stack:
                for b in neighbours(stack.pop()):
                    if b in inside and b not in reached:
                        reached.add(b)
                        stack.append(b)
            sets.append(reached)
        loop = sets[0] & sets[1]
        if not set(at) <= loop:
            assert found, f"{opcode} in no loop, or in several"
            return found
        found.append(loop)
        within = loop - {head(code, loop)}


def innermost_loops(code: Code, opcode: str) -> list[set[int]]:
    """Those that have an instruction with this opcode, each once."""
    found: list[set[int]] = []
    for at in places(code, opcode):
        with contextlib.suppress(AssertionError):  # in none
            if (loop := loops_around(code, opcode, {at})[-1]) not in found:
                found.append(loop)
    return found


def loops_within(code: Code, loop: Collection[int]) -> list[set[int]]:
    """Those that a loop passes through, by the branches that lead back."""
    start = head(code, loop)
    inside = {a for a in loop if not re.match(SLOW, code[a].opcode)}
    before: dict[int, list[int]] = {}
    for a in inside:
        for b in successors(code, code[a]):
            before.setdefault(b, []).append(a)
    found = []
    for last, first in sorted(_order(code, start, inside)[1]):
        if first == start:
            continue
        body, stack = {first, last}, [last]
        while stack:
            at = stack.pop()
            for a in before.get(at, ()) if at != first else ():
                if a not in body:
                    body.add(a)
                    stack.append(a)
        found.append(body)
    return found


def head(code: Code, loop: Collection[int]) -> int:
    """Where a loop is entered."""
    inside = set(loop)
    again = {b for a in inside for b in successors(code, code[a]) if b <= a and b in inside}
    entered = {b for a in code.keys() - inside for b in successors(code, code[a]) if b in inside}
    entered.add(min(code))
    heads = again & entered
    assert heads, "a loop that nobody enters where it begins again"
    return min(heads)


def fewest_around(code: Code, loop: Collection[int], by: Iterable[int] = ()) -> list[int]:
    """The shortest path once around a loop, by the number of instructions; `by` these, in order."""
    start = head(code, loop)
    stops, inside = [start, *by, start], set(loop) - {start}
    found: list[int] = []
    for begin, end in itertools.pairwise(stops):
        if (part := _fewest(code, inside, begin, end)) is None:
            raise AssertionError("no way around")
        found += part
    return found


def _fewest(code: Code, loop: Collection[int], start: int, end: int) -> list[int] | None:
    """The shortest path, without `end`; of at least one instruction."""
    came_from: dict[int, int] = {}
    paths = [start]
    for at in paths:  # which grows
        for after in successors(code, code[at]):
            if after == end:
                path = [at]
                while path[-1] != start:
                    path.append(came_from[path[-1]])
                return path[::-1]
            if after in loop and after not in came_from:
                came_from[after] = at
                paths.append(after)
    return None


@dataclass(frozen=True)
class State:
    time: float = 0.0
    released: tuple[float, ...] = (0.0,) * 6

    def join(self, other: State) -> State:
        both = zip(self.released, other.released, strict=True)
        return State(max(self.time, other.time), tuple(max(pair) for pair in both))

    def after(self, i: Instruction, taken: bool) -> State:
        issued = max([self.time, *(self.released[w] for w in i.waits)])
        released = list(self.released)
        for scoreboard, latency in ((i.sets, i.latency), (i.reads, OPERANDS_READ)):
            if scoreboard is not None:
                released[scoreboard] = max(released[scoreboard], issued + latency)
        return State(issued + i.stall + (TAKEN if taken else 0), tuple(released))


def _order(
    code: Code, start: int, allowed: Collection[int]
) -> tuple[list[int], set[tuple[int, int]]]:
    """Every place behind those that lead to it, but for the edges back, which are left out."""
    order: list[int] = []
    back: set[tuple[int, int]] = set()
    seen, open_ = {start}, {start}
    stack = [(start, iter(successors(code, code[start])))]
    while stack:
        at, rest = stack[-1]
        for after in rest:
            if after in open_:
                back.add((at, after))
            elif after in allowed and after not in seen:
                seen.add(after)
                open_.add(after)
                stack.append((after, iter(successors(code, code[after]))))
                break
        else:
            stack.pop()
            open_.discard(at)
            order.append(at)
    return order[::-1], back


def walk(
    code: Code,
    start: int,
    loop: Collection[int],
    state: State,
    seen: Callable[[int, State], None] = lambda at, state: None,
) -> State:
    """Once around the loop that begins at `start`, by the longest path."""
    order, back = _order(code, start, loop)
    states = {start: state}
    end: State | None = None
    for at in order:
        if at not in states:
            continue  # only by paths that were cut
        seen(at, states[at])
        for after in successors(code, code[at]):
            new = states[at].after(code[at], taken=after in code[at].targets)
            if after == start:
                end = new if end is None else end.join(new)
            elif after in loop and (at, after) not in back:
                states[after] = states[after].join(new) if after in states else new
    assert end is not None, "no way around"
    return end


def cycles_around(code: Code, loop: Collection[int], avoid: str = "(?!)") -> float:
    """Of one time around, after others, by the longest path without `avoid`.

    Loops within are passed through once.
    """
    start = head(code, loop)
    allowed = {a for a in loop if not re.match(f"{SLOW}|{avoid}", code[a].opcode)}
    state, before = State(), 0.0
    for _ in range(3):
        before = state.time
        state = walk(code, start, allowed, state)
    return state.time - before


def cycles_along(code: Code, path: list[int]) -> float:
    """Of one time along a path that goes around, after others."""
    state, before = State(), 0.0
    for _ in range(3):
        before = state.time
        for at, after in zip(path, [*path[1:], path[0]], strict=True):
            state = state.after(code[at], taken=after in code[at].targets)
    return state.time - before
