"""The interpreter of tests/cpp/ptx itself: single instructions against the PTX manual.

Every form of its table is tried here, on values that are written out; so is everything that it has
to refuse. Under sanitizers too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import CXX, SANITIZE
from limits import HANGS_AFTER
from ptx_tools import single
from ptx_tools.build import build_library
from ptx_tools.interpreter import Module, known_forms, text_of
from ptx_tools.kernel_cases import KERNELS, PROLOGUE, check_kernel
from ptx_tools.mistake_cases import MISTAKES, check_mistake
from ptx_tools.register_cases import CASES
from repository import SUPPORT

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")


def forms_of(interpreter: Path, body: str) -> set[str]:
    return set(Module(interpreter, text_of(body)).forms()["small"])


def test_every_form_is_tried(interpreter: Path) -> None:
    known = set(known_forms(interpreter))
    tried = {case.form for case in CASES}
    for kernel in KERNELS.values():
        tried |= forms_of(interpreter, PROLOGUE + kernel.body)
    assert known - tried == {"trap"}, "a form without a test"
    assert "trap" in MISTAKES


def test_register_instructions(interpreter: Path) -> None:
    assert single.wrong_ones(interpreter, CASES) == []


@pytest.mark.parametrize("case", CASES[::40], ids=lambda case: case.form)
def test_another_result_is_noticed(case: single.Case, interpreter: Path) -> None:
    kind, _ = case.results[0]
    other = single.run(interpreter, case)[0] ^ 1
    changed = case._replace(results=((kind.replace("f", "b"), other), *case.results[1:]))
    assert not single.is_right(interpreter, changed)


@pytest.mark.parametrize("name", KERNELS)
def test_a_small_kernel(name: str, interpreter: Path) -> None:
    check_kernel(interpreter, name)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str, interpreter: Path) -> None:
    check_mistake(interpreter, name)


@pytest.mark.nightly
def test_under_sanitizers(tmp_path: Path) -> None:
    library = build_library(tmp_path, *SANITIZE)
    runtimes = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(path.strip() for path in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": str(SUPPORT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "ptx_tools.single", str(library)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANGS_AFTER,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    counts = f"{len(CASES)} + {len(KERNELS)} + {len(MISTAKES)} cases, 0 wrong"
    assert done.stdout.strip() == counts
