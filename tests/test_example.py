"""The example that users start from runs, reports and draws its plot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS_AFTER

for module in ("mistral_common", "matplotlib", "rich"):
    pytest.importorskip(module, reason="the examples need the examples extra")

SCRIPT = Path(__file__).parents[1] / "examples" / "train_cfpo.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_demo(*args: str) -> subprocess.CompletedProcess[str]:
    # A width of its own: the terminal of whoever runs the tests must not wrap the lines.
    env = os.environ | {"COLUMNS": "120"}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANGS_AFTER)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["cfpo", "ppo"])
def test_demo_trains_reports_and_plots(tmp_path: Path, objective: str) -> None:
    plot = tmp_path / "folder" / "demo.png"
    done = run_demo("--smoke", "--objective", objective, "--threads", "2", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(PNG_SIGNATURE)
    assert "held-out prompts" in done.stdout
    assert f"{objective.upper()}: sampled reward rose on" in done.stdout
    assert "fused kernel" in done.stdout
    assert "naive" in done.stdout


def test_demo_refuses_an_unknown_objective() -> None:
    done = run_demo("--objective", "reinforce")
    assert done.returncode == 2
    assert "invalid choice: 'reinforce'" in done.stderr
