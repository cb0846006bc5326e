"""Tensors and numbers as processes and configurations have them, at every entry point."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_points import ENTRIES, Entry, flat, one_process, outcome, tensors
from repository import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import cfpo_kernels
from cfpo_kernels import bounds, preference, sequences
from cfpo_kernels.verification import choice

try:
    import numpy as np
except ImportError:  # which the package does without
    np = None

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


def same(got: list[torch.Tensor], want: list[torch.Tensor], within: float = 0.0) -> None:
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=within, atol=within, equal_nan=True)


@each
def test_a_default_dtype_changes_nothing(entry: Entry) -> None:
    want = outcome(entry, tensors())
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            same(outcome(entry, tensors()), want)


@each
def test_a_default_device_changes_nothing(entry: Entry) -> None:
    want = outcome(entry, tensors())
    # A function mode: it is shown the operators of torch's formula, not the one call of the C++'s.
    with torch.device("meta"):
        same(outcome(entry, tensors()), want, within=1e-6)


FACTORIES = {
    "arange",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
}
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
    files = sorted({*PACKAGE.rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")})
    assert len(files) > 50 and any(file.name == "kernels.py" for file in files)
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
    if entry.around is one_process:
        pytest.skip("the processes tell each other numbers")
    want = outcome(entry, tensors())
    choice.forget()  # what was warned of once, of another entry
    monkeypatch.setenv("CFPO_KERNELS_DEBUG", debug)
    got = outcome(entry, tensors("meta"))
    assert all(x.is_meta for x in got)
    with FakeTensorMode() as mode:
        faked = outcome(entry, {name: mode.from_tensor(x) for name, x in tensors().items()})
    for found in (got, faked):
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in want]
    assert not recwarn.list, "nothing was computed"


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


class Named:
    """A configuration's number, which is no number by its type."""

    def __float__(self) -> float:
        return 2.0


class Whole:
    def __index__(self) -> int:
        return 2


OF_NUMPY: dict[str, Any] = {}
NO_NUMBERS_OF_NUMPY: dict[str, Any] = {}
if np is not None:
    OF_NUMPY = {
        "float64": np.float64(2),
        "float32": np.float32(2),
        "float16": np.float16(2),
        "int64": np.int64(2),
        "uint8": np.uint8(2),
        "0-d array": np.array(2.0),
    }
    NO_NUMBERS_OF_NUMPY = {
        "numpy bool": np.bool_(True),
        "array of one": np.array([2.0]),
    }
# All are 2.
NUMBERS: dict[str, Any] = {
    "int": 2,
    **OF_NUMPY,
    "fraction": Fraction(2),
    "decimal": Decimal(2),
    "__float__": Named(),
    "__index__": Whole(),
    **{
        f"tensor {dtype}": torch.tensor(2, dtype=dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.bfloat16,
            torch.float16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
        )
    },
}
NO_NUMBERS: dict[str, Any] = {
    "bool": True,
    "str": "2",
    **NO_NUMBERS_OF_NUMPY,
    "complex": 2j,
    "tensor bool": torch.tensor(True),
    "tensor complex": torch.tensor(2j),
    "tensor of one": torch.ones(1),
}
_WITH_REF = {name: tensors()[name] for name in (*ENTRIES["loss-auto"].arguments, "ref_logps")}
_OF_HEAD = {
    name: tensors()[name] for name in ("hidden", "weight", "token_ids", "advantages", "old_logps")
}
_PAIR = (torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.4]))
_LOGPS, _ADVANTAGES = tensors()["logps"], tensors()["advantages"]


def _cfpo(**how: Any) -> Any:
    return cfpo_kernels.cfpo_loss(**_WITH_REF | how)


def _linear(**how: Any) -> Any:
    return cfpo_kernels.linear_cfpo_loss(**_OF_HEAD | how)


def _of(objective: Any) -> Any:
    return lambda x, name: cfpo_kernels.policy_loss(
        *(_WITH_REF[k] for k in ENTRIES["loss-auto"].arguments), objective=objective(**{name: x})
    )


REAL: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(
        (
            "temperature",
            "normalizer",
            "grad_scale",
            "kl_coef",
            "entropy_coef",
            "epsilon",
            "epsilon_high",
        ),
        lambda x, name: _cfpo(**{name: x}),
    ),
    "log_ratio_bounds": lambda x, _: _cfpo(log_ratio_bounds=(-1.0, x)),
    **dict.fromkeys(("softcap", "logit_scale"), lambda x, name: _linear(**{name: x})),
    **dict.fromkeys(("drift", "log_ratio_clip"), _of(cfpo_kernels.CFPO)),
    **dict.fromkeys(("tau_positive", "tau_negative"), _of(cfpo_kernels.SAPO)),
    **dict.fromkeys(
        ("dual_clip", "epsilon_high "), lambda x, name: _of(cfpo_kernels.PPOClip)(x, name.strip())
    ),
    "beta_low": _of(cfpo_kernels.GPPO),
    "power_positive": _of(lambda power_positive: cfpo_kernels.PowerIS(power_positive, 1.0)),
    "high": _of(lambda high: cfpo_kernels.CISPO(low=0.5, high=high)),
    "beta": lambda x, _: preference.dpo_loss(*_PAIR, beta=x),
    "r_max": lambda x, _: preference.chi_po_loss(*_PAIR, beta=0.1, r_max=x),
    "alpha": lambda x, _: preference.fpo_loss(*_PAIR, *_PAIR, alpha=x),
    "delta": lambda x, _: bounds.kl(_LOGPS, x),
    "delta of kl3": lambda x, _: torch.stack([torch.as_tensor(y).float() for y in bounds.kl3(x)]),
    "cap": lambda x, _: bounds.band(_LOGPS, 0.1, x),
    "target": lambda x, _: bounds.bapo(_LOGPS, _ADVANTAGES, target=x),
    "low_step": lambda x, _: bounds.bapo(_LOGPS, _ADVANTAGES, low_step=x),
    "empty": lambda x, _: sequences.prefix_min(_LOGPS, exclusive=True, empty=x),
    "min_std": lambda x, _: sequences.group_advantages(_LOGPS, group_size=3, min_std=x),
    "most": lambda x, _: cfpo_kernels.rollout_weights(
        _LOGPS, _LOGPS + 1, mode="token_mask", low=None, high=x
    ),
}
INTEGERS: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("chunk_tokens",), lambda x, name: _linear(**{name: x})),
    "active_tokens": lambda x, _: _linear(active_tokens=x, mask=torch.eye(2, 3)),
    "group_size": lambda x, _: sequences.group_advantages(_LOGPS, group_size=x),
    "vocab_size": lambda x, _: torch.ones(cfpo_kernels.VocabParallel(None, 0, x).vocab_size),
    "start": lambda x, _: torch.ones(cfpo_kernels.VocabParallel(None, x, 9).start),
}


@pytest.mark.parametrize("name", [*REAL, *INTEGERS])
def test_numbers_of_any_kind(name: str) -> None:
    call = (REAL | INTEGERS)[name]
    want = [*flat(call(2.0 if name in REAL else 2, name))]
    for kind, number in NUMBERS.items():
        whole = not isinstance(number, (Fraction, Decimal, Named)) and "loat" not in kind
        if name in REAL or (whole and kind != "0-d array"):
            same([*flat(call(number, name))], want)
    for number in NO_NUMBERS.values():
        with pytest.raises((TypeError, ValueError), match=r"(?s)must (be|have)"):
            call(number, name)
