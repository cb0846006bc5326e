"""Compiles CUDA sources to PTX, each once for all processes that run the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock
from repository import ROOT

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
MISSING = "needs nvcc, on PATH or in CUDACXX (requirements/cuda.txt)"
# As CMakeLists.txt compiles them.
FLAGS = ("-ptx", "-std=c++17", "-O3", "-DNDEBUG", "-fmad=false")

# Instances of the kernels that take the gradient with the loss.
POLICIES = ("policy",)
CHECKED = f"{POLICIES[0]}_bfloat16"  # what emulated_check.cpp runs
ROWS, CLUSTERS = "80", "90a"  # the oldest architectures that kernels of either kind are for
OF_CLUSTERS = ("cluster", "transient")


def compile_ptx(source: Path, arch: str, output: Path, tree: Path = ROOT) -> str:
    """The PTX's text; `tree` has the headers."""
    assert NVCC is not None, MISSING
    command = [NVCC, *FLAGS, f"-arch=compute_{arch}", f"-I{tree / 'csrc'}", str(source)]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return output.read_text()


def plant(file: str, line: str, planted: str, folder: Path) -> Path:
    """A copy of the sources with a mistake in it."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = folder / "csrc" / "cuda" / file
    text = source.read_text()
    assert text.count(line) == 1, f"{file} no longer has {line!r} once"
    source.write_text(text.replace(line, planted))
    return folder


def instance_of(kernel: str) -> str:
    """The file of csrc/cuda/instances that a kernel, by its mangled name, is compiled in."""
    if "multiply_kernel" in kernel:
        return "multiply"
    stages = {"LogpsBackwardStage": "logps_backward", "LogpsStage": "logps"}
    # Sums alone are of no stage: the files of all have them.
    stage = next((file for name, file in stages.items() if name in kernel), POLICIES[0])
    dtype = re.search(r"kernelI(?:NS_\d+(bfloat16|float16)E|f)", kernel)
    assert dtype is not None, kernel
    return f"{stage}_{dtype[1] or 'float32'}"


class Compiler:
    """PTX of the kernels, kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def compile(self, source: Path, arch: str) -> Path:
        made = self.folder / arch / f"{source.stem}.ptx"
        made.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(made.with_suffix(".lock")):
            if not made.exists():
                temporary = made.with_suffix(".tmp")
                compile_ptx(source, arch, temporary)
                temporary.rename(made)
        return made

    def instance(self, name: str, arch: str) -> Path:
        return self.compile(ROOT / "csrc" / "cuda" / "instances" / f"{name}.cu", arch)

    def text_of(self, kernel: str) -> str:
        """The module that has the kernel, for the oldest architecture that it runs on."""
        arch = CLUSTERS if any(f"{name}_kernel" in kernel for name in OF_CLUSTERS) else ROWS
        return self.instance(instance_of(kernel), arch).read_text()
