"""Builds the interpreter: a library for `Module`, and emulated_check.cpp on PTX."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emulation import CXX, INTERPRETER, compile_cpp
from limits import HANGS_AFTER
from repository import ROOT

Done = subprocess.CompletedProcess[str]


def compile_sources(names: Iterable[str], folder: Path, *flags: str) -> list[Path]:
    """Their objects, in the folder."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(name: str) -> Path:
        made = folder / f"{name}.o"
        source = ROOT / "tests" / "cpp" / "ptx" / f"{name}.cpp"
        compile_cpp(source, made, "-c", *flags, optimise="-O2")
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, names))


def build_library(folder: Path, *flags: str) -> Path:
    library = folder / "libptx.so"
    if not library.exists():
        names = [name for name in INTERPRETER if name != "launch"]
        objects = compile_sources([*names, "library"], folder, *flags)
        subprocess.run([CXX, "-shared", *flags, *map(str, objects), "-o", str(library)], check=True)
    return library


def build_check(folder: Path) -> Path:
    program = folder / "check"
    if not program.exists():
        objects = compile_sources(INTERPRETER, folder)
        for source in (ROOT / "tests/cpp/emulated_check.cpp", ROOT / "csrc/cuda/plan.cpp"):
            objects.append(folder / f"{source.stem}.o")
            compile_cpp(source, objects[-1], "-c")
        # Kernels are found by the names that the program exports.
        command = [CXX, "-rdynamic", *map(str, objects), "-ldl", "-o", str(program)]
        subprocess.run(command, check=True)
    return program


def run_check(program: Path, ptx: Path, kernels: str, **options: int) -> Done:
    """On the PTX of a folder; options `seed`, `async_` and `races`, as launch.cpp has them."""
    environment = {f"CFPO_PTX_{name.upper().strip('_')}": str(x) for name, x in options.items()}
    environment = os.environ | environment | {"CFPO_PTX": str(ptx)}
    return subprocess.run(
        [str(program), kernels],
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        env=environment,
    )
