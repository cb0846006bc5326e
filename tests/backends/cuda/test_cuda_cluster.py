"""The cluster kernel: how rows are cut up, and the bits of the row kernel from any cluster."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from emulation import A100, H100, HOPPER, ONE_SM, RTX4090
from oracle import (
    DTYPES,
    assert_same,
    check,
    check_gradient,
    make_case,
    oracle,
    run,
    with_everything,
)
from triton_tools.memory import sparse

import cfpo_kernels
from cfpo_kernels import CFPO, PPOClip

pytestmark = [
    pytest.mark.only_on(
        "cuda-source", "cuda-ptx", reason="each test has devices of its own, with clusters"
    ),
    pytest.mark.usefixtures("module"),
]

VECTOR, LINE, SEGMENT = 16, 128, 2048


@pytest.mark.parametrize(
    ("v", "element", "cluster", "slots"),
    [
        (25600, 2, 1, 4),
        (32000, 2, 2, 5),
        (32768, 2, 2, 5),
        (50257, 2, 2, 4),
        (65536, 2, 4, 5),
        (128256, 2, 8, 5),
        (131072, 2, 8, 5),
        (151936, 2, 8, 5),
        (262144, 2, 8, 3),
        (32000, 4, 4, 5),
        (128256, 4, 8, 3),
        (151936, 4, 16, 5),
        (262144, 4, 16, 3),
        (262145, 4, 0, 0),
    ],
)
def test_the_table_for_227_kb(v: int, element: int, cluster: int, slots: int, module: Any) -> None:
    plan = module.plan_clusters(-(-v * element // SEGMENT), 8192, "auto")
    assert (plan["cluster"], plan.get("slots", 0)) == (cluster, slots)
    assert plan["chosen"] == (cluster > 0)


@pytest.mark.parametrize("shared", [16 * 1024, RTX4090[1], A100[1], H100[1]])
def test_plans_fit(shared: int, module: Any) -> None:
    module.set_device(132, shared, shared + 1024, True)
    for n_segments in (*range(1, 330), *range(330, 520, 7)):
        plan = module.plan_clusters(n_segments, 8192, "auto")
        if plan["cluster"] == 0:
            assert n_segments > 16 * min(32, (shared - 32 * n_segments - 1024) // 3 // SEGMENT - 1)
            continue
        assert plan["cluster"] in (1, 2, 4, 8, 16)
        assert plan["shared_bytes"] <= shared
        assert 3 <= plan["slots"] <= 5, "one row to write, one to sum, one that comes in"
        firsts = plan["first_segments"]
        slices = [end - begin for begin, end in itertools.pairwise(firsts)]
        assert firsts[0] == 0 and firsts[-1] == n_segments
        assert max(slices) == plan["slice"] <= 32 and max(slices) - min(slices) <= 1
        assert 1 <= plan["warps"] <= min(14, *slices), "every worker has a segment"
        # A shift of up to 15 bytes widens a slice by one vector.
        assert plan["slot_bytes"] >= plan["slice"] * SEGMENT + VECTOR
        assert plan["slot_bytes"] % LINE == 0, "as rows begin where lines do"
        assert plan["sums"] % VECTOR == plan["barriers"] % 8 == plan["notes"] % 8 == 0
        assert plan["sums"] >= plan["slots"] * plan["slot_bytes"]


def test_when_it_is_chosen(module: Any) -> None:
    def chosen(
        n_segments: int, n_rows: int, row_kernel: str = "auto", capped: bool = False
    ) -> bool:
        return bool(module.plan_clusters(n_segments, n_rows, row_kernel, capped)["chosen"])

    assert chosen(126, 17) and not chosen(126, 16), "a slice for every SM"
    assert chosen(28, 132) and not chosen(28, 131)
    assert not chosen(24, 10**6), "short rows go several to a block"
    assert chosen(512, 10**6) and not chosen(513, 10**6), "too long"
    assert chosen(1, 1, "cluster") and chosen(126, 1, "cluster")
    with pytest.raises(ValueError, match="too long"):
        chosen(513, 10**6, "cluster")
    assert not chosen(126, 10**6, "portable")
    assert not chosen(126, 10**6, capped=True)
    with pytest.raises(ValueError, match="takes no logits with a softcap"):
        chosen(126, 10**6, "cluster", capped=True)
    with pytest.raises(ValueError, match="is 'fastest'; it takes auto, portable, cluster"):
        chosen(126, 10**6, "fastest")
    module.set_device(*A100)
    assert not chosen(126, 10**6), "no clusters before compute capability 9.0"
    with pytest.raises(ValueError, match="has no clusters"):
        chosen(126, 10**6, "cluster")


# Slices of one to three segments: clusters of 1 to 8 blocks for rows that are quick to emulate.
SMALL = (5, 24 * 1024, 32 * 1024, True)


@pytest.mark.parametrize("objective", [CFPO(0.2), PPOClip(0.2, 0.3)], ids=["cfpo", "ppo_clip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_the_row_kernel(
    dtype: torch.dtype,
    objective: CFPO | PPOClip,
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for v in (1, 1000, 4099, 9001):
        plain = make_case(7, v, dtype, objective=objective, mask_every=4, reduction="sum")
        for case in (plain, with_everything(plain)):
            monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "portable")
            module.set_device(*ONE_SM)
            want = check(case)
            monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "cluster")
            module.set_device(*SMALL)
            for order in ("forward", "shuffled", "starved"):
                module.set_order(order)
                assert_same(run(case), want)
            assert_same(run(case, inplace=True), want)
            module.set_device(*HOPPER)
            assert_same(run(case), want)


def test_a_large_vocabulary(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight blocks, chosen without being asked for."""
    module.set_device(8, *HOPPER[1:])
    case = with_everything(make_case(5, 128256, torch.bfloat16, mask_every=3))
    assert module.plan_clusters(126, 5, "auto")["chosen"]
    got = check(case, inplace=True)
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "portable")
    assert_same(got, run(case))


