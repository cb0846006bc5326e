"""What is particular to the CUDA kernels: plans for devices of any size, and the same bits on all.

The rest is in tests/every_target. The source is built by g++: the code is the GPU's, down to the
primitives; what runs it is not. Of PTX, which an interpreter runs, that goes for the primitives
too. Both find mistakes of arithmetic, addressing and synchronisation, and say nothing about speed
or the memory model: they make no kernel count as verified on a GPU. docs/design.md, "What shows
what", has it in a table.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import A100, H100, ONE_SM, RTX4090, EmulatedBackend
from oracle import DTYPES, Case, assert_same, check, make_case, run, with_everything
from targets import Target

import cfpo_kernels

pytestmark = pytest.mark.only_on(
    "cuda-source", "cuda-ptx", "cuda-gpu", reason="each test has devices of its own"
)


@pytest.mark.parametrize("device", [A100, RTX4090], ids=["80", "89"])
@pytest.mark.parametrize("v", [128256, 151936, 262144])
def test_large_vocabularies(v: int, device: Any, target: Target) -> None:
    target.set_device(*device)
    check(make_case(2, v, torch.bfloat16, seed=v), inplace=True)


def test_a_row_that_no_shared_memory_holds(target: Target) -> None:
    target.set_device(1, *RTX4090[1:])
    check(with_everything(make_case(3, 262144)), inplace=True)


@pytest.mark.parametrize("v", [1000, 8000, 33000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_the_row_decides(dtype: torch.dtype, v: int, target: Target) -> None:
    """The same bits from every kernel, grid, number of rows, and order of the threads."""
    case = with_everything(make_case(5, v, dtype, mask_every=4, reduction="sum"))
    want = check(case)
    for device in (H100, A100, RTX4090, (1, *RTX4090[1:]), (2, 56 * 1024, 64 * 1024)):
        target.set_device(*device)
        for order in ("backward", "shuffled"):
            target.set_order(order)
            assert_same(run(case), want)
    rows = slice(2, 3)
    options = {
        name: x[rows] if isinstance(x, torch.Tensor) else x for name, x in case.options.items()
    }
    one = Case(
        case.logits[rows],
        case.token_ids[rows],
        case.advantages[rows],
        case.old_logps[rows],
        options,
    )
    assert torch.equal(run(one).dlogits, want.dlogits[rows])


@pytest.mark.parametrize("v", [1000, 33000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring_gives_the_bits_of_training(dtype: torch.dtype, v: int, target: Target) -> None:
    case = make_case(5, v, dtype)
    want = run(case)
    for device in (ONE_SM, H100):
        target.set_device(*device)
        for entropy in (False, True):
            scored = cfpo_kernels.token_logps(case.logits, case.token_ids, return_entropy=entropy)
            assert torch.equal(scored[0] if entropy else scored, want.logps)
        arguments = (case.logits, case.token_ids, case.advantages, case.old_logps)
        assert torch.equal(cfpo_kernels.cfpo_loss(*arguments), want.loss)


@pytest.mark.parametrize("device", [ONE_SM, H100], ids=["rows", "split"])
def test_an_unknown_token_makes_its_row_nan(
    device: Any, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU nobody looks at the ids beforehand.
    monkeypatch.setattr(EmulatedBackend, "check_tokens", staticmethod(lambda rows: None))
    target.set_device(*device)
    for v in (7, 40000):
        case = make_case(6, v, reduction="none")
        case.advantages.fill_(1.0)  # where it is 0, so is the loss
        clean = run(case)
        case.token_ids[1:5] = torch.tensor([v, -1, -(2**40), 2**32 + 3])
        got = run(case)
        assert got.loss.isnan().tolist() == [False, True, True, True, True, False]
        assert got.dlogits[1:5].isnan().all()
        assert torch.equal(got.dlogits[[0, 5]], clean.dlogits[[0, 5]])


def test_factors_of_one_touch_nothing(target: Target) -> None:
    for dtype in DTYPES:
        for v in (1, 7, 1000, 5001):
            memory = torch.randn(70, v + 3).to(dtype)
            x, factors = memory[:, 1 : v + 1], torch.ones(70)
            factors[[3, 40, 69]] = torch.tensor([0.5, -3.0, torch.nan])
            want = memory.clone()
            changed = (want[[3, 40, 69], 1 : v + 1].float() * factors[[3, 40, 69], None]).to(dtype)
            want[[3, 40, 69], 1 : v + 1] = changed
            target.backend.multiply_rows(x, factors)
            assert torch.equal(memory.nan_to_num(77.0), want.nan_to_num(77.0))
            target.backend.multiply_rows(x, torch.tensor(2.0).expand(70))
            assert torch.equal(x[0].float(), want[0, 1 : v + 1].float() * 2)


def test_too_large_a_row_is_refused(target: Target) -> None:
    if target.module is None:
        pytest.skip("no GPU is that small")
    target.set_device(1, 16 * 1024, 32 * 1024)
    with pytest.raises(ValueError, match="too long for this device"):
        run(make_case(3, 40000))


@pytest.mark.parametrize("both_sweeps", [False, True])
@pytest.mark.parametrize("device", [A100, RTX4090, H100], ids=["80", "89", "90"])
def test_plans_fit_the_device(device: Any, both_sweeps: bool, target: Target) -> None:
    if target.module is None:
        pytest.skip("plans are the same everywhere")
    _, shared_per_block, shared_per_sm = device
    target.set_device(*device)
    for n_segments in [*range(1, 300), 512, 1024]:
        plan = target.module.plan_rows(n_segments, both_sweeps)
        blocks, windows, warps = plan["blocks_per_sm"], plan["warp_windows"], plan["warps_per_row"]
        rows = plan["threads"] // 32 // warps
        assert plan["shared_bytes"] <= shared_per_block
        assert blocks * (plan["shared_bytes"] + 1024) <= shared_per_sm
        assert blocks * plan["threads"] <= 640
        whole = windows * warps >= n_segments
        assert whole or windows > 2, "no window to keep a segment in beside the ring"
        in_flight = blocks * plan["threads"] // 32 * (windows if whole else 2) * 2048
        assert in_flight >= 32 * 1024, "too few bytes under way"
        if both_sweeps:
            nearly_whole = 10 * plan["windows"] >= 9 * rows * n_segments
            if rows * n_segments * 2064 <= shared_per_block // 3:
                assert nearly_whole and blocks >= 2, "what fits twice should be there twice"
            unused = shared_per_sm // blocks - 1024 - plan["shared_bytes"]
            assert nearly_whole or unused < 2064, "memory left unused"
