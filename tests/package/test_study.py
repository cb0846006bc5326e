"""The study of small policies: its grid, one run of it, its tables and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import study_tables
import torch

from bench.study import __main__ as program
from bench.study import findings, grid, pictures
from bench.study.grid import Run
from bench.study.task import EOS, Task, draw_numbers
from bench.study.train import group_advantages, train


def result(
    right: float, *, kl: float = 0.01, before: float = 0.3, extra: float = 2.0
) -> dict[str, Any]:
    """A run of 48 rollouts that rises from 0.3 to `right`."""
    before = 0.3
    rise = [before + (right - before) * i / 47 for i in range(48)]
    names = ("outside", "dropped", "ratio_max", "grad_norm", "entropy")
    return {
        "before": {"right": before, "extra": 0.0},
        "after": {"right": right, "extra": extra},
        "finite": True,
        "curves": {"right": rise, "extra": [extra] * 48, "kl": [kl] * 48}
        | {name: [0.1] * 48 for name in names},
    }


def report(**changed: dict[str, Any]) -> dict[str, Any]:
    runs = {run.key: result(0.5 + 0.01 * run.seed) for run in grid.full()}
    return {"runs": runs | changed}


def test_the_grid_has_every_cell_with_every_seed() -> None:
    runs = grid.full()
    assert len({run.key for run in runs}) == len(runs)
    cells = {replace(run, seed=0) for run in runs}
    assert len(runs) == len(cells) * 5
    for part, mus in (("reuse", (4, 16, 64)), ("stale", (16, 64)), ("length", (4, 16))):
        for method in grid.METHODS:
            assert {r.mu for r in runs if r.part == part and r.method == method} == set(mus)
    for part, mu in (("reuse", 16), ("stale", 64), ("length", 16)):
        of_part = {r.method for r in runs if r.part == part and r.mu == mu}
        assert of_part == grid.OBJECTIVES.keys() == grid.LABELS.keys()
    assert all(256 % run.mu == 0 for run in runs if run.part == "stale")


def test_what_is_rewarded() -> None:
    numbers = torch.tensor([[3, 1, 2, 0]] * 4)
    ids = torch.tensor(
        [
            [0, 1, 2, 3, EOS, EOS],
            [0, 1, 2, 3, 20, EOS],
            [0, 1, 3, 2, EOS, EOS],
            [0, 1, EOS, 3, 1, 1],
        ]
    )
    ends = (ids == EOS).cumsum(1)
    mask = ends - (ids == EOS).long() == 0
    right, reward = Task().score(numbers, ids[:, :5], mask[:, :5])
    assert right.tolist() == reward.tolist() == [1, 0, 0, 0]
    right, reward = Task(max_extra=1, length_bonus=0.5).score(numbers, ids, mask)
    assert right.tolist() == [1, 1, 0, 0]
    assert reward.tolist() == [1, 1.5, 0, 0]
    assert draw_numbers(100, torch.Generator().manual_seed(0)).unique().tolist() == list(range(10))


def test_advantages_are_of_their_group() -> None:
    rewards = torch.cat([torch.ones(8), torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])])
    advantages = group_advantages(rewards)
    assert advantages[:8].tolist() == [0] * 8
    assert advantages[8:].sum().item() == pytest.approx(0, abs=1e-5)
    assert advantages[8].item() == pytest.approx(2.475, abs=1e-2)


@pytest.mark.nightly
def test_a_run_learns_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        found = train(Run("stale", "cfpo-0.2", 3e-4, 64, 0))
    finally:
        torch.set_num_threads(threads)
    assert found["finite"] and found["after"]["right"] > found["before"]["right"] + 0.1
    assert {len(curve) for curve in found["curves"].values()} == {4}
    assert json.loads(json.dumps(found)) == found


def test_a_stopped_study_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = grid.quick()
    path = tmp_path / "runs.jsonl"
    lines = [json.dumps({"key": run.key, "result": result(0.6)}) for run in wanted]
    path.write_text("\n".join(lines) + "\n" + '{"key": "cut o')
    monkeypatch.setattr(program, "train", lambda run: pytest.fail("trained again"))
    program.main(["--quick", "--kept", str(path), "--json", str(tmp_path / "out.json")])
    assert len(json.loads((tmp_path / "out.json").read_text())["runs"]) == 6


def test_tables_are_of_the_runs() -> None:
    broken = result(0.1)
    tables = findings.markdown(report(**{"reuse cfpo-0.2 0.001 16 0": broken}))
    assert "1 of 45" in tables["best-rates"] and "0 of 45" in tables["best-rates"]
    assert tables["widths"].count("1/5 broke") == 1
    assert "+0.000 [+0.000, +0.000]" in tables["differences"]
    better = {run.key: result(0.9) for run in grid.full() if run.method == "cfpo-0.2"}
    tables = findings.markdown(report(**better))
    assert "+0.380" in tables["differences"]
    assert all(table.count("\n") > 2 for table in tables.values())


def test_nearest_in_kl() -> None:
    runs = {run.key: result(0.5) for run in grid.full()}
    for run in grid.full():
        kl = {"cfpo-0.2": 0.002, "ppo-0.05": 0.0021}.get(run.method, 0.05)
        runs[run.key] = result(0.7 if run.method == "ppo-0.05" else 0.5, kl=kl)
    table = findings.nearest_in_kl(findings.found({"runs": runs}))
    assert "| CFPO 0.2: 0.0020 | PPO 0.05: 0.0021 | .50 | .70 |" in table


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = pictures.save(report(), tmp_path / "study.png")
    assert [path.name for path in written] == ["study-heat-map.png", "study-length.png"]
    assert all(path.stat().st_size > 10_000 for path in written)
    quick = {"runs": {run.key: result(0.5) for run in grid.quick()}}
    assert len(pictures.save(quick, tmp_path / "quick.png")) == 1


def test_the_page_is_made_from_the_runs_that_ship() -> None:
    report = json.loads(study_tables.RESULTS.read_text())
    assert report["runs"].keys() == {run.key for run in grid.full()}
    text = study_tables.PAGE.read_text()
    assert study_tables.with_tables(text, report) == text, "run tools/study_tables.py --write"
    for drawn in ("heat-map", "length"):
        picture = study_tables.RESULTS.with_name(f"{study_tables.RESULTS.stem}-{drawn}.png")
        assert picture.exists() and f"bench/results/{picture.name}" in text
