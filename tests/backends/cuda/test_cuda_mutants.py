"""The emulated kernels under sanitizers, and mistakes planted in them that must be found.

support/cuda_mutants.py has them. If a change of the kernels makes a line unknown there, a test says
so: plant the same mistake in the new code.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_mutants import ALWAYS, MUTANTS, Mutant
from emulation import CXX, SANITIZE, compile_cpp
from limits import HANGS_AFTER
from repository import ROOT

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")


def build(folder: Path, tree: Path, flags: list[str]) -> Path:
    program = folder / "check"
    plan = str(tree / "csrc" / "cuda" / "plan.cpp")
    compile_cpp(tree / "tests" / "cpp" / "emulated_check.cpp", program, plan, *flags, tree=tree)
    return program


Done = subprocess.CompletedProcess[str]


def run(program: Path, kernels: str = "") -> Done:
    return subprocess.run(
        [str(program), kernels], capture_output=True, text=True, timeout=HANGS_AFTER
    )


def mutated(mutant: Mutant) -> str:
    """The file with the mistake in it."""
    text = (ROOT / "csrc" / "cuda" / mutant.file).read_text()
    assert text.count(mutant.line) == 1, f"{mutant.file} no longer has {mutant.line!r} once"
    return text.replace(mutant.line, mutant.planted)


def plant(mutant: Mutant, folder: Path) -> Path:
    """A copy of the sources with the mistake in it."""
    for part in ("csrc", "tests/cpp"):
        shutil.copytree(ROOT / part, folder / part)
    (folder / "csrc" / "cuda" / mutant.file).write_text(mutated(mutant))
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="plain"),
        pytest.param(SANITIZE, id="sanitized", marks=pytest.mark.nightly),
    ],
)
def test_the_kernels_pass(flags: list[str], tmp_path: Path) -> None:
    done = run(build(tmp_path, ROOT, flags))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert " 0 failed" in done.stdout


def test_every_mistake_can_be_planted() -> None:
    assert set(MUTANTS) >= ALWAYS
    for mutant in MUTANTS.values():
        assert mutated(mutant)  # which looks for the line


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in MUTANTS],
)
def test_a_planted_mistake_is_found(name: str, tmp_path: Path) -> None:
    flags = [*MUTANTS[name].flags, "-Wno-unused"]
    kernels = {"cluster": "clusters", "transient": "transient"}.get(name.partition(":")[0], "rows")
    done = run(build(tmp_path, plant(MUTANTS[name], tmp_path), flags), kernels)
    assert done.returncode != 0, f"not found: {name}"
    assert MUTANTS[name].found in done.stderr
