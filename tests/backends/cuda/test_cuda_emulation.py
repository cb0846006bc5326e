"""The emulation's clusters, barriers and bulk copies work, and notice when they are misused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import CXX, SANITIZE, compile_cpp
from limits import HANGS_AFTER
from repository import ROOT

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")


SOURCE = ROOT / "tests" / "cpp" / "cluster_primitives.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("primitives") / "check"
    compile_cpp(SOURCE, built)
    return built


def run(program: Path, mistake: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), mistake], capture_output=True, text=True, timeout=HANGS_AFTER
    )


def test_right_use(program: Path) -> None:
    done = run(program, "none")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("mistake", "what"),
    [
        ("no first barrier", "a message to a block that has not begun"),
        ("not all sent", "deadlock"),
        ("early exit", "a message to a block that has ended"),
        ("no last barrier", "a message to a block that has ended"),
        ("sent too early", "deadlock|orders failed"),
        ("no wait", "orders failed"),
        ("wrong parity", "orders failed|deadlock"),
        ("early refill", "bytes changed"),
        ("not waited for", "ended with asynchronous copies"),
        ("no fence", "a bulk store of bytes that are not fenced"),
        ("sums not fenced", "a message over bytes whose reader has not fenced them"),
        ("chunk not fenced", "a bulk load over bytes whose reader has not fenced them"),
        ("too few bytes", "deadlock"),
        ("misaligned", "misaligned"),
    ],
)
def test_misuse_is_noticed(program: Path, mistake: str, what: str) -> None:
    done = run(program, mistake)
    assert done.returncode != 0
    assert any(text in done.stdout + done.stderr for text in what.split("|")), done.stderr


def test_a_read_past_the_emulation_is_noticed(program: Path, tmp_path: Path) -> None:
    """Of what a copy has written, by a pointer: unseen, except by the address sanitizer."""
    assert run(program, "direct").returncode == 0
    sanitized = tmp_path / "sanitized"
    compile_cpp(SOURCE, sanitized, *SANITIZE)
    assert run(sanitized, "none").returncode == 0
    assert "use-after-poison" in run(sanitized, "direct").stderr
