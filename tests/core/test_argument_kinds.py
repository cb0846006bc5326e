"""Tensors and numbers as processes and configurations have them, at every entry point."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from entry_points import ENTRIES, Entry, outcome, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

import cfpo_kernels

PACKAGE = Path(cfpo_kernels.__file__).parent
each = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0))


@each
def test_a_default_dtype_changes_nothing(entry: Entry) -> None:
    want = outcome(entry, tensors())
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            same(outcome(entry, tensors()), want)


@each
def test_a_default_device_changes_nothing(entry: Entry) -> None:
    want = outcome(entry, tensors())
    with torch.device("meta"):
        same(outcome(entry, tensors()), want)


FACTORIES = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
WITHOUT_DTYPE = {"Tensor", "FloatTensor", "as_tensor"}


def made_by_default(source: str) -> list[str]:
    """Calls that leave a dtype or a device to the process's defaults."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
        numbers = [isinstance(_unsigned(x), ast.Constant) for x in node.args[1:]]
        if (
            (name in FACTORIES and not {"dtype", "device"} <= given)
            or (name in WITHOUT_DTYPE and "dtype" not in given)
            or (name == "where" and len(numbers) == 2 and all(numbers))
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def _unsigned(node: ast.expr) -> ast.expr:
    return node.operand if isinstance(node, ast.UnaryOp) else node


def test_no_tensor_is_made_by_default() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = {str(file): made_by_default(file.read_text()) for file in files}
    assert not {file: lines for file, lines in found.items() if lines}


def test_a_tensor_made_by_default_is_found() -> None:
    for wrong in (
        "torch.full((2,), 1.0, device=x.device)",
        "torch.zeros(3, dtype=x.dtype)",
        "torch.where(x > 0, -1.0, 1.0)",
        "torch.as_tensor(3.0)",
    ):
        assert made_by_default(wrong)
    assert not made_by_default("torch.where(x > 0, y, 1.0)")
    assert not made_by_default("torch.zeros(3, dtype=x.dtype, device=x.device)")


@pytest.mark.parametrize("debug", ["", "1"])
@each
def test_shapes_without_numbers(
    entry: Entry, debug: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """On the meta device, and of fake tensors, as on the device they stand for."""
    want = outcome(entry, tensors())
    monkeypatch.setenv("CFPO_KERNELS_DEBUG", debug)
    got = outcome(entry, tensors("meta"))
    assert all(x.is_meta for x in got)
    with FakeTensorMode() as mode:
        faked = outcome(entry, {name: mode.from_tensor(x) for name, x in tensors().items()})
    for found in (got, faked):
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in want]


@each
def test_tensors_of_inference_mode(entry: Entry) -> None:
    """A rollout makes them; autograd saves none of them. One argument at a time, and all."""
    want = outcome(entry, tensors())
    with torch.inference_mode():
        made = tensors()
    others = [name for name in entry.arguments if name not in entry.leaves]
    for names in (*([name] for name in others), others):
        same(outcome(entry, tensors() | {name: made[name] for name in names}), want)
    for frozen in entry.leaves if len(entry.leaves) > 1 else ():
        leaves = tuple(name for name in entry.leaves if name != frozen)
        fewer = entry._replace(leaves=leaves)
        want = outcome(fewer, tensors())
        same(outcome(fewer, tensors() | {frozen: made[frozen]}), want)
