"""Launches of Triton kernels that run the PTX which Triton compiles for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction
from triton_tools.offline import Launch, Launches, offline

from .interpreter import How, Module, pack

KINDS = {"i1": "?", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}


class Runner:
    """What launches need besides what Triton knows."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.how, self.exact_if_exact = How(), False
        self.modules: dict[int, Module] = {}
        self.launches: Launches = Launches()

    def run(self, launch: Launch) -> None:
        kernel = launch.kernel
        if id(kernel) not in self.modules:
            self.modules[id(kernel)] = Module(self.library, launch.asm["ptx"])
        values, memory = [], []
        for name, kind in kernel.src.signature.items():
            value = launch.arguments[name]
            if kind == "constexpr":
                continue
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                memory.append((storage.data_ptr(), storage.nbytes(), True))
                values.append(("q", value.data_ptr()))
            else:
                values.append((KINDS[kind], value))
        metadata = kernel.metadata
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
        self.modules[id(kernel)].launch(
            metadata.name,
            launch.grid,
            (32 * launch.num_warps,),
            pack(*values, ("q", 0), ("q", 0)),  # no scratch memory
            how=self.how,
            memory=memory,
            shared=launch.shared,
            exact_if_exact=self.exact_if_exact,
        )


@contextmanager
def on_ptx(arch: str, library: Path) -> Iterator[Runner]:
    """As triton_tools.offline, but what was compiled runs, on CPU tensors."""
    runner = Runner(library)
    with offline(arch) as launches:
        compile_only = JITFunction.run
        runner.launches = launches

        def compile_and_run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
            kernel = compile_only(self, *args, **kwargs)
            runner.run(launches[-1])
            launches[-1].arguments.clear()  # autograd copies a gradient that others hold
            return kernel

        JITFunction.run = compile_and_run
        yield runner  # `offline` restores what was there before
