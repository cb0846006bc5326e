"""The Triton kernels as Triton compiles them: their PTX, launched by production code, on the CPU.

The interpreter of tests/cpp/ptx runs it, under the oracle of the interpreted kernels. Needs no
nvcc: Triton has a compiler of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_token_logps
import torch
from emulation import CXX
from oracle import check, make_case, with_everything
from ptx_tools.interpreter import ASYNC, ORDERS, How, PtxError
from ptx_tools.triton_launch import Runner, on_ptx

import cfpo_kernels.backends.triton as backend
from cfpo_kernels import CFPO, PPOClip, backends

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") != "0", reason="TRITON_INTERPRET is set"
    ),
    pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler"),
]

NIGHTLY = pytest.mark.nightly
ARCHS = ["sm_90", pytest.param("sm_80", marks=NIGHTLY)]
DTYPES = [
    torch.bfloat16,
    *(pytest.param(dtype, marks=NIGHTLY) for dtype in (torch.float16, torch.float32)),
]
# Tiles of every size, odd ones, rows that are split over programs.
LENGTHS = [1, 1001, 33000, *(pytest.param(v, marks=NIGHTLY) for v in (1000, 4099, 40001))]


@pytest.fixture
def runner(
    request: pytest.FixtureRequest, interpreter: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runner]:
    """Every call goes to the Triton kernels of one architecture."""
    monkeypatch.setattr(backend, "_on", lambda _: contextlib.nullcontext())
    resolve = backends.resolve

    def to_triton(name: str, *of: Any, **how: Any) -> str:
        return "triton" if name in ("auto", "cpu") else resolve(name, *of, **how)

    monkeypatch.setattr(backends, "resolve", to_triton)
    with on_ptx(request.param, interpreter) as runner:
        yield runner
    assert runner.launches, "nothing was launched"


def hows(runner: Runner) -> Iterator[None]:
    """An order each; approximations of what float32 has are exact, or as far off as others."""
    for seed, order in enumerate(ORDERS):
        runner.how = How(ASYNC[seed % 3], order, seed + 1)
        runner.exact_if_exact = seed % 2 == 0
        yield


@pytest.mark.parametrize("runner", ARCHS, indirect=True)
@pytest.mark.parametrize("v", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(dtype: torch.dtype, v: int, runner: Runner) -> None:
    variants = itertools.product((2, 5), (CFPO(0.2), PPOClip(0.2, 0.3)))
    for (n, objective), _ in zip(variants, hows(runner), strict=True):
        check(make_case(n, v, dtype, objective=objective, mask_every=4))
        case = make_case(n, v, dtype, objective=objective, mask_every=4)
        check(with_everything(case), inplace=True)


@pytest.mark.parametrize("runner", ARCHS, indirect=True)
@pytest.mark.parametrize("v", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities(dtype: torch.dtype, v: int, runner: Runner) -> None:
    for inplace, _ in zip((False, True, False, True), hows(runner), strict=True):
        test_token_logps.test_values_and_gradients(dtype, v, inplace)


@pytest.mark.parametrize("runner", ["sm_90"], indirect=True)
@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ("cvt.rn.bf16x2.f32", None, "off-target gradient|target gradient"),
        ("bar.sync", "", "a race|nobody wrote"),
    ],
    ids=["operands exchanged", "no barrier"],
)
def test_wrong_ptx_is_noticed(
    right: str, wrong: str | None, what: str, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(line: str) -> str:
        if right not in line:
            return line
        if wrong is not None:
            return wrong
        opcode, operands = line.strip().split(maxsplit=1)
        to, first, second = operands.rstrip(";").split(", ")
        return f"{opcode} {to}, {second}, {first};"

    load = Runner.run

    def load_changed(self: Runner, launch: object) -> None:
        text = launch.asm["ptx"]  # type: ignore[attr-defined]
        assert right in text
        launch.asm["ptx"] = "\n".join(map(change, text.splitlines()))  # type: ignore[attr-defined]
        load(self, launch)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "run", load_changed)
    with pytest.raises((AssertionError, PtxError), match=what):
        check(make_case(3, 4099, torch.bfloat16))
