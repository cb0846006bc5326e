"""The example that users start from runs, reports and draws its plot."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HANGS_AFTER
from repository import ROOT

for module in ("mistral_common", "matplotlib", "rich"):
    pytest.importorskip(module, reason="the examples need the examples extra")

SCRIPT = ROOT / "examples" / "train_cfpo.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_demo(*args: str) -> subprocess.CompletedProcess[str]:
    # A width of its own: the terminal of whoever runs the tests must not wrap the lines.
    env = os.environ | {"COLUMNS": "120"}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANGS_AFTER)


def test_the_head_is_a_linear_layer() -> None:
    spec = importlib.util.spec_from_file_location("_model", SCRIPT.with_name("_model.py"))
    assert spec is not None and spec.loader is not None
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    g = torch.Generator().manual_seed(0)
    n_tokens = 2 * model.Head.BLOCK + 100  # three blocks, the last of them short
    hidden, weight = (torch.randn(n, 8, generator=g, requires_grad=True) for n in (5, n_tokens))
    logits = model.Head.apply(hidden, weight)
    want = torch.nn.functional.linear(hidden, weight).bfloat16()
    torch.testing.assert_close(logits, want)
    dlogits = torch.randn(logits.shape, generator=g).bfloat16()
    got, wanted = (torch.autograd.grad(x, (hidden, weight), dlogits) for x in (logits, want))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["cfpo", pytest.param("ppo", marks=pytest.mark.nightly)])
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
