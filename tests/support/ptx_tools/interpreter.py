"""PTX on CPU memory.

    module = Module(library, text)
    at = x.ctypes.data
    module.launch("kernel", (1,), (32,), pack(("q", at)), memory=[(at, x.nbytes, True)])

`library` is what build.py makes of tests/cpp/ptx. A mistake of the PTX is a `PtxError` that names
the thread and the instruction.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class PtxError(RuntimeError):
    """What a GPU would do wrong, or might; or PTX that the interpreter does not know."""


ASYNC = ("immediate", "late", "random")
ORDERS = ("forward", "backward", "shuffled", "starved")


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint),
        ("shared", ctypes.c_ulonglong),
        ("params", ctypes.c_char_p),
        ("param_bytes", ctypes.c_ulonglong),
        ("async_", ctypes.c_int),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_ulonglong),
        ("exact_if_exact", ctypes.c_int),
        ("proxies", ctypes.c_int),
        ("races", ctypes.c_int),
        ("unwritten_is_error", ctypes.c_int),
        ("n_ranges", ctypes.c_int),
        ("ranges", ctypes.c_void_p),
    )


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("write", ctypes.c_bool))


class How(NamedTuple):
    """In which order threads run, and when what is asynchronous happens."""

    async_: str = "random"
    order: str = "shuffled"
    seed: int = 1


def every_how(seeds: int) -> list[How]:
    return [How(a, o, seed + 1) for seed in range(seeds) for a in ASYNC for o in ORDERS]


def _load(library: Path) -> Any:
    lib = ctypes.CDLL(str(library))
    lib.ptx_load.restype = ctypes.c_void_p
    lib.ptx_load.argtypes = [ctypes.c_char_p]
    lib.ptx_free.argtypes = [ctypes.c_void_p]
    lib.ptx_message.restype = lib.ptx_forms.restype = ctypes.c_char_p
    lib.ptx_forms.argtypes = [ctypes.c_void_p]
    lib.ptx_launch.restype = ctypes.c_longlong
    lib.ptx_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Launch)]
    return lib


def known_forms(library: Path) -> list[str]:
    """All of the interpreter's table."""
    return str(_load(library).ptx_forms(None).decode()).splitlines()


class Module:
    def __init__(self, library: Path, text: str) -> None:
        self.lib = _load(library)
        self.handle = self.lib.ptx_load(text.encode())
        if not self.handle:
            raise PtxError(self.lib.ptx_message().decode())

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.lib.ptx_free(self.handle)

    def forms(self) -> dict[str, dict[str, int]]:
        """How often each form occurs, by kernel."""
        found: dict[str, dict[str, int]] = {}
        for line in self.lib.ptx_forms(self.handle).decode().splitlines():
            kernel, form, count = line.split("\t")
            found.setdefault(kernel, {})[form] = int(count)
        return found

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        params: bytes,
        *,
        how: How = How(),  # noqa: B008  # never changed
        memory: Sequence[tuple[int, int, bool]] = (),
        cluster: int = 0,
        shared: int = 0,
        exact_if_exact: bool = False,
        proxies: int = 2,
        races: bool = True,
        unwritten_is_error: bool = True,
    ) -> int:
        """Instructions executed. `memory`: address, bytes and whether it may be written."""

        def three(x: Sequence[int]) -> Any:
            return (ctypes.c_uint * 3)(*x, *(1,) * (3 - len(x)))

        ranges = (_Range * len(memory))(*((at, at + n, write) for at, n, write in memory))
        launch = _Launch(
            three(grid),
            three(block),
            cluster,
            shared,
            params,
            len(params),
            ASYNC.index(how.async_),
            ORDERS.index(how.order),
            how.seed,
            exact_if_exact,
            proxies,
            races,
            unwritten_is_error,
            len(memory),
            ctypes.cast(ranges, ctypes.c_void_p),
        )
        done = self.lib.ptx_launch(self.handle, name.encode(), ctypes.byref(launch))
        if done < 0:
            raise PtxError(self.lib.ptx_message().decode())
        return int(done)


def pack(*values: tuple[str, Any]) -> bytes:
    """Parameters by their letters of `struct`, such as ("q", address), each aligned to its size."""
    packed = b""
    for kind, value in values:
        size = struct.calcsize(kind)
        packed += b"\0" * (-len(packed) % size) + struct.pack("<" + kind, value)
    return packed


HEAD = """\
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
"""


def text_of(body: str) -> str:
    """A module with the kernel `small`, which has one parameter, p0, and registers %a0 to %a63."""
    declared = ".reg .b64 %a<64>;\n"  # no register has a type for the interpreter
    return f"{HEAD}.visible .entry small(.param .u64 p0)\n{{\n{declared}{body}ret;\n}}\n"
