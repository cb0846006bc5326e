"""Builds the CUDA kernels for the CPU, where tests/cpp/emulation runs them, and calls them.

The module that is built runs their PTX too, by tests/cpp/ptx.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pybind11
from repository import ROOT
from torch import Tensor

from cfpo_kernels.backends.cuda import CudaBackend

CXX = next((c for c in (os.environ.get("CXX"), "c++", "g++") if c and shutil.which(c)), "c++")
FLAGS = ["-std=c++17", "-DCFPO_EMULATE", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# Of tests/cpp/ptx: what runs PTX, and launches of the kernels that do.
INTERPRETER = ("parser", "memory", "machine", "async", "table", "launch")
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_cpp(
    source: Path, output: Path, *flags: str, tree: Path = ROOT, optimise: str = "-O1"
) -> None:
    include = [f"-I{tree / 'csrc'}", f"-I{tree / 'tests' / 'cpp'}"]
    command = [CXX, *FLAGS, optimise, *include, *flags, "-x", "c++", str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def build_module(folder: Path, library: Path) -> None:
    cuda = ROOT / "csrc" / "cuda"
    sources = [*sorted((cuda / "instances").glob("*.cu")), cuda / "dispatch.cpp", cuda / "plan.cpp"]
    interpreter = [ROOT / "tests" / "cpp" / "ptx" / f"{name}.cpp" for name in INTERPRETER]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    binding = ROOT / "tests" / "cpp" / "emulated_module.cpp"
    jobs: list[tuple[Path, Sequence[str], str]] = [(binding, python, "-O0")]
    jobs += [(source, (), "-O1") for source in sources]
    jobs += [(source, (), "-O2") for source in interpreter]
    objects = [folder / f"{source.name}.o" for source, _, _ in jobs]

    def compile_one(job: tuple[tuple[Path, Sequence[str], str], Path]) -> None:
        (source, flags, optimise), output = job
        compile_cpp(source, output, "-c", *flags, optimise=optimise)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, zip(jobs, objects, strict=True)))
    subprocess.run([CXX, "-shared", *map(str, objects), "-ldl", "-o", str(library)], check=True)


def load_module(folder: Path) -> Any:
    """The module `emulated_cuda`: what ``cfpo_kernels._C.cuda`` is, on CPU memory."""
    library = folder / f"emulated_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir()
        build_module(folder, library)
    spec = importlib.util.spec_from_file_location("emulated_cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EmulatedBackend(CudaBackend):
    """The CUDA backend, kernels and all, for CPU tensors."""

    def __init__(self, module: Any, row_kernel: str | None = None) -> None:
        super().__init__(row_kernel)
        self.module = module

    @property
    def kernels(self) -> Any:
        return self.module

    def execution(
        self, logits: Tensor, workspace: bool = False
    ) -> AbstractContextManager[tuple[Any, ...]]:
        self.memory = self.workspace(logits, 0) if workspace else None
        if self.memory is not None:
            self.memory.fill_(0xFF)
        return nullcontext((0, 0, self.memory, self.wanted_row_kernel()))


H100 = (132, 227 * 1024, 228 * 1024)
HOPPER = (*H100, True)  # with clusters
A100 = (108, 163 * 1024, 164 * 1024)
RTX4090 = (128, 99 * 1024, 100 * 1024)
ONE_SM = (1, 227 * 1024, 228 * 1024)  # few rows are no reason to split them, blocks take many
