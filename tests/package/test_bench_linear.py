"""`python -m bench --cases linear` reports what was computed, and names what fails."""

from __future__ import annotations

from dataclasses import replace
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


def test_the_costs_of_products() -> None:
    """Few rows at a time cost more, rows that are left out nothing."""
    found = linear_costs.by_rows("f32", 1, (64, 4096), 64)
    assert list(found) == ["8", "16", "32", "64"]
    assert found["8"] > found["64"]
    assert len(linear_costs.upcast(1, (16, 512), 128)) == 2
    found = linear_costs.without_advantages(2, (64, 4096), 512)
    assert found["60% without an advantage"] < found["all rows"]


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
