"""The transient kernel: its plans, when it is chosen, and the bits of the row kernel."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from emulation import A100, H100, HOPPER, ONE_SM, RTX4090, EmulatedBackend
from oracle import DTYPES, assert_same, check, make_case, run, with_everything
from stages import rows_of

from cfpo_kernels import CFPO
from cfpo_kernels.backends.base import KernelTerms
from cfpo_kernels.inputs import LossSettings, TokenInputs

pytestmark = [
    pytest.mark.only_on(
        "cuda-source", "cuda-ptx", reason="each test has devices of its own, with clusters"
    ),
    pytest.mark.usefixtures("module"),
]

SEGMENT, WINDOW = 2048, 2064


def segments(v: int, element: int) -> int:
    return -(-v * element // SEGMENT)


@pytest.mark.parametrize(
    ("v", "element", "cluster", "blocks_per_sm", "warps"),
    [
        (1000, 2, 1, 32, 1),
        (32000, 2, 2, 6, 5),
        (50257, 2, 4, 8, 4),
        (128256, 2, 8, 6, 5),
        (151936, 2, 8, 5, 6),
        (262144, 2, 8, 3, 10),
        (128256, 4, 8, 3, 10),
        (151936, 4, 8, 2, 16),
        (262144, 4, 8, 1, 16),
        (600000, 4, 0, 0, 0),
    ],
)
def test_the_table_for_227_kb(
    v: int, element: int, cluster: int, blocks_per_sm: int, warps: int, module: Any
) -> None:
    plan = module.plan_transient(segments(v, element), False, 8192, "auto-transient")
    assert plan["cluster"] == cluster
    assert (plan.get("blocks_per_sm", 0), plan.get("warps", 0)) == (blocks_per_sm, warps)
    assert plan["chosen"] == (v > 25 * SEGMENT // element and cluster > 0)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("shared", [16 * 1024, RTX4090[1], A100[1], H100[1]])
def test_plans_fit(shared: int, entropy: bool, module: Any) -> None:
    most = 320 if entropy else 512  # as the kernel is compiled
    module.set_device(132, shared, shared + 1024, True)
    for n_segments in range(1, 900):
        plan = module.plan_transient(n_segments, entropy, 8192, "auto-transient")
        if plan["cluster"] == 0:
            assert -(-n_segments // 8) * WINDOW + n_segments * 16 + 48 > shared
            continue
        assert plan["cluster"] in (1, 2, 4, 8)
        assert plan["cluster"] == 8 or plan["slice"] <= 16
        assert plan["slice"] == -(-n_segments // plan["cluster"])
        assert plan["shared_bytes"] <= shared
        # Every block of the SM has its threads' registers.
        blocks, threads = plan["blocks_per_sm"], plan["warps"] * 32
        assert 1 <= plan["warps"] <= plan["slice"] and threads <= most
        assert blocks * threads <= 2 * most
        assert blocks * (plan["shared_bytes"] + 1024) <= shared + 1024
        # What is exchanged begins behind the windows, messages where vectors do.
        places = [plan[name] for name in ("sums", "gradient", "barriers", "shared_bytes")]
        sizes = [n_segments * 16, 32, 16]
        assert places[0] == plan["slice"] * WINDOW
        assert [b - a for a, b in itertools.pairwise(places)] == sizes
        assert plan["sums"] % 16 == plan["gradient"] % 16 == plan["barriers"] % 8 == 0


def test_when_it_is_chosen(module: Any) -> None:
    def chosen(n_segments: int, n_rows: int, row_kernel: str) -> bool:
        return bool(module.plan_transient(n_segments, False, n_rows, row_kernel)["chosen"])

    assert chosen(126, 17, "auto-transient"), "a slice for every SM"
    assert not chosen(126, 16, "auto-transient")
    assert not chosen(24, 10**6, "auto-transient"), "short rows go several to a block"
    assert not chosen(2000, 10**6, "auto-transient"), "too long"
    assert chosen(1, 1, "transient") and chosen(297, 1, "transient")
    for other in ("auto", "portable", "cluster"):
        assert not chosen(126, 10**6, other)
    with pytest.raises(ValueError, match="is 'transient', but a row is too long"):
        chosen(2000, 10**6, "transient")
    assert chosen(126, 2**28 - 1, "transient") and not chosen(126, 2**28, "transient"), (
        "a grid has fewer than 2^31 blocks"
    )
    module.set_device(*A100)
    assert not chosen(126, 10**6, "auto-transient"), "no clusters before compute capability 9.0"
    with pytest.raises(ValueError, match="has no clusters"):
        chosen(126, 10**6, "transient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_the_row_kernel(
    dtype: torch.dtype, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of everything, the gradient too, from clusters of 1 to 8 blocks."""
    for n, v in ((5, 1), (5, 1001), (3, 9001), (2, 33001)):
        plain = make_case(n, v, dtype, mask_every=4, reduction="sum")
        for case in (plain, with_everything(plain)):
            monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "portable")
            module.set_device(*ONE_SM)
            want = check(case)
            monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "transient")
            module.set_device(*HOPPER)
            for order in ("forward", "shuffled"):
                module.set_order(order)
                assert_same(run(case, inplace=order == "shuffled"), want)
                assert module.last_kernel() == "transient_kernel"


def test_few_rows_and_short_rows_are_others(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "auto-transient")
    module.set_device(8, *HOPPER[1:])
    check(make_case(1, 33001, torch.bfloat16))
    assert module.last_kernel() == "split_finish_kernel"
    check(make_case(5, 33001, torch.bfloat16))
    assert module.last_kernel() == "transient_kernel"
    check(make_case(5, 9001, torch.bfloat16))
    assert module.last_kernel() == "row_kernel"


def test_logits_behind_a_softcap_are_anothers(module: Any) -> None:
    """What it gives is every_target/test_softcap.py's."""
    case = make_case(3, 33001, torch.bfloat16)
    rows = rows_of(case.logits, case.token_ids, torch.ones(1))
    inputs = TokenInputs(case.advantages, case.old_logps, None, None)
    terms = KernelTerms(inputs, LossSettings(CFPO().shape()), None)
    for softcap, kernel in ((0.0, "transient_kernel"), (30.0, "row_kernel")):
        module.set_device(4, *HOPPER[1:])
        EmulatedBackend(module, "transient").policy_loss(
            rows._replace(softcap=softcap),
            terms,
            loss=torch.empty(3),
            logps=torch.empty(3),
            entropy=None,
            dlogits=torch.empty_like(case.logits),
        )
        assert module.last_kernel() == kernel


def test_a_device_without_room(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module.set_largest_cluster(2)
    module.set_device(8, *HOPPER[1:])
    case = make_case(5, 33001, torch.bfloat16)
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "transient")
    with pytest.raises(ValueError, match="no room for clusters of 4"):
        run(case)
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "auto-transient")
    check(case)
    assert module.last_kernel() == "row_kernel"
