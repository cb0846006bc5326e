"""What the benchmark makes of samples that other processes disturbed, and its floors."""

from __future__ import annotations

import statistics

import pytest
import torch
from test_bench import SMALL

from bench import against, report, runner, timing
from bench.machine import REPOSITORY


def samples(*taken: tuple[float, bool]) -> timing.Samples:
    made = timing.Samples()
    for milliseconds, interrupted in taken:
        made.take(milliseconds, interrupted)
    return made


def test_interrupted_samples_do_not_decide() -> None:
    steady = [(float(x), False) for x in (10, 11, 12, 13, 14)]
    figures = runner.timing_figures(samples(*steady, *[(90.0, True)] * 20), 1000)
    assert figures["median_ms"] == 12 and figures["uninterrupted"] == 5
    assert figures["max_ms"] == 90 and len(figures["samples_ms"]) == 25
    assert not report.timing_cells(figures)[0].startswith("~")


def test_too_few_uninterrupted_samples_do_not_decide_alone() -> None:
    taken = [(10.0, False)] * 4 + [(20.0, True)] * 6
    figures = runner.timing_figures(samples(*taken), 1000)
    assert figures["median_ms"] == statistics.median([10.0] * 4 + [20.0] * 6)
    assert report.timing_cells(figures)[0].startswith("~")


def test_a_sample_knows_that_it_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(1000))
    for count, interrupted in ((lambda: 7, False), (lambda: next(counts), True)):
        monkeypatch.setattr(timing, "interruptions", count)
        taken = timing.interleaved_samples({"a": lambda: None}, lambda: None, 2, "cpu")["a"]
        assert taken.interrupted == [interrupted] * 2


def test_rewrite_leaves_everything_else_alone() -> None:
    problem = runner.make_problem(SMALL)
    run = runner.Run(
        SMALL, runner.Settings(2, 1), lambda _: None, problem, torch.empty_like(problem.logits)
    )
    before = problem.logits.clone()
    taken = runner.time_all(run, [])
    assert set(taken) == {runner.COPY, runner.REWRITE}
    assert torch.equal(problem.logits, before) and not torch.equal(run.logits, before)


def test_two_versions_are_measured_in_turn() -> None:
    with against.Worker(REPOSITORY, 1) as other, against.Worker(REPOSITORY, 1) as this:
        rows = against.measure({"other": other, "this": this}, SMALL.name, ["baseline"], 2)
    ways = ["in place", "not in place", "buffer reused"]
    assert [row["way"] for row in rows] == ["copy", "rewrite", *ways]
    for row in rows:
        this_one, other_one = row["this"], row["other"]
        assert len(this_one["samples_ms"]) == len(other_one["samples_ms"]) == 2
        ratio = this_one["median_ms"] / other_one["median_ms"]
        assert row["ratio_to_other"] == pytest.approx(ratio)
        assert row["ratio_to_copy"] == pytest.approx(
            this_one["median_ms"] / rows[0]["this"]["median_ms"]
        )
        assert against.cells(row)[-1].endswith(" of 2")
