"""Watch every memory access of interpreted Triton launches.

    with checked_launches() as log:
        launch_fused(logits, ...)  # production code, CPU tensors
    assert (log.launches[-1].writes("dlogits_ptr") == 1).all()
    assert not log.launches[-1].reads("logits_ptr")[~mask].any()

An `AccessError` names the kernel's argument and the program when a lane

- leaves the view that was passed, be it for the hole between its rows or for another argument;
- is not aligned to an element of it;
- writes an element that another lane of the same store writes.

At the end of a launch a `RaceError` tells of memory that one program writes and another reads or
writes, through whatever argument; atomics race with plain accesses only. Programs of a launch have
no order, and no ordering by atomics is understood.

Pointers are known by a tag: while a launch is checked, the k-th tensor argument's address has k + 1
in its bits 48 and up, which pointer arithmetic carries along. Accesses are kept as intervals of
addresses, so that memory and time do not grow with the extent of a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

from .interpreter import mend

TAG_SHIFT = 48
ADDRESS = (1 << TAG_SHIFT) - 1
READ, WRITE, ATOMIC = 0, 1, 2

Ints = NDArray[np.int64]


class AccessError(Exception):
    """A lane touches memory that it must not."""


class RaceError(Exception):
    """The result depends on the order of the launch's programs."""


@dataclass
class View:
    """The elements of a strided tensor, as addresses."""

    name: str
    tensor: Tensor

    def __post_init__(self) -> None:
        t = self.tensor
        self.base, self.itemsize = t.data_ptr(), t.element_size()
        # Outermost first, without expanded dimensions: they only repeat elements.
        dims = [d for d in range(t.dim()) if t.shape[d] > 1 and t.stride(d) > 0]
        self.dims = sorted(dims, key=lambda d: -t.stride(d))
        inner = 0
        for d in reversed(self.dims):
            if t.stride(d) <= inner:
                raise ValueError(f"{self.name}: elements overlap, strides {t.stride()}")
            inner += (t.shape[d] - 1) * t.stride(d)

    def elements(self, addresses: Ints) -> NDArray[np.bool_]:
        """Which of the addresses are an element's."""
        rest = addresses - self.base
        good = (rest >= 0) & (rest % self.itemsize == 0)
        rest //= self.itemsize
        for d in self.dims:
            index, rest = np.divmod(rest, self.tensor.stride(d))
            good &= index < self.tensor.shape[d]
        return good & (rest == 0) & (self.tensor.numel() > 0)

    def counts(self, intervals: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
        """How many of the byte intervals touch each element; shaped as the view."""
        t = self.tensor
        addresses = np.full(1, self.base, np.int64)
        for d in self.dims:
            steps = np.arange(t.shape[d], dtype=np.int64) * t.stride(d) * self.itemsize
            addresses = (addresses[:, None] + steps).reshape(-1)
        bounds = np.array(intervals, dtype=np.int64).reshape(-1, 2)
        change = np.zeros(len(addresses) + 1, np.int64)
        np.add.at(change, np.searchsorted(addresses + self.itemsize, bounds[:, 0], "right"), 1)
        np.add.at(change, np.searchsorted(addresses, bounds[:, 1], "left"), -1)
        counts = np.cumsum(change[:-1])
        inverse = np.argsort(np.array(self.dims, dtype=np.int64))
        counts = counts.reshape([t.shape[d] for d in self.dims]).transpose(inverse)
        kept = [t.shape[d] if d in self.dims else 1 for d in range(t.dim())]
        return np.broadcast_to(counts.reshape(kept), tuple(t.shape))


@dataclass
class CheckedLaunch:
    """What one launch did to memory."""

    kernel: str
    grid: tuple[int, int, int] = (0, 0, 0)
    views: list[View] = field(default_factory=list)
    # (kind, program) -> byte intervals [begin, end)
    accesses: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)

    def view(self, name: str) -> View:
        for view in self.views:
            if view.name == name:
                return view
        names = ", ".join(view.name for view in self.views)
        raise KeyError(f"{self.kernel} got no tensor {name}; it got {names}")

    def reads(self, name: str) -> NDArray[np.int64]:
        """How often each element of the argument was read, also through aliases."""
        return self.view(name).counts(self._intervals(READ, ATOMIC))

    def writes(self, name: str) -> NDArray[np.int64]:
        """How often each element of the argument was written, also through aliases."""
        return self.view(name).counts(self._intervals(WRITE, ATOMIC))

    def _intervals(self, *kinds: int) -> list[tuple[int, int]]:
        return [i for (kind, _), found in self.accesses.items() if kind in kinds for i in found]

    def access(self, pointers: NDArray[Any], mask: Any, itemsize: int, kind: int) -> NDArray[Any]:
        """Checks and notes the active lanes; returns the pointers without tags."""
        tagged = pointers.astype(np.int64)
        # A mask may come as integers, which would pick elements by number.
        lanes = tagged[np.broadcast_to(mask, tagged.shape).astype(bool)]
        for tag in np.unique(lanes >> TAG_SHIFT):
            self._check(int(tag), lanes[lanes >> TAG_SHIFT == tag] & ADDRESS, itemsize, kind)
        return (tagged & ADDRESS).astype(np.uint64)

    def _check(self, tag: int, addresses: Ints, itemsize: int, kind: int) -> None:
        verb = ("load from", "store to", "atomic on")[kind]
        builder = interpreter.interpreter_builder
        where = f"{self.kernel}, program {builder.grid_idx}"
        if not 0 < tag <= len(self.views):
            raise AccessError(f"{where}: {verb} an address that no argument leads to")
        view = self.views[tag - 1]
        if itemsize != view.itemsize:
            raise AccessError(
                f"{where}: {verb} {view.name} by {itemsize} bytes;"
                f" its elements have {view.itemsize}"
            )
        if not (good := view.elements(addresses)).all():
            offset, odd = divmod(int(addresses[~good][0]) - view.base, view.itemsize)
            raise AccessError(
                f"{where}: {verb} {view.name} outside the view of shape {tuple(view.tensor.shape)}"
                f" and strides {view.tensor.stride()}: {(~good).sum()} lane(s), the first"
                f" {offset} elements{f' and {odd} bytes' if odd else ''} from its start"
            )
        addresses = np.sort(addresses)
        gaps = np.diff(addresses)
        if kind == WRITE and (gaps == 0).any():
            raise AccessError(f"{where}: one {verb} {view.name} writes an element twice")
        # Lanes that load the same element count once: it is one access of the program.
        edges = np.flatnonzero(gaps > itemsize)
        begins = addresses[np.concatenate([[0], edges + 1])]
        ends = addresses[np.concatenate([edges, [len(addresses) - 1]])] + itemsize
        program = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        noted = self.accesses.setdefault((kind, program), [])
        noted.extend(zip(begins.tolist(), ends.tolist(), strict=True))

    def check_races(self) -> None:
        """Raises if programs share memory that one of them writes."""
        rows = [
            (begin, end, program, kind)
            for (kind, program), found in self.accesses.items()
            for begin, end in set(found)
        ]
        if not rows:
            return
        begin, end, program, kind = np.array(rows, dtype=np.int64).T
        # Between neighbouring cuts all bytes have the same accesses.
        cuts = np.unique(np.concatenate([begin, end]))
        first, last = np.searchsorted(cuts, begin), np.searchsorted(cuts, end)
        spans = last - first
        index = np.repeat(np.arange(len(rows)), spans)
        segment = np.arange(len(index)) - np.repeat(np.cumsum(spans) - spans, spans) + first[index]
        lowest, highest = np.full(len(cuts), np.iinfo(np.int64).max), np.full(len(cuts), -1)
        np.minimum.at(lowest, segment, program[index])
        np.maximum.at(highest, segment, program[index])
        kinds = np.zeros(len(cuts), np.int64)
        np.bitwise_or.at(kinds, segment, 1 << kind[index])
        changes, only_atomic = kinds & (1 << WRITE | 1 << ATOMIC), kinds == 1 << ATOMIC
        racy = np.flatnonzero((lowest < highest) & (changes > 0) & ~only_atomic)
        if not len(racy):
            return
        address = int(cuts[racy[0]])
        names = [v.name for v in self.views if v.elements(np.array([address]))[0]]
        raise RaceError(
            f"{self.kernel}: programs {lowest[racy[0]]} and {highest[racy[0]]} share memory of"
            f" {' and '.join(names)} that one of them writes, first at element offset"
            f" {(address - self.view(names[0]).base) // self.view(names[0]).itemsize}"
        )


