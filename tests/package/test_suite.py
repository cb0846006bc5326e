"""The test suite itself: what it says without a native module, and which tests it leaves out."""

from __future__ import annotations

import subprocess
import sys

from limits import HANGS_AFTER
from repository import ROOT


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys, pytest\n{program}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_AFTER)


WITHOUT_THE_MODULE = """
sys.modules["cfpo_kernels._C"] = None
sys.exit(pytest.main(["-p", "no:cacheprovider", "--collect-only", "tests/core/test_objective.py"]))
"""


def test_without_the_native_module_it_says_what_to_do() -> None:
    done = run(WITHOUT_THE_MODULE)
    assert done.returncode == 4  # used wrongly
    assert "ERROR: the native module could not be imported" in done.stderr
    assert "`make test` builds it" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


TWICE = """
collect = ["-p", "no:cacheprovider", "--collect-only", "-q", "tests/every_target/test_autograd.py"]
for option in ([], ["--nightly"]):
    print("==")
    assert pytest.main(collect + option) == 0
"""


def test_nightly_tests_run_when_asked_for() -> None:
    done = run(TWICE)
    assert done.returncode == 0, done.stdout + done.stderr
    daily, everything = (said.count("[inductor-") for said in done.stdout.split("==\n")[1:])
    assert 0 < daily < everything
