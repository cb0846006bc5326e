"""The PTX that Triton compiles, in every order of its threads, and that mistakes in it are found.

What else runs on it is in tests/every_target. The interpreter of tests/cpp/ptx runs it, under the
oracle of the interpreted kernels. Needs no nvcc: Triton has a compiler of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from oracle import assert_same, check, check_token_logps, make_case, with_everything
from ptx_tools.interpreter import ASYNC, ORDERS, How, PtxError
from ptx_tools.triton_launch import Runner
from targets import Target

from cfpo_kernels import CFPO, PPOClip
from cfpo_kernels.triton_kernels import kernels

pytestmark = pytest.mark.only_on("triton-ptx*", reason="each test has orders of its own")

NIGHTLY = pytest.mark.nightly
DTYPES = [
    torch.bfloat16,
    *(pytest.param(dtype, marks=NIGHTLY) for dtype in (torch.float16, torch.float32)),
]
# Tiles of every size, odd ones, rows that are split over programs.
LENGTHS = [1, 1001, 33000, *(pytest.param(v, marks=NIGHTLY) for v in (1000, 4099, 40001))]


def hows(runner: Runner) -> Iterator[None]:
    """An order each; approximations of what float32 has are exact, or as far off as others."""
    for seed, order in enumerate(ORDERS):
        runner.how = How(ASYNC[seed % 3], order, seed + 1)
        runner.exact_if_exact = seed % 2 == 0
        yield


@pytest.mark.parametrize("v", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(dtype: torch.dtype, v: int, target: Target) -> None:
    variants = itertools.product((2, 5), (CFPO(0.2), PPOClip(0.2, 0.3)))
    for (n, objective), _ in zip(variants, hows(target.runner), strict=True):
        check(make_case(n, v, dtype, objective=objective, mask_every=4))
        case = make_case(n, v, dtype, objective=objective, mask_every=4)
        check(with_everything(case), inplace=True)


@pytest.mark.parametrize("v", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities(dtype: torch.dtype, v: int, target: Target) -> None:
    for inplace, _ in zip((False, True, False, True), hows(target.runner), strict=True):
        check_token_logps(dtype, v, inplace=inplace)


@pytest.mark.parametrize("v", [4099, pytest.param(33000, marks=NIGHTLY)])
def test_unrolled_loops_give_the_same_bits(
    v: int, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole steps and of what is left of them: 2 and 4 blocks, 1 and 3."""
    outcomes = []
    for unroll in (1, 2):
        monkeypatch.setattr(target.backend, "unroll", unroll)
        case = with_everything(make_case(3, v, torch.bfloat16))
        outcomes += [check(case, inplace=True), check(make_case(3, v, torch.bfloat16))]
    assert_same(outcomes[2], outcomes[0])
    assert_same(outcomes[3], outcomes[1])
    variants = target.runner.launches.specialisations(kernels.policy_loss_kernel)
    assert variants == 4, "each was compiled"


@pytest.mark.parametrize(("v", "dtype"), [(4099, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ("cvt.rn.bf16x2.f32", None, "off-target gradient|target gradient"),
        ("bar.sync", "", "a race|nobody wrote"),
    ],
    ids=["operands exchanged", "no barrier"],
)
def test_wrong_ptx_is_noticed(
    v: int,
    dtype: torch.dtype,
    right: str,
    wrong: str | None,
    what: str,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
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
        check(make_case(3, v, dtype))
