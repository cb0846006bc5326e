"""The checks of plain_torch.py find what they are to find."""

from __future__ import annotations

import types

import pytest
import torch
from plain_torch import NoSync, public, run_examples, works_everywhere

WRONG = {
    "sync": (lambda x: x * x.sum().item(), r"waits for the device|item"),
    "data-dependent shape": (lambda x: x[x > 0].sum(), "waits for the device|nonzero|dynamic"),
    "default dtype": (lambda x: x * torch.arange(3).mul(0.5), "dtype"),
    "default dtype of a constant": (lambda x: x + torch.full((3,), 0.1), "not equal"),
    "device": (lambda x: x + torch.ones(3, dtype=torch.float32), "device"),
    "graph break": (lambda x: torch._dynamo.graph_break() or x + 1, "graph_break|Unsupported"),
}


@pytest.mark.parametrize("name", WRONG)
def test_planted_mistakes_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, message = WRONG[name]
    with pytest.raises(Exception, match=message):
        works_everywhere(monkeypatch, function, torch.tensor([1.0, 2.0, -3.0]))


def test_a_sync_is_found_eagerly() -> None:
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        bool(torch.ones(2).sum() > 1)


def test_a_function_without_an_example_is_found() -> None:
    module = types.ModuleType("made")
    exec('def shown():\n    """\n    >>> 1 + 1\n    2\n    """\ndef silent(): ...', vars(module))
    for name in ("shown", "silent"):
        vars(module)[name].__module__ = "made"
    assert public(module) == {"shown", "silent"}
    with pytest.raises(AssertionError):
        run_examples(module)
    del module.silent
    run_examples(module)
