"""What a release is made of: one version, its notes, the same bytes each time, a pure wheel."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT
from test_packaging import copy_of_the_tree, run_ok

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


@pytest.mark.slow
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
    # It works, and says what it has not.
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
        "import torch, cfpo_kernels\n"
        "assert cfpo_kernels.__file__.startswith(sys.argv[1])\n"
        "logits = torch.zeros(2, 3, requires_grad=True)\n"
        "cfpo_kernels.cfpo_loss(logits, torch.tensor([0, 2]), torch.ones(2)).backward()\n"
        "print(logits.grad.abs().sum().item() > 0, cfpo_kernels.available_backends()['cpu'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "site"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True")
    assert "pure Python" in done.stdout
