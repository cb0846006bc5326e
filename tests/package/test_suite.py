"""The test suite itself: what it says without a native module, and which tests it leaves out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS_AFTER
from repository import ROOT, TESTS
from targets import TARGETS


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
    daily, everything = (said.count("[cpu-inductor-") for said in done.stdout.split("==\n")[1:])
    assert 0 < daily < everything


ROOM = TESTS / "every_target"
COUNT = """
options = ["-p", "no:cacheprovider", "--collect-only", "-q", "--nightly"]
options += [x for name in {names} for x in ("--target", name)]
assert pytest.main([*options, "tests/every_target"]) == 0
"""
# Test functions that need not run on a target, or cannot, by the marks in that folder.
LEFT_OUT = {
    "reference": 13 + 24,  # of them those of shards and softcaps, which are the kernels
    "triton-interpreted": 1 + 4,  # entropies of confident rows: test_triton_entropy.py
    **{f"cuda-{code}-cluster": 1 + 12 for code in ("source", "ptx")},  # those of softcaps
}


def test_every_test_runs_on_every_target() -> None:
    """But for those that are marked, with a reason; and no target has lost its tests."""
    done = run(COUNT.format(names=list(TARGETS)))
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^tests/every_target/(\w+)\.py::(\w+)\[([\w-]+)", done.stdout, re.M)
    functions: dict[str, set[tuple[str, str]]] = {name: set() for name in TARGETS}
    for file, function, parameters in found:
        name = max((x for x in TARGETS if f"{parameters}-".startswith(f"{x}-")), key=len)
        functions[name].add((file, function))
    everything = set().union(*functions.values())
    assert {file for file, _ in everything} == {path.stem for path in ROOM.glob("test_*.py")}
    above = ("test_autograd", "test_shard_controls", "test_targets")  # the kernels
    kernels = {x for x in everything if x[0] not in above}
    for name, has in functions.items():
        missing = kernels - has
        assert len(missing) <= LEFT_OUT.get(name, 1), f"{name} lost {missing}"


MARKED = """
import pathlib
for test in pathlib.Path({folder!r}).glob("test_*.py"):
    assert pytest.main(["-p", "no:cacheprovider", "-c", "pyproject.toml", str(test)]) == 4
"""
BAD_MARKS = {
    "no reason": '@pytest.mark.not_on("cpu")',
    "no such target": '@pytest.mark.nightly_on("tpu", reason="it is slow")',
    "no target": '@pytest.mark.only_on(reason="it is slow")',
    "no fixture": '@pytest.mark.not_on("cpu", reason="it is slow")',
}


def test_a_mark_has_targets_and_a_reason(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    for mistake, mark in BAD_MARKS.items():
        argument = "" if mistake == "no fixture" else "target"
        name = f"test_{mistake.replace(' ', '_')}.py"
        (tmp_path / name).write_text(f"import pytest\n\n{mark}\ndef test({argument}): ...\n")
    done = run(MARKED.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("takes names of targets and a reason") == len(BAD_MARKS)


READ = {".py", ".md", ".h", ".cpp", ".cu", ".cuh", ".toml", ".txt"}
LOG = ROOT / "CHANGELOG.md"  # which says how things were


def test_the_files_that_texts_name_exist() -> None:
    """So that a file that is moved takes its mentions along."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    files = {ROOT / name for name in listed.stdout.splitlines()}
    names = {path.name for path in files}
    texts = [path for path in files if path.is_file() and path.suffix in READ and path != LOG]
    wrong = []
    for path in texts:
        for name in re.findall(r"\b(?:tests/[\w/]+\.\w+|test_\w+\.py)\b", path.read_text()):
            there = (ROOT / name).exists() if "/" in name else name in names
            if not there:
                wrong.append(f"{path.relative_to(ROOT)} names {name}")
    assert len(texts) > 200 and wrong == []
