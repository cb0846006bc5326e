"""Matrix products, counted: three times rows x V x H with a trained head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import HeadCase, is_noticed, linear, make, planted, pretend_speed, use_slices
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cfpo_kernels
from cfpo_kernels import PPOClip
from cfpo_kernels.linear import api, head

pytestmark = pytest.mark.usefixtures("one_thread")

V, H = 384, 16
CHUNK = 32


class Counter(TorchDispatchMode):
    """Multiplications and additions of mm, addmm, bmm, and which dtypes were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.dtypes: set[torch.dtype] = set()
        self.widened = 0  # elements

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear"):
            a, b = args[-2:]
            self.count += a.numel() * b.shape[-1]
            self.dtypes.add(a.dtype)
        found = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and found.dtype == torch.float32:
            self.widened += found.numel() if args[-1].dtype == torch.bfloat16 else 0
        return found


def counted(case: HeadCase, n: int | None = None, **how: Any) -> float:
    """Products of `n` rows, all by default, over the vocabulary."""
    with Counter() as counter:
        linear(case, **{"chunk_tokens": CHUNK} | how)
    n_rows = case.hidden.shape[0] if n is None else n
    return counter.count / (max(n_rows, 1) * V * H)


def case_of(n: int = 128, **options: Any) -> HeadCase:
    return make(n, V, H, idle_every=0, **options)


ALL = ("hidden", "weight")


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
def test_three_products_whatever_the_chunk(chunk: int) -> None:
    case = case_of()
    assert counted(case, chunk_tokens=chunk) == 3
    assert counted(case, chunk_tokens=chunk, frozen=("weight",)) == 2
    assert counted(case, chunk_tokens=chunk, frozen=("hidden",)) == 2
    assert counted(case, chunk_tokens=chunk, frozen=ALL) == 1
    with torch.no_grad():
        assert counted(case, chunk_tokens=chunk) == 1


def test_four_with_little_memory_less_the_tile_that_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_slices(monkeypatch, 64)
    case = case_of()
    for how in ({"low_memory": True}, {"reduction": "none"}, {"objective": lambda t: -t.logps}):
        assert counted(case, **how) == 4 - CHUNK / 128
        assert counted(case, chunk_tokens=128, **how) == 3
        assert counted(case, frozen=("weight",), **how) == 2
        assert counted(case, frozen=ALL, **how) == 1
    how = {"low_memory": True, "entropy_coef": 0.1, "frozen": ("weight",)}
    assert counted(case, **how) == 3 - CHUNK / 128


def test_the_last_tile_is_filled_up_but_not_in_the_weights_product() -> None:
    for n, whole in ((1, 32), (33, 64), (100, 128)):
        for how in ({}, {"low_memory": True, "chunk_tokens": 128}):
            filled = whole if not how else 128
            assert counted(case_of(n), 1, **how) == 2 * filled + n


def test_masked_rows_are_not_multiplied() -> None:
    case = case_of(mask_every=2)  # 64 are left
    assert counted(case, 64) == 3
    assert counted(case, 64, stats=True) == 3


def test_rows_without_an_advantage() -> None:
    """Where nothing else depends on them: one product of three, for statistics, or none."""
    case = case_of()
    case.advantages[32:96] = 0.0
    assert counted(case, 64) == 3
    assert counted(case, 64, stats=True) == 3 + 1
    assert counted(case, low_memory=True) <= 4 / 2
    case.options["token_weights"] = torch.where(torch.arange(128) < 16, 0.0, 1.0)
    assert counted(case, 1) == 2 * 64 + 48  # 48 are left, in two tiles
    case.options["token_weights"] = torch.where(torch.arange(128) < 32, 0.0, 1.0)
    assert counted(case, 32) == 3


