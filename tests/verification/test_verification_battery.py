"""One battery, many targets: it passes what is right, and finds what is planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulation import H100, EmulatedBackend
from simulated import FAULTS, Planted
from targets import Target as Running

from cfpo_kernels.backends import KERNELS
from cfpo_kernels.verification import battery, cases, child, choice, compare, records
from cfpo_kernels.verification.battery import Fault, Target
from cfpo_kernels.verification.records import Verdict, VerifyRecord
from cfpo_kernels.verification.targets import DTYPES

CPU = torch.device("cpu")


def run(target: Target, dtype: torch.dtype, chosen: list[cases.Case] | None = None) -> int:
    return battery.run(target, dtype, chosen or cases.short(), lambda case, phase: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_passes(dtype: torch.dtype, level: str) -> None:
    assert run(Target("cpu", KERNELS["cpu"], CPU, 1, largest=4096), dtype) > 30


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_passes_the_long_battery(dtype: torch.dtype, level: str) -> None:
    assert run(Target("cpu", KERNELS["cpu"], CPU, 1), dtype, cases.long()) > 300


@pytest.mark.only_on("cuda-source", "cuda-ptx", reason="the device is chosen here")
@pytest.mark.parametrize(
    "row_kernel", [None, "portable", pytest.param("auto-transient", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.bfloat16, 50265), (torch.float32, 4096), (torch.float16, 4096)],
    ids=str,
)
def test_the_emulated_cuda_kernels_pass(
    dtype: torch.dtype, largest: int, row_kernel: str | None, target: Running
) -> None:
    target.module.set_largest_cluster(8)
    target.module.set_device(4, *H100[1:], True)
    kernels = EmulatedBackend(target.module, row_kernel)
    assert run(Target("cuda", kernels, CPU, 4, largest=largest), dtype) > 30
    wrong = Target("cuda", Planted(kernels, "one wrong element"), CPU, 4, largest=largest)
    with pytest.raises(Fault, match=r"in row|other bits"):
        run(wrong, dtype)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_planted_fault_is_found(dtype: torch.dtype, fault: str, tmp_path: Path) -> None:
    wrong = Target("cuda", Planted(KERNELS["cpu"], fault), CPU, 1, largest=2048)
    chosen = [case for case in cases.short() if case.group in ("odd", "short", "multiply")]
    chosen = [replace(case, n_cols=min(case.n_cols, 2000)) for case in chosen]
    verdict = child.check(wrong, dtype, chosen, child.Results(str(tmp_path / "results")))
    assert verdict.verdict == "wrong"
    expected = {
        "zeros off target": "off-target gradient",
        "dropped tail": "off-target gradient",
        "skipped mask": "masked row",
        "stale sums": "logp in row",
        "one wrong element": "gradient in row|element in row",
        "writes past the end": "wrote outside dlogits",
        "factors forgotten": "times its factor",
    }[fault]
    assert any(words in verdict.reason for words in expected.split("|")), verdict.reason
    assert "V = " in verdict.reason, "the case is named"
    # And "auto" goes elsewhere.
    right = Verdict("triton", verdict.dtype, "right")
    identity = records.identity_of(CPU)
    for known, chosen_kernels in (([verdict, right], "triton"), ([verdict], "reference")):
        record = VerifyRecord(identity, verdicts=known)
        assert choice.fastest(record, dtype, 1000) == chosen_kernels


def test_one_wrong_element_in_a_long_row_is_found() -> None:
    """Of 151,936 columns, in the dtype with the coarsest rounding."""
    kernels = Planted(KERNELS["cpu"], "one wrong element")
    case = cases.Case("long", 151936)
    with pytest.raises(Fault, match="off-target element in row"):
        run(Target("cpu", kernels, CPU, 1), torch.bfloat16, [case])


def test_other_bits_each_time_are_found() -> None:
    wrong = Target("cpu", Planted(KERNELS["cpu"], "other bits each time"), CPU, 1, largest=4096)
    faults = [str(fault) for fault in battery._repeat(wrong, torch.float32)]
    assert any("dlogits of the same inputs: other bits" in fault for fault in faults)


def test_a_comparison_that_sees_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(battery, "gradient_faults", lambda got, exact: [])
    with pytest.raises(Fault, match="does not see a planted fault: zeros off target"):
        run(Target("cpu", KERNELS["cpu"], CPU, 1, largest=1000), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_results_rounded_are_right_and_a_nan_is_not(dtype: torch.dtype) -> None:
    case = cases.Case("short", 1000)
    inputs = cases.make_inputs(case, dtype, CPU, 8)
    exact = cases.exact_results(case, inputs, inputs.active.nonzero().squeeze(1))
    got = torch.zeros(8, 1000, dtype=dtype)
    got[exact.rows] = exact.dlogits.to(dtype)
    assert compare.gradient_faults(got, exact) == []
    for what, damaged in compare.planted_faults(got, exact):
        assert compare.gradient_faults(damaged, exact), what
    got[exact.rows[0], 7] = torch.nan
    assert "not finite" in compare.gradient_faults(got, exact)[0]


def test_the_short_battery_has_every_kind_of_call() -> None:
    chosen = cases.short()
    assert 70 <= len(chosen) <= 100 and len(set(chosen)) == len(chosen)
    assert {case.call for case in chosen} == {
        "train", "score", "on-policy", "backward", "shards", "multiply",
    }  # fmt: skip
    assert min(case.n_cols for case in chosen) == 1
    assert max(case.n_cols for case in chosen) == 262144
    assert {case.layout for case in chosen} == {"whole", "sliced", "late"}
    assert {case.call for case in cases.long()} == {*(case.call for case in chosen), "loss"}
