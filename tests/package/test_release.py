"""What a release is made of: one version, its notes, the same bytes each time, a pure wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT
from test_packaging import copy_of_the_tree, run_installed, run_ok

TOOLS = ROOT / "tools" / "release"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_version() -> None:
    version = load("notes").version()
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == version
    newest = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == version


def test_notes_of_a_release(capsys: pytest.CaptureFixture[str]) -> None:
    notes = load("notes")
    notes.main(f"v{notes.version()}")
    text = capsys.readouterr().out
    assert "###" in text and "\n## [" not in text
    with pytest.raises(SystemExit, match=r"the tag is v9\.9\.9"):
        notes.main("v9.9.9")
    with pytest.raises(SystemExit, match="no section"):
        notes.section("9.9.9")


def date_of_a_build(**environment: str) -> str:
    inherited = {name: x for name, x in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    done = subprocess.run(
        ["make", "--print-data-base", "--dry-run", "dist"],
        cwd=ROOT, env=inherited | environment, capture_output=True, text=True,
    )  # fmt: skip
    (found,) = re.findall(r"^dist: SOURCE_DATE_EPOCH := (.*)$", done.stdout, re.MULTILINE)
    return str(found)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_build_is_dated_by_its_commit(tmp_path: Path) -> None:
    command = ["git", "log", "-1", "--format=%ct"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert date_of_a_build() == commit.stdout.strip()
        assert date_of_a_build(GIT_DIR=str(tmp_path / "none")) == "315532800"
    assert date_of_a_build(SOURCE_DATE_EPOCH="1700000000") == "1700000000"


def built(folder: Path, **options: str) -> Path:
    """As `make dist`, from a copy of the tree whose files are of now."""
    tree = copy_of_the_tree(folder / "tree")
    for path in tree.rglob("*"):
        os.utime(path)
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check"]
    environment = {"CFPO_KERNELS_NATIVE": "OFF", "SOURCE_DATE_EPOCH": "1700000000"}
    run_ok([*command, "--outdir", folder / "dist", tree], cwd=folder, **environment)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    run_ok([sys.executable, TOOLS / "normalise_sdist.py", sdist], cwd=folder, **environment)
    return folder / "dist"


@pytest.mark.nightly
def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("build")
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        files = sorted(built(tmp_path / name).iterdir())
        found.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert len(found[0]) == 2 and found[0] == found[1]

    (wheel,) = (tmp_path / "first" / "dist").glob("*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "cfpo_kernels/triton_kernels/kernels.py" in names
    assert not [name for name in names if name.endswith(".so")]
    # What the workflow runs on other systems.
    printed = run_installed(wheel, tmp_path)
    assert "by plain torch" in printed and "cpu: no" in printed
