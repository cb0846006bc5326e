"""`python -m bench --cases linear` reports what was computed, and names what fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import linear, linear_costs, plot, report
from bench.linear import LinearCase, LinearImplementation, LinearProblem

TINY = LinearCase("cpu", 128, 16, 512, "f32", 64)


def only(*entries: LinearImplementation) -> list[LinearImplementation]:
    return list(entries)


def ours_and_eager() -> list[LinearImplementation]:
    return [e for e in linear.implementations() if e.name in ("ours", "ours-low-memory", "eager")]


def test_a_case_is_checked_counted_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = ours_and_eager()
    monkeypatch.setattr(linear, "implementations", lambda: entries)
    case = linear.run_case(TINY, 2, 1, memory=False)
    products = {result["name"]: result["products"] for result in case["results"]}
    assert products == {"ours": 3, "ours-low-memory": 3.5, "eager": 3}
    assert all(error < 1e-5 for r in case["results"] for error in r["errors"].values())
    found = linear.make_report([case], 2, 1)
    path = tmp_path / "linear.json"
    report.save(found, path)
    linear.print_report(report.load(path))
    assert "low_memory" in capsys.readouterr().out
    plot.save(report.load(path), tmp_path / "linear.png")
    assert (tmp_path / "linear.png").stat().st_size > 10_000


def test_a_wrong_gradient_is_left_out_or_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_the_gradient(p: LinearProblem) -> Tensor:
        found = linear.naive(p)
        return found / 2 + found.detach() / 2

    wrong = LinearImplementation("wrong", "wrong", "peer", lambda: half_the_gradient)
    eager = next(e for e in linear.implementations() if e.name == "eager")
    monkeypatch.setattr(linear, "implementations", lambda: only(eager, wrong))
    case = linear.run_case(TINY, 1, 1, memory=False)
    assert [result["name"] for result in case["results"]] == ["eager"]
    assert "wrong" in case["skipped"]["wrong"]
    monkeypatch.setattr(linear, "implementations", lambda: only(replace(wrong, kind="ours")))
    with pytest.raises(ArithmeticError, match="wrong"):
        linear.run_case(TINY, 1, 1, memory=False)


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [e for e in linear.implementations() if e.name in ("eager", "rl-kernel")]
    assert len(entries) == 2
    monkeypatch.setattr(linear, "implementations", lambda: entries)
    monkeypatch.setitem(sys.modules, "rl_engine", None)
    case = linear.run_case(TINY, 1, 1, memory=False)
    assert [result["name"] for result in case["results"]] == ["eager"]
    assert "ModuleNotFoundError" in case["skipped"]["rl-kernel"]
    assert "rl_engine" in case["skipped"]["rl-kernel"]


def test_the_costs_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each line of the tables does, counted: times are a quiet machine's to tell."""

    def count(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, int]:
        found = {}
        for name, call in calls.items():
            with linear.ProductCount() as products:
                call()
            found[name] = products.count
        return found

    monkeypatch.setattr(linear_costs, "cpu_seconds", count)
    found = linear_costs.by_rows("f32", 1, (64, 4096), 64)
    assert found == dict.fromkeys(("8", "16", "32", "64"), 3 * 64 * 64 * 4096)
    found = linear_costs.upcast(1, (16, 512), 128)
    names = ("float32", "bfloat16, upcast", "bfloat16, eager")
    assert found == dict.fromkeys(names, 3 * 128 * 16 * 512)
    found = linear_costs.without_advantages(2, (64, 4096), 512)
    assert found["all rows"] == 3 * 512 * 64 * 4096
    # 205 rows in two tiles of 128; the head's gradient sums over those that there are.
    assert found["60% without an advantage"] == (2 * 256 + 205) * 64 * 4096
    found = linear_costs.schedules(1, (64, 4096), 256)
    quarter = 64 * 64 * 4096  # of a product of all rows
    assert found == {"R, 128": 12 * quarter, "S, 128": 14 * quarter} | dict.fromkeys(
        ("R, 256", "S, 256"), 12 * quarter
    )


def test_the_least_time_of_calls_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made = 0.0, []
    times = {"a": iter((9.0, 3.0, 2.0)), "b": iter((9.0, 4.0, 5.0))}

    def call(name: str) -> None:
        nonlocal clock
        made.append(name)
        clock += next(times[name])

    monkeypatch.setattr(linear_costs.time, "process_time", lambda: clock)
    found = linear_costs.cpu_seconds({name: partial(call, name) for name in "ab"}, 2)
    assert found == {"a": 2.0, "b": 4.0}  # the first is for warming up
    assert made == ["a", "b"] * 3


def test_exact_is_autograd_in_float64() -> None:
    p = linear.make_problem(TINY)
    twin = LinearProblem(
        TINY,
        p.hidden.detach().double().requires_grad_(),
        p.weight.detach().double().requires_grad_(),
        p.token_ids,
        p.advantages,
        p.old_logps.double(),
    )
    logits = twin.hidden @ twin.weight.t()
    logps = torch.log_softmax(logits, -1).gather(1, p.token_ids[:, None])[:, 0]
    ratio = torch.exp(logps - twin.old_logps)
    loss = -torch.minimum(ratio * p.advantages, ratio.clamp(0.8, 1.2) * p.advantages).mean()
    loss.backward()
    value, dhidden, dweight = linear.exact(p)
    assert value == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(dhidden, twin.hidden.grad)
    torch.testing.assert_close(dweight, twin.weight.grad)


def test_names_of_cases() -> None:
    assert [case.name for case in linear.cases_of("linear")] == [
        "linear-65536-f32",
        "linear-65536-bf16",
    ]
    assert linear.cases_of("linear-151936-bf16")[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown case"):
        linear.cases_of("linear-65536-f32,cpu")