def test_a_device_without_room(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared or cut up, it may have no 8 SMs side by side; then the row kernel does it."""
    module.set_device(*SMALL)
    module.set_largest_cluster(2)
    case = make_case(7, 9001, torch.bfloat16)
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "cluster")
    with pytest.raises(ValueError, match="no room for clusters of 8"):
        run(case)
    module.set_device(8, *HOPPER[1:])
    case = make_case(5, 100000, torch.bfloat16)
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "auto")
    plan = module.plan_clusters(98, 5, "auto")
    assert plan["chosen"] and plan["cluster"] == 4
    check(case)


def test_more_blocks_than_are_portable(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a row has no other plan, and the device takes such clusters."""
    module.set_device(*SMALL)
    case = make_case(3, 27000, torch.bfloat16, mask_every=3)
    assert module.plan_clusters(27, 3, "auto")["cluster"] == 16
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "cluster")
    with pytest.raises(ValueError, match="no room for clusters of 16"):
        run(case)
    module.set_largest_cluster(16)
    got = check(case, inplace=True)
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "portable")
    module.set_device(*ONE_SM)
    assert_same(got, run(case))


@pytest.mark.parametrize(
    ("device", "v"),
    [(ONE_SM, 1001), (H100, 33001), (SMALL, 9001)],
    ids=["rows", "split", "cluster"],
)
def test_offsets_beyond_32_bits(
    device: Any, v: int, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every kernel that writes a gradient."""
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "cluster" if device is SMALL else "portable")
    module.set_device(*device)
    step = 2**31 + 5  # odd: every row another shift
    case = make_case(4, v, torch.bfloat16)
    logits = sparse(4 * step, torch.bfloat16).as_strided((4, v), (step, 1))
    logits.copy_(case.logits)
    leaf = logits.detach().requires_grad_()
    cfpo_kernels.cfpo_loss(
        leaf, case.token_ids, case.advantages, case.old_logps, inplace=True, backend="cpu"
    ).backward()
    assert leaf.grad is not None
    check_gradient(leaf.grad, oracle(case).dlogits, case)
