"""tools/gpu_check.py without a GPU: what it would run, and what is left when it is cut off."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import sanitizer_case
from repository import ROOT
from targets import GPUS

from bench import __main__ as bench


def test_every_file_with_gpu_tests_is_run() -> None:
    suite = [path.stem for path in (ROOT / "tests" / "every_target").glob("test_*.py")]
    assert len(suite) >= 5
    assert gpu_check.gpu_tests().keys() == {
        "test_cuda_gpu",
        "test_cuda_kernels-cuda-gpu",
        "test_gpu",
        "test_gpu_triton",
        "test_linear_gpu",
        *(f"{name}-{target}" for name in suite for target in GPUS),
    }
    name, (path, target) = "test_loss-cuda-gpu", gpu_check.gpu_tests()["test_loss-cuda-gpu"]
    command, _ = gpu_check.tests_of(name, path, target, "there/gpu")
    assert command[-3:] == ["--junitxml=there/gpu-test_loss-cuda-gpu.xml", "--target", "cuda-gpu"]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is run, without running it; results go to tmp_path."""
    commands: list[str] = []

    def run(name: str, command: list[str], limit: float, env: object = None) -> int:
        if name == "test_edges-cuda-gpu":
            raise KeyboardInterrupt
        commands.append(name)
        return int(name == "test_cuda_kernels-cuda-gpu")

    monkeypatch.setattr(gpu_check, "gpu_is_visible", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", lambda: {"device": "A GPU"})
    monkeypatch.setattr(gpu_check, "own_architecture", lambda: "90a-real")
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setenv("OUT", str(tmp_path))
    return commands


def test_what_was_found_is_kept_when_it_is_cut_off(on_a_gpu: list[str], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main([])
    record = json.loads((tmp_path / "a-gpu-check.json").read_text())
    assert record["exit_status"] == {
        "build": 0,
        "verify": 0,
        **{f"test_autograd-{target}": 0 for target in GPUS},
        "test_cuda_gpu": 0,
        "test_cuda_kernels-cuda-gpu": 1,
    }


def test_some_steps(on_a_gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}
    noted = gpu_check.run

    def run(name: str, command: list[str], limit: float, env: object = None) -> int:
        limits[name] = limit
        return noted(name, command, limit, env)

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    assert gpu_check.main(["bench", "sanitizer"]) == 0
    assert on_a_gpu == ["bench", "bench-linear"]
    record = json.loads((tmp_path / "a-gpu-check-bench-sanitizer.json").read_text())
    # A tool that is not there has neither passed nor been forgotten.
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    assert record["exit_status"] == {f"sanitizer-{tool}": None for tool in tools} | {
        "bench": 0,
        "bench-linear": 0,
    }
    command, _ = gpu_check.all_steps("there/gpu")["bench-linear"]
    bench.make_parser().parse_args(command[3:])  # what it is told, it knows
    assert limits == {"bench": 1200, "bench-linear": 300}
    with pytest.raises(SystemExit, match="no step begins with 'tetst'"):
        gpu_check.main(["tetst"])


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_check.run("hang", [sys.executable, "-c", parent], 1) == gpu_check.TIMED_OUT
    time.sleep(3)
    assert not late.exists()
    assert gpu_check.run("works", [sys.executable, "-c", "raise SystemExit(3)"], 60) == 3


@pytest.mark.parametrize("pitch", [5, 6])
def test_the_sanitizer_case_has_whole_vectors(pitch: int) -> None:
    """The kernels read rows by aligned vectors; what lies in the last is initialised too."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 5).to(dtype)
        rows = sanitizer_case.rows_in_whole_vectors(x, pitch, "cpu")
        assert torch.equal(rows, x) and rows.stride() == (pitch, 1)
        storage = rows.untyped_storage()
        assert storage.nbytes() % 16 == 0 and storage.nbytes() >= 3 * pitch * dtype.itemsize
        tail = torch.empty(0, dtype=dtype).set_(storage)[3 * pitch :]
        assert tail.numel() > 0 and not tail.any()
