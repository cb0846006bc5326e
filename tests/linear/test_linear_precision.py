"""Sums and products of low precision: as exact with many chunks as with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import (
    HeadCase,
    is_noticed,
    linear,
    logps64,
    make,
    planted,
    pretend_speed,
    relative,
    use_slices,
    whole,
)
from torch import Tensor

from cfpo_kernels.linear import api, head, products
from cfpo_kernels.linear import batch as batch_module

pytestmark = pytest.mark.usefixtures("one_thread")

N, CHUNK = 1024, 16  # 64 chunks


@pytest.fixture(scope="module")
def case() -> HeadCase:
    """On-policy nearly: near an optimum of r the rounding of logits is all that is left."""
    made = make(N, 500, 32, torch.bfloat16, spread=1.0, idle_every=0, reduction="sum")
    g = torch.Generator().manual_seed(2)
    made.old_logps = (logps64(made) - 0.02 * torch.randn(N, generator=g)).float()
    return made


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With instructions for bfloat16 and without; a product of it is right either way."""
    pretend_speed(monkeypatch, request.param)
    use_slices(monkeypatch, 128)
    return bool(request.param)


def errors(case: HeadCase, **how: Any) -> dict[str, float]:
    got, want = linear(case, **how), whole(case)
    return {name: relative(got.gradients[name], x) for name, x in want.gradients.items()}


@pytest.mark.parametrize("how", [{}, {"low_memory": True}], ids=str)
def test_many_chunks_are_as_exact_as_one(case: HeadCase, fast: bool, how: dict[str, Any]) -> None:
    one = errors(case, chunk_tokens=N)
    many = errors(case, chunk_tokens=CHUNK, **how)
    assert one["weight"] < 2e-2
    assert many["weight"] <= 1.02 * one["weight"]
    assert many["hidden"] <= 1.02 * one["hidden"]


def test_sums_in_bfloat16_are_noticed(case: HeadCase, fast: bool) -> None:
    with planted(api, "FEW_CHUNKS", 64):
        is_noticed(
            lambda: test_many_chunks_are_as_exact_as_one(case, fast, {"accumulate": "weight"})
        )


def test_products_rounded_before_they_are_added_are_noticed(
    case: HeadCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake of a sum in float32 whose terms are not."""
    pretend_speed(monkeypatch, False)

    def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
        if add:
            out += (a @ b).to(torch.bfloat16)
        else:
            out.copy_(a @ b)

    def isolated() -> None:
        """With logits in float32, whose rounding would hide that of the products."""
        one, many = (
            errors(case, chunk_tokens=n, logits_dtype=torch.float32)["weight"] for n in (N, CHUNK)
        )
        assert many <= 1.02 * one

    isolated()
    with planted(head, "product", product):
        is_noticed(isolated)


def test_few_chunks_may_add_up_in_the_weights_dtype(case: HeadCase) -> None:
    few = linear(case, chunk_tokens=N // 4, accumulate="weight").gradients["weight"]
    assert few.dtype == torch.bfloat16
    assert relative(few, whole(case).gradients["weight"]) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [{}, {"low_memory": True}, {"chunk_tokens": N}], ids=str)
def test_slow_products_give_what_fast_ones_do(
    case: HeadCase, dtype: torch.dtype, how: dict[str, Any]
) -> None:
    case = make(200, 300, 32, dtype, bias=True, rank=4)
    found = []
    for fast in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            use_slices(patch, 128)
            pretend_speed(patch, fast)
            found.append(linear(case, **{"chunk_tokens": 64} | how))
    assert found[0].loss.item() == pytest.approx(found[1].loss.item(), rel=1e-2)
    want = whole(case).gradients
    for name, gradient in found[1].gradients.items():
        assert gradient.dtype == dtype
        # float32 products are at least as exact.
        assert relative(gradient, want[name]) <= 1.05 * relative(
            found[0].gradients[name], want[name]
        )


def test_logits_in_float32_are_more_exact(case: HeadCase, fast: bool) -> None:
    rounded, exact = (
        errors(case, chunk_tokens=64),
        errors(case, chunk_tokens=64, logits_dtype=torch.float32),
    )
    assert exact["weight"] < 0.5 * rounded["weight"]
    stats = linear(case, chunk_tokens=64, logits_dtype=torch.float32, stats=True).stats
    want = whole(case).stats
    assert stats is not None and want is not None
    # The operands are bfloat16 numbers, whose products float32 has exactly.
    assert (stats.logps - want.logps).abs().max() < 1e-5


def test_a_slow_machine_is_asked_of_torch() -> None:
    known = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert products.is_fast(torch.bfloat16, torch.device("cpu")) == known
    assert products.is_fast(torch.float32, torch.device("cpu"))
    assert batch_module.operand_dtype(torch.bfloat16, torch.bfloat16, torch.device("cpu")) == (
        torch.bfloat16 if known else torch.float32
    )


@pytest.mark.parametrize("of", ["bias", "adapter", "both"])
@pytest.mark.parametrize("fast", [False, True])
def test_logits_are_rounded_once(fast: bool, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a bias and an adapter add; twice would be 1.4 times the error, thrice 1.7."""
    pretend_speed(monkeypatch, fast)
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).bfloat16()

    x, u, weight = random(64, 48), random(64, 4), random(500, 48)
    bias = None if of == "adapter" else random(500)
    lora = None if of == "bias" else 0.5 * random(500, 4)
    exact = x.double() @ weight.double().T
    exact += 0 if bias is None else bias.double()
    exact += 0 if lora is None else u.double() @ lora.double().T
    tile = torch.full((64, 500), torch.nan, dtype=torch.bfloat16)
    head.Head(weight, bias, lora, tile.dtype, tile.dtype).project(tile, x, u, slice(0, 500))
    assert relative(tile, exact) < 1.1 * relative(exact.bfloat16(), exact)
