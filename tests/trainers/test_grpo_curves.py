"""A short GRPO run beside TRL's own: the benchmark's curves agree, and another loss would not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the TRL integration needs the trl extra")
pytest.importorskip("matplotlib", reason="the benchmark draws")

from bench import grpo_curves
from bench.grpo_run import Setting, train
from cfpo_kernels import CFPO

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

# Warm-up would leave the first off-policy ratios at 1.
SHORT = Setting(steps=4, batch=16, completion=8, warmup=0)


def largest(report: dict, name: str, key: str) -> float:
    return max(distance for _, distance in grpo_curves.differences(report, name, key))


def test_the_curves_agree_with_trl_and_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved, picture = tmp_path / "out.json", tmp_path / "out.png"
    small = ["--steps", "4", "--batch", "16", "--completion", "8", "--warmup", "0"]
    grpo_curves.main([*small, "--json", str(saved), "--plot", str(picture)])
    report = json.loads(saved.read_text())
    for run in report["curves"].values():
        assert all(len(values) == 4 for values in run.values())
        assert run["clip_ratio"][1] > 0.05, "the clip is used"
        assert run["kl"][1] > 1e-3
        assert [value is None for value in run["reward"]] == [False, True, False, True]
    assert report["identical"]["ours"] == [16, 16]
    assert largest(report, "ours", "reward") == 0
    for name in ("same", "ours"):
        assert largest(report, name, "loss") < 1e-5
        assert largest(report, name, "kl") < 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "step 1 of 4" in said
    grpo_curves.main(["--from-json", str(saved)])
    assert capsys.readouterr().out in said


def test_another_loss_is_told_apart() -> None:
    report = {"setting": {}, **train(SHORT, objective=CFPO())}
    assert largest(report, "same", "loss") > 1e-2
    assert largest(report, "ours", "loss") > 1e-2


def test_where_runs_part() -> None:
    report = {"setting": {"batch": 4}, "identical": {"ours": [4, 4, 3, 4], "nudged": [4, 4]}}
    assert grpo_curves.parted_at(report, "ours") == 5
    assert grpo_curves.parted_at(report, "nudged") is None
