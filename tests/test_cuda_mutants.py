"""The emulated kernels under sanitizers, and mistakes planted in them that must be found.

Each mutant is the source with one line changed. If a change of the kernels makes a line unknown
here, the test says so: plant the same mistake in the new code.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from emulation import CXX, ROOT, compile_cpp

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")

SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class Mutant(NamedTuple):
    file: str
    line: str
    planted: str
    flags: list[str] = []  # noqa: RUF012  # never changed


ROW, SEGMENT, SPLIT, ELEMENTS = (
    "row_kernel.cuh",
    "segment.cuh",
    "split_kernels.cuh",
    "elements.cuh",
)
MUTANTS = {
    "sums merged before all have come": Mutant(
        ROW, "    hw::sync_block();\n    if (Stage::kSums) {", "    if (Stage::kSums) {"
    ),
    "gradient written before its coefficients": Mutant(
        ROW, "    hw::sync_block();\n  }\n  CFPO_DEVICE RowStats", "  }\n  CFPO_DEVICE RowStats"
    ),
    "other lanes' copies not waited for": Mutant(
        ROW,
        "    hw::wait_copies(--under_way_);\n    hw::sync_warp();",
        "    hw::wait_copies(--under_way_);",
    ),
    "copies not waited for": Mutant(ROW, "hw::wait_copies(--under_way_);", "--under_way_;"),
    "a window refilled while it is read": Mutant(
        ROW, "    hw::sync_warp();\n    fetch_segment", "    fetch_segment"
    ),
    "a barrier that some warps miss": Mutant(
        ROW, "    hw::sync_block();\n    if (Stage::kSums) {",
        "    if (part() == 0) hw::sync_block();\n    if (Stage::kSums) {",
    ),
    "a segment taken from a window that has another": Mutant(
        ROW,
        "i >= count() - kRing);\n      if (!in_window)",
        "i >= count() - kRing - 1);\n      if (!in_window)",
    ),
    "split: coefficients used before they are there": Mutant(
        SPLIT, "  hw::wait_copies(0);\n  hw::sync_block();", "  hw::wait_copies(0);"
    ),
    "the tail is missing": Mutant(SEGMENT, "ragged = head + out.count - tail", "ragged = head"),
    "the head is missing": Mutant(
        SEGMENT, "if (lane_index() < ragged)", "if (lane_index() < ragged && lane_index() >= head)"
    ),
    "a vector written past the end": Mutant(
        SEGMENT, "(out.count - head) / kElements", "(out.count - head + kElements - 1) / kElements"
    ),
    "a vector read past the end": Mutant(
        SEGMENT, "i < bytes; i +=", "i < bytes + kVectorBytes; i +=", SANITIZE
    ),
    "columns past the end summed": Mutant(
        SEGMENT, "first + j >= segment.count || first + j == skip", "first + j == skip"
    ),
    "the target summed twice": Mutant(
        SEGMENT, "first + j >= segment.count || first + j == skip", "first + j >= segment.count"
    ),
    "a shift by 4 bytes forgotten": Mutant(ELEMENTS, "if (shift & 4)", "if (false)"),
}  # fmt: skip


def build(folder: Path, tree: Path, flags: list[str]) -> Path:
    program = folder / "check"
    plan = str(tree / "csrc" / "cuda" / "plan.cpp")
    compile_cpp(tree / "tests" / "cpp" / "emulated_check.cpp", program, plan, *flags, tree=tree)
    return program


Done = subprocess.CompletedProcess[str]


def run(program: Path) -> Done:
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=120)


def plant(name: str, folder: Path) -> Path:
    """A copy of the sources with the mistake in it."""
    mutant = MUTANTS[name]
    for part in ("csrc", "tests/cpp"):
        shutil.copytree(ROOT / part, folder / part)
    source = folder / "csrc" / "cuda" / mutant.file
    text = source.read_text()
    assert text.count(mutant.line) == 1, f"{mutant.file} no longer has {mutant.line!r} once"
    source.write_text(text.replace(mutant.line, mutant.planted))
    return folder


@pytest.mark.parametrize("flags", [[], SANITIZE], ids=["plain", "sanitized"])
def test_the_kernels_pass(flags: list[str], tmp_path: Path) -> None:
    done = run(build(tmp_path, ROOT, flags))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert " 0 failed" in done.stdout


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(name: str, tmp_path: Path) -> None:
    flags = [*MUTANTS[name].flags, "-Wno-unused"]
    done = run(build(tmp_path, plant(name, tmp_path), flags))
    assert done.returncode != 0, f"not found: {name}"