def test_rows_that_something_else_depends_on_stay() -> None:
    case = case_of()
    case.advantages[32:96] = 0.0
    assert counted(case, entropy_coef=0.1) == 3
    assert counted(case, kl_coef=0.1, ref_logps=torch.zeros(128)) == 3
    assert counted(case, objective=PPOClip(drift=0.1)) == 3
    assert counted(case, objective=lambda terms: -terms.logps, chunk_tokens=128) == 3


def test_most_groups_without_variance() -> None:
    """At least half of the products are saved where 60 percent of the rows have no advantage."""

    def saves() -> None:
        case = case_of(320)
        case.advantages[:192] = 0.0
        assert counted(case) <= 0.5 * 3

    saves()
    with planted(api, "_idle", lambda rows, terms: None):
        is_noticed(saves)


def test_sequences() -> None:
    """Three where each fits a tile; those without an advantage leave."""
    case = case_of(ratio_level="sequence", cu_seqlens=torch.arange(0, 129, 16))
    assert counted(case) == 3
    case.advantages = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, -1.0])
    assert counted(case, 1) == 2 * 64 + 48
    case.options["cu_seqlens"] = torch.tensor([0, 128])
    case.advantages = torch.ones(1)
    assert counted(case) == 4 - CHUNK / 128
    assert counted(case, chunk_tokens=128) == 3


def scored(case: HeadCase, frozen: tuple[str, ...] = (), **how: Any) -> float:
    given = case.leaves(frozen)
    with Counter() as counter:
        values = cfpo_kernels.linear_token_logps(
            given["hidden"], given["weight"], case.token_ids, chunk_tokens=CHUNK, **how
        )
        values = values if isinstance(values, tuple) else (values,)
        total = sum(x.sum() for x in values)
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
    return counter.count / (case.hidden.shape[0] * V * H)


def test_log_probs() -> None:
    case = case_of()
    assert scored(case, ALL) == 1
    assert scored(case, ("weight",)) == 2
    assert scored(case, ("weight",), return_entropy=True) == 3 - CHUNK / 128
    assert scored(case) == 4 - CHUNK / 128
    assert scored(case, mask=torch.arange(128) < 64) == (4 - CHUNK / 64) / 2


def test_an_adapter_adds_its_own_and_no_merged_weight() -> None:
    case = case_of(rank=2)
    assert counted(case, frozen=("weight",)) == 2 + 3 * 2 / H
    assert counted(case) == 3 + 3 * 2 / H


def test_a_support_needs_no_product_over_the_vocabulary() -> None:
    case = case_of()
    support = case.token_ids[:, None].repeat(1, 2)
    support[:, 1] = -1
    assert counted(case, support=support) <= 3 * 2 / V


@pytest.mark.parametrize("fast", [True, False])
def test_products_of_low_precision(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many where bfloat16 is slow, and then all of float32, never of whole operands."""
    use_slices(monkeypatch, 64)
    pretend_speed(monkeypatch, fast)
    case = case_of(dtype=torch.bfloat16)
    for how in ({}, {"low_memory": True}, {"chunk_tokens": 128}):
        with Counter() as counter:
            linear(case, **{"chunk_tokens": CHUNK} | how)
        want = 4 - CHUNK / 128 if "low_memory" in how else 3
        assert counter.count == want * 128 * V * H
        assert fast or counter.dtypes == {torch.float32}


def test_operands_are_converted_once_for_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is slow: of a tile the head twice, the logits' gradient once, x twice."""
    use_slices(monkeypatch, 64)
    pretend_speed(monkeypatch, fast=False)
    with Counter() as counter:
        linear(case_of(dtype=torch.bfloat16), chunk_tokens=CHUNK)
    tiles = 128 // CHUNK
    assert counter.widened == tiles * (2 * V * H + CHUNK * V + 2 * CHUNK * H)


def test_a_second_projection_is_noticed() -> None:
    project = head.Head.project

    def twice(self: Any, *arguments: Any) -> None:
        project(self, *arguments)
        project(self, *arguments)

    with planted(head.Head, "project", twice):
        is_noticed(lambda: test_three_products_whatever_the_chunk(32))
