"""The versions that the package is said to work with, and the program that tests them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import test_matrix as matrix
from marked import with_part
from repository import ROOT

from cfpo_kernels.backends import triton

PROJECT = (ROOT / "pyproject.toml").read_text()

NOT_HERE = {"3.14"}  # named, and wheels are built for it; docs/versions.md says that nobody ran it


def bound(package: str) -> str:
    (found,) = re.findall(rf'"{package}>=([\d.]+)"', PROJECT)
    return str(found)


def as_numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def works(result: dict[str, Any], part: str = "cpu") -> bool:
    counts = result.get(part, {})
    return counts.get("passed", 0) > 0 and not counts["failed"] and "failed first" not in counts


def test_the_table_is_made_from_the_results() -> None:
    text = matrix.PAGE.read_text()
    made = matrix.table(matrix.read_results())
    assert with_part(text, "versions", made) == text, "run tools/test_matrix.py --write"


def test_the_bounds_are_versions_that_ran() -> None:
    results = [
        result for result in matrix.read_results().values() if "passed" in result.get("cpu", {})
    ]
    least = as_numbers(bound("torch"))
    accepted = [x for x in results if as_numbers(x["torch"]) >= least]
    assert len(accepted) > 1 and all(works(x) for x in accepted)
    assert all(x["first loss"] == "passed" for x in accepted)
    assert min(as_numbers(x["torch"]) for x in accepted)[:2] == least
    tested = {x["python"].rpartition(".")[0] for x in accepted}
    named = set(re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT))
    assert tested <= named and named - tested == NOT_HERE
    assert triton.OLDEST == matrix.OLDEST_TRITON
    assert ".".join(map(str, triton.OLDEST)) == bound("triton")
    for result in results:
        if "passed" in result.get("interpreted triton", {}):
            assert works(result, "interpreted triton")


# The program ------------------------------------------------------------------------------------

TESTS = """
import os
import pytest

@pytest.mark.parametrize("x", range(3))
def test_that_passes(x):
    pass

def test_that_is_skipped():
    pytest.skip("as here")

@pytest.mark.slow
def test_that_is_slow():
    raise AssertionError("not asked for")

def test_of_triton():
    assert os.environ.get("TRITON_INTERPRET") != "1", "a mistake\\nin two lines"
"""
OPTION = """
def pytest_addoption(parser):
    parser.addoption("--target", action="append")
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that is this Python's, whose checkout is one file of tests."""
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "versions.json")
    monkeypatch.setattr(matrix, "SOME_TESTS", ("some.py",))
    monkeypatch.setattr(matrix, "TRITON_TESTS", ("some.py",))
    monkeypatch.setattr(matrix, "IMPORT", "import json")
    monkeypatch.setattr(matrix, "first_loss", lambda: "import json")
    monkeypatch.setattr(matrix, "install", lambda *of: None)
    monkeypatch.setattr(matrix, "build", lambda *of: None)
    here = "{}.{}".format(*sys.version_info)
    made = matrix.Environment(here, "9.9.9", "numpy")
    monkeypatch.setattr(matrix, "ENVIRONMENTS", (made,))
    monkeypatch.setattr(type(made), "python_inside", sys.executable)
    versions = {"python": f"{here}.0", "torch": "9.9.9", "numpy": "2.0.0", "triton": "3.6.0"}
    monkeypatch.setattr(matrix, "VERSIONS", f"print({json.dumps(json.dumps(versions))})")
    made.checkout.mkdir(parents=True)
    (made.checkout / "some.py").write_text(TESTS)
    (made.checkout / "conftest.py").write_text(OPTION)
    (made.checkout / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow\n")
    return made


def test_an_environment_is_examined_and_deleted(environment: Any) -> None:
    assert matrix.main(["--only", environment.name]) == 1  # something failed
    (result,) = matrix.read_results().values()
    assert (result["torch"], result["first loss"]) == ("9.9.9", "passed")
    assert result["commit"] == matrix.commit()
    counts = [
        tuple(result[part][kind] for kind in ("passed", "failed", "skipped"))
        for part in ("cpu", "interpreted triton")
    ]
    assert counts == [(4, 0, 1), (3, 1, 1)]
    assert works(result) and not works(result, "interpreted triton")
    assert (
        "test_of_triton: AssertionError: a mistake" in result["interpreted triton"]["failed first"]
    )
    made = matrix.table(matrix.read_results())
    assert f"{result['date']} {result['commit']}".strip() in made
    assert "| 4 passed, 1 skipped | 3 passed, **1 failed**, 1 skipped |" in made
    assert "What failed first" in made and "a mistake`" in made
    assert not environment.folder.exists()


@pytest.mark.parametrize(
    ("name", "value", "part"),
    (
        ("IMPORT", "raise ImportError('no such symbol')", "failed first"),
        ("SOME_TESTS", ("none.py",), "cpu"),
    ),
)
def test_what_does_not_start_has_failed(
    environment: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, part: str
) -> None:
    monkeypatch.setattr(matrix, name, value)
    monkeypatch.setattr(matrix, "no_triton", lambda versions: "no Triton")
    assert matrix.main(["--keep"]) == 1
    (result,) = matrix.read_results().values()
    said = result[part] if part == "failed first" else result[part]["failed first"]
    assert said == "import: ImportError: no such symbol" or "pytest: exit status 4" in said
    assert not works(result) and "**failed**" in matrix.table({environment.name: result})
    assert environment.folder.exists()


def test_a_step_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo began; sleep 60 & wait"]
    assert matrix.run(command, 1, tmp_path) == (None, "began\n")


def test_what_is_not_here_is_named(
    environment: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "ENVIRONMENTS", (matrix.Environment("3.99", "9.9.9", None),))
    assert matrix.main([]) == 0
    (result,) = matrix.read_results().values()
    assert result == {"not run": "no Python 3.99 here"}
    said = capsys.readouterr().out
    assert "not run: no Python 3.99 here" in said
    row = "| 3.99 | 9.9.9 | none | torch's | not run: no Python 3.99 here |"
    assert row in matrix.table(matrix.read_results())
    (asked,) = matrix.ENVIRONMENTS
    matrix.keep_result(asked.name, {"found": "elsewhere"})
    assert matrix.main([]) == 0
    assert matrix.read_results() == {asked.name: {"found": "elsewhere"}}