@dataclass
class Log:
    launches: list[CheckedLaunch] = field(default_factory=list)


class _Memory:
    """Stands for Triton's native loads and stores while launches are checked."""

    def __init__(self, native: Any) -> None:
        self.native = native
        self.launch = CheckedLaunch("none yet")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        pointers = self.launch.access(pointers, mask, np.dtype(dtype).itemsize, READ)
        return self.native.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        pointers = self.launch.access(pointers, mask, value.dtype.itemsize, WRITE)
        return self.native.store(pointers, value, mask)

    def atomic_rmw(self, op: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        pointers = self.launch.access(pointers, mask, value.dtype.itemsize, ATOMIC)
        return self.native.atomic_rmw(op, pointers, value, mask, order)

    def atomic_cas(self, pointers: Any, compare: Any, value: Any, order: Any) -> Any:
        pointers = self.launch.access(pointers, True, value.dtype.itemsize, ATOMIC)
        return self.native.atomic_cas(pointers, compare, value, order)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.dtype, t.shape, t.stride()


@contextmanager
def checked_launches() -> Iterator[Log]:
    """Checks the launches of the block and keeps what they did."""
    mend()
    log = Log()
    memory = _Memory(interpreter._interpreter)
    convert, call = interpreter._implicit_cvt, interpreter.GridExecutor.__call__
    names: list[tuple[str, Tensor]] = []

    def tagged(arg: Any) -> Any:
        converted = convert(arg)
        if isinstance(arg, torch.Tensor):
            # The interpreter converts tensors in an order and of an identity of its own.
            found = next(i for i, (_, t) in enumerate(names) if _layout(t) == _layout(arg))
            memory.launch.views.append(View(names.pop(found)[0], arg))
            converted.handle.data += np.uint64(len(memory.launch.views) << TAG_SHIFT)
        return converted

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        memory.launch = launch = CheckedLaunch(self.fn.__name__)
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        names[:] = [found for name, value in named for found in _tensors(name, value)]
        call(self, *args, **kwargs)
        launch.grid = interpreter.interpreter_builder.grid_dim
        launch.check_races()
        log.launches.append(launch)

    with (
        patch.object(interpreter, "_interpreter", memory),
        patch.object(interpreter, "_implicit_cvt", tagged),
        patch.object(interpreter.GridExecutor, "__call__", checked),
    ):
        yield log
