"""Compile what production code launches, for a GPU that is not there, and read the machine code.

    with offline("sm_90") as launches:
        launch_fused(fake((4, 128256), torch.bfloat16), ...)  # production code, unchanged
    assert launches[0].spills == 0
    assert all(access.bytes == 16 for access in launches[0].streaming("load"))

Inside the block each `kernel[grid](...)` runs Triton's own specialisation, cache and compiler under
a driver that only names the target; nothing is executed. `fake` gives tensors without memory.

As a program, `python -m triton_tools.offline ARCH MODULE:FUNCTION` calls the function inside such a
block and prints one JSON object per launch: with PYTHONPATH it serves to try another Triton.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .machine_code import Access, Code, read_amdgcn, read_cubin


def fake(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    strides: Sequence[int] | None = None,
    offset: int = 0,
) -> Tensor:
    """A meta tensor whose address is `offset` elements past a 16-byte boundary.

    Triton specialises on address % 16, so `offset=1` is a misaligned base. `strides` in elements.
    """
    contiguous = torch.empty(tuple(shape), dtype=dtype, device="meta").stride()
    strides = contiguous if strides is None else tuple(strides)
    size = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    base = torch.empty(max(size, offset), dtype=dtype, device="meta")
    return base.as_strided(tuple(shape), strides, offset)


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](...)`: how it was called and what it compiled to."""

    function: JITFunction
    arch: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    kernel: Any  # triton's CompiledKernel, the same object for launches that share one

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def asm(self) -> dict[str, Any]:
        """Text of each stage: "ttir", "ttgir", "llir", "ptx" or "amdgcn"; bytes of the binary."""
        return self.kernel.asm

    @property
    def num_warps(self) -> int:
        return self.kernel.metadata.num_warps

    @property
    def shared(self) -> int:
        """Bytes of shared memory (LDS) of a block, which Triton allocates at launch."""
        return self.kernel.metadata.shared

    @cached_property
    def code(self) -> Code:
        if self.arch.startswith("gfx"):
            return read_amdgcn(self.asm["amdgcn"])
        return read_cubin(self.asm["cubin"])

    @property
    def registers(self) -> int:
        """Registers a thread (vector registers on AMD)."""
        return self.code.registers

    @property
    def spills(self) -> int:
        """Instructions that read or write a thread's local memory; spilled registers on AMD."""
        return self.code.spills

    def count(self, kind: str, *, bytes: int | None = None, looped: bool | None = None) -> int:
        """Global-memory instructions. `kind`: "load" | "store" | "async" | "bulk" | "atomic"."""
        return sum(
            access.kind == kind
            and (bytes is None or access.bytes == bytes)
            and (looped is None or (access.depth > 0) == looped)
            for access in self.code.accesses
        )

    def streaming(self, kind: str) -> list[Access]:
        """The accesses of that kind in its innermost loops: those that move the rows."""
        found = [a for a in self.code.accesses if a.kind == kind]
        depth = max((a.depth for a in found), default=0)
        assert depth > 0, f"{self.name} for {self.arch} has no {kind} in a loop"
        return [a for a in found if a.depth == depth]

    def summary(self) -> dict[str, Any]:
        """What the command line prints."""
        code = asdict(self.code)
        accesses = [(a["kind"], a["bytes"], a["depth"]) for a in code.pop("accesses")]
        code["accesses"] = {
            f"{kind}{bytes}@{depth}": accesses.count((kind, bytes, depth))
            for kind, bytes, depth in sorted(set(accesses))
        }
        return {
            "kernel": self.name,
            "arch": self.arch,
            "triton": triton.__version__,
            "grid": list(self.grid),
            "num_warps": self.num_warps,
            "shared": self.shared,
            **code,
        }


class Launches(list[Launch]):
    """The launches of an `offline` block, in order."""

    def specialisations(self, kernel: Any) -> int:
        """How many entries the block made in the kernel's own just-in-time cache."""
        function = _jit_function(kernel)
        return len({id(launch.kernel) for launch in self if launch.function is function})


class _Driver:
    """Answers "which target?" and refuses the rest."""

    def __init__(self, target: GPUTarget, device: str) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, _device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(
            f"driver.{name} needs a GPU; autotuned kernels have to be given a config"
        )


def warp_size(arch: str) -> int:
    """Threads that run together: AMD's data center GPUs have more."""
    return 64 if arch.startswith("gfx9") else 32


_blocks = itertools.count()


@contextmanager
def offline(arch: str) -> Iterator[Launches]:
    """Compiles launches for `arch` ("sm_80", "sm_90", "gfx942", ...) instead of running them.

    Each block starts with empty just-in-time caches, as a new process would. A kernel that the
    compiler or ptxas refuses raises their error from the launch.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; compile in another process")
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, warp_size(arch))
    launches, touched = Launches(), set[JITFunction]()
    device = f"offline block {next(_blocks)}"
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        touched.add(self)
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = set(self.signature.parameters)
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
        bound.apply_defaults()
        grid = grid(bound.arguments) if callable(grid) else grid
        launches.append(Launch(self, arch, tuple(grid), dict(bound.arguments), kernel))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(target, device))
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = active
        for kernel in touched:
            kernel.device_caches.pop(device, None)


def _jit_function(kernel: Any) -> JITFunction:
    """The function under decorators such as triton.heuristics."""
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    return kernel


def main(arguments: Sequence[str]) -> None:
    arch, (module, function) = arguments[0], arguments[1].split(":")
    calls: Callable[[], object] = getattr(importlib.import_module(module), function)
    with offline(arch) as launches:
        calls()
    for launch in launches:
        print(json.dumps(launch.summary()))


if __name__ == "__main__":
    main(sys.argv[1:])
