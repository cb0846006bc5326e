"""Numbers of whole sequences, against loops over Python lists."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_torch import Refusal, check_refused, planted, refused, run_examples, works_everywhere
from repository import GOLDEN as TABLES
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import sequences, weights
from cfpo_kernels.sequences import (
    group_advantages,
    prefix_min,
    sequence_logps,
    sequence_mean,
    sequence_sum,
    suffix_sum,
)

GOLDEN = json.loads((TABLES / "sequences.json").read_text())["rows"]
LENGTHS = [5, 1, 0, 8, 3, 0]
CU_SEQLENS = torch.tensor([0, 5, 6, 6, 14, 17, 17])


def ragged(seed: int = 0) -> tuple[list[list[float]], list[list[bool]]]:
    """Values and masks of six sequences; the second has nothing unmasked, two have no token."""
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(n, generator=g).round(decimals=1).tolist() for n in LENGTHS]
    masks = [(torch.rand(n, generator=g) < 0.7).tolist() for n in LENGTHS]
    masks[1] = [False]
    return values, masks


def padded(rows: list[list[Any]], fill: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor([row + [fill] * (9 - len(row)) for row in rows], dtype=dtype)


def both_layouts(seed: int = 0) -> list[tuple[Tensor, Tensor, dict[str, Any], Tensor]]:
    """(values, mask, options, where tokens are): masked values are NaN and infinite."""
    values, masks = ragged(seed)
    pad, mask = padded(values, math.nan, torch.float32), padded(masks, False, torch.bool)
    pad = torch.where(mask, pad, torch.nan)
    pad[:, ::2] = torch.where(mask, pad, torch.inf)[:, ::2]
    there = padded([[True] * n for n in LENGTHS], False, torch.bool)
    return [
        (pad, mask, {}, there),
        (pad[there], mask[there], {"cu_seqlens": CU_SEQLENS}, torch.ones(17, dtype=torch.bool)),
    ]


def naive(name: str, values: list[float], mask: list[bool], **options: Any) -> Any:
    kept = [v for v, m in zip(values, mask, strict=True) if m]
    if name == "sequence_sum":
        return math.fsum(kept)
    if name == "sequence_mean":
        return math.fsum(kept) / len(kept) if kept else 0.0
    found = []
    for t, active in enumerate(mask):
        end = t if options.get("exclusive") else t + 1
        pairs = zip(values, mask, strict=True)
        window = list(pairs)[t:] if name == "suffix_sum" else list(pairs)[:end]
        numbers = [v for v, m in window if m]
        least = min(numbers, default=options.get("empty", math.inf))
        found.append((math.fsum(numbers) if name == "suffix_sum" else least) if active else 0.0)
    return found


def check_against_loops(name: str, function: Callable[..., Tensor], **options: Any) -> None:
    for seed in range(6):
        lists = ragged(seed)
        for values, mask, layout, there in both_layouts(seed):
            got = function(values, mask, **layout, **options)
            # What float32 made of the values.
            exact = [[torch.tensor(v).item() for v in row] for row in lists[0]]
            want = [naive(name, v, m, **options) for v, m in zip(exact, lists[1], strict=True)]
            if name in ("suffix_sum", "prefix_min"):
                assert got.shape == values.shape and not got[~there].any()
                want, got = [v for row in want for v in row], got[there]
            assert got.tolist() == pytest.approx(want, rel=1e-14, abs=1e-15)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sequence_sum", {}),
    ("sequence_mean", {}),
    ("suffix_sum", {}),
    ("prefix_min", {}),
    ("prefix_min", {"exclusive": True}),
    ("prefix_min", {"exclusive": True, "empty": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_against_loops(name: str, options: dict[str, Any]) -> None:
    check_against_loops(name, getattr(sequences, name), **options)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients(name: str, options: dict[str, Any]) -> None:
    function = getattr(sequences, name)
    for values, mask, layout, _ in both_layouts():
        # Without equal values, where a least number has no derivative.
        apart = values + 0.001 * torch.arange(values.numel()).reshape(values.shape)
        given = torch.where(mask, apart, 0.0).double().requires_grad_()

        def loss(x: Tensor, mask: Tensor = mask, layout: Any = layout) -> Tensor:
            found = function(x, mask, **layout, **options)
            return torch.where(found.isinf(), 0.0, found).sin()

        assert torch.autograd.gradcheck(loss, given)
        assert torch.autograd.gradgradcheck(loss, given)
        spoilt = values.clone().requires_grad_()
        loss(spoilt).sum().backward()
        assert spoilt.grad is not None and spoilt.grad.dtype == torch.float32
        assert not spoilt.grad[~mask].any() and spoilt.grad[mask].abs().sum() > 0


def test_a_least_number_that_occurs_twice_has_one_gradient() -> None:
    x = torch.tensor([[2.0, 1.0, 3.0, 1.0]], requires_grad=True)
    prefix_min(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1, 3, 0, 0]]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_bits_depend_on_the_sequence_alone(name: str, options: dict[str, Any]) -> None:
    function = getattr(sequences, name)
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, generator=g, dtype=torch.float64) * 1e3 for n in (700, 33, 1, 5000)]
    pad = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.nan)
    bounds = torch.tensor([0, 700, 733, 734, 5734])
    in_a_batch = function(pad, ~pad.isnan(), **options)
    packed = function(torch.cat(rows), cu_seqlens=bounds, **options)
    for i, row in enumerate(rows):
        alone = function(row[None], **options)[0]
        of_pack = packed[i] if packed.numel() == 4 else packed[bounds[i] : bounds[i + 1]]
        of_batch = in_a_batch[i] if alone.dim() == 0 else in_a_batch[i, : len(row)]
        assert torch.equal(alone, of_pack) and torch.equal(alone, of_batch)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_nan_reaches_its_own_sequence_only(name: str, options: dict[str, Any]) -> None:
    function = getattr(sequences, name)
    values = torch.tensor([1.0, 2.0, 5.0, torch.nan, 4.0, 3.0, 7.0])
    got = function(values, cu_seqlens=torch.tensor([0, 2, 5, 7]), **options)
    if got.shape == (3,):
        assert got.isnan().tolist() == [False, True, False]
    else:
        after = {"suffix_sum": [2, 3], "prefix_min": [4] if options else [3, 4]}[name]
        assert got.isnan().nonzero()[:, 0].tolist() == after


def test_sums_keep_what_float32_loses() -> None:
    g = torch.Generator().manual_seed(0)
    logps = -4 * torch.rand(1, 20_000, generator=g)
    moved = logps + 1e-6
    want = math.fsum(moved[0].tolist()) - math.fsum(logps[0].tolist())
    got = sequence_sum(moved) - sequence_sum(logps)
    assert got.dtype == torch.float64 and got.item() == pytest.approx(want, rel=1e-7)
    in_float32 = moved.sum() - logps.sum()
    assert in_float32.item() != pytest.approx(want, rel=1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        assert sequence_mean(logps.to(dtype)).dtype == torch.float64
        assert prefix_min(logps.to(dtype)).dtype == torch.float32


def test_shapes() -> None:
    for shape in ((2, 3, 4), (0, 4), (2, 0), (1, 1)):
        x = torch.ones(shape)
        assert torch.equal(sequence_sum(x), x.double().sum(-1))
        assert sequence_mean(x).shape == shape[:-1] and suffix_sum(x).shape == shape
        assert prefix_min(x, exclusive=True).shape == shape
    empty = sequence_mean(torch.ones(0), cu_seqlens=torch.tensor([0, 0, 0]))
    assert empty.tolist() == [0, 0]
    assert torch.equal(
        sequence_sum(torch.ones(2, 3, 4).transpose(0, 2)), torch.full((4, 3), 2.0).double()
    )


# Objectives of sequences, written with these functions.


def sequence_loss(row: dict[str, Any], logps: Tensor, **helpers: Any) -> Tensor:
    """The losses of sequences.json; `helpers` replace the functions under test."""
    mean = helpers.get("sequence_mean", sequence_mean)
    total = helpers.get("sequence_sum", sequence_sum)
    old, a, mask = (
        torch.tensor(row[name], dtype=torch.float64) for name in ("old_logps", "advantages", "mask")
    )
    x, advantages, parameters = logps - old, a[:, None], row["parameters"]
    low, high = parameters.get("epsilon_low", 3e-4), parameters.get("epsilon_high", 4e-4)
    lengths = mask.sum(1)
    if row["objective"] in ("gspo", "luspo"):
        ratio = mean(x, mask).exp()
        loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
        return (loss * (lengths if row["objective"] == "luspo" else 1)).mean()
    if row["objective"] == "gmpo":
        one_sided = torch.where(advantages > 0, x.clamp(max=high), x.clamp(min=-low))
        return (-a * mean(one_sided, mask).exp()).mean()
    if row["objective"] == "vespo":
        ratio = total(x.detach(), mask).clamp(-20, 20)
        k, lam = torch.where(a > 0, 2, 3), torch.where(a > 0, 3, 2)
        weight = (lam + k * ratio - lam * ratio.exp()).exp()[:, None]
    else:
        least = helpers.get("prefix_min", prefix_min)(x.detach(), mask, exclusive=True, empty=0.0)
        weight = (x.detach() + least).exp().clamp(0.8, 1.28)
    return -(weight * advantages * logps * mask).sum() / mask.sum()


def check_golden(**helpers: Any) -> None:
    for row in GOLDEN:
        logps = torch.tensor(row["logps"], dtype=torch.float64, requires_grad=True)
        loss = sequence_loss(row, logps, **helpers)
        loss.backward()
        assert loss.item() == pytest.approx(row["loss"], rel=1e-12), row["objective"]
        assert logps.grad is not None
        want = torch.tensor(row["dlogps"], dtype=torch.float64)
        torch.testing.assert_close(logps.grad, want, rtol=1e-12, atol=1e-15)


def test_golden_rows() -> None:
    check_golden()
    assert len(GOLDEN) == 6


def test_sequence_logps() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 30, generator=g)
    token_ids = torch.randint(0, 30, (2, 5), generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    spoilt, flat = logits.clone(), logits[mask != 0].clone().requires_grad_()
    spoilt[mask == 0] = torch.nan
    spoilt.requires_grad_()
    leaf = logits.double().requires_grad_()
    every = torch.log_softmax(leaf / 0.7, -1).gather(-1, token_ids[..., None])[..., 0]
    want = (every * mask).sum(1)
    got = sequence_logps(spoilt, token_ids, mask, temperature=0.7)
    packed = sequence_logps(
        flat, token_ids[mask != 0], cu_seqlens=torch.tensor([0, 5, 7]), temperature=0.7
    )
    torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=0)
    assert got.dtype == torch.float64 and torch.equal(got, packed)
    for loss in (want, got, packed):
        (loss * torch.tensor([1.0, -2.0])).sum().backward()
    assert leaf.grad is not None and spoilt.grad is not None and flat.grad is not None
    torch.testing.assert_close(spoilt.grad, leaf.grad.float(), rtol=1e-5, atol=1e-7)
    assert torch.equal(spoilt.grad[mask != 0], flat.grad) and not spoilt.grad[mask == 0].any()
    buffer = logits.clone().requires_grad_()
    sequence_logps(buffer * 1, token_ids, mask, temperature=0.7, inplace=True)[0].backward()
    assert buffer.grad is not None and buffer.grad[0].abs().sum() > 0


# Advantages of groups.


def naive_advantages(rewards: list[float], ids: list[int], scale: str, min_std: float) -> list[Any]:
    found = []
    for reward, own in zip(rewards, ids, strict=True):
        group = [r for r, i in zip(rewards, ids, strict=True) if i == own]
        apart = reward - statistics.fmean(group)
        if len(group) == 1:
            found.append(0.0)
        elif scale == "none":
            found.append(apart)
        else:
            found.append(apart / max(statistics.stdev(group), min_std))
    return found


def check_advantages(function: Callable[..., Tensor]) -> None:
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(24, generator=g, dtype=torch.float64)
    ids = torch.tensor([7, -3, 7, 2**40, 0, 0, 0, -3, 5, 7, 7, 0] * 2)
    for scale in ("std", "none"):
        for min_std in (0.0, 0.9):
            want = naive_advantages(rewards.tolist(), ids.tolist(), scale, min_std)
            got = function(rewards, ids, scale=scale, min_std=min_std)
            assert got.tolist() == pytest.approx(want, rel=1e-12)
            in_rows = [i // 4 for i in range(24)]
            want = naive_advantages(rewards.tolist(), in_rows, scale, min_std)
            got = function(rewards.reshape(6, 4), group_size=4, scale=scale, min_std=min_std)
            assert got.shape == (6, 4)
            assert got.flatten().tolist() == pytest.approx(want, rel=1e-12)
    for value, size in itertools.product((0.1, 1000.1, 1e-30, -7e20), (3, 7, 11)):
        for dtype, min_std in itertools.product((torch.float32, torch.float64), (0.0, 1e-6)):
            equal = torch.full((2 * size,), value, dtype=dtype)
            got = function(equal, group_size=size, min_std=min_std)
            assert got.dtype == dtype and not got.any() and not got.isnan().any()


def test_group_advantages() -> None:
    check_advantages(group_advantages)
    assert group_advantages(torch.tensor([True, False]), group_size=2).tolist() == pytest.approx(
        [0.5**0.5, -(0.5**0.5)]
    )
    assert group_advantages(torch.tensor([3.0, 5.0]), group_size=1).tolist() == [0, 0]
    none = torch.ones(0, dtype=torch.int64)
    assert group_advantages(torch.ones(0), none).shape == (0,)
    assert group_advantages(torch.ones(0, 4), group_size=4).shape == (0, 4)
    assert not group_advantages(torch.ones(4, requires_grad=True), group_size=2).requires_grad
    spoilt = torch.tensor([1.0, torch.nan, 2.0, 4.0, torch.inf, 1.0])
    got = group_advantages(spoilt, torch.tensor([1, 1, 2, 2, 3, 3]))
    assert got.isnan().tolist() == [True, True, False, False, True, True]


def test_group_advantages_as_trl_and_verl() -> None:
    """Both add to the standard deviation, where this takes the larger of the two."""
    rewards = torch.rand(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.arange(32) % 4
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    for scale in ("std", "none"):
        want, _ = algos.compute_grpo_outcome_advantage(
            rewards[:, None].clone(),
            torch.ones(32, 1),
            ids.numpy(),
            epsilon=0.0,
            norm_adv_by_std_in_grpo=scale == "std",
        )
        got = group_advantages(rewards, ids, scale=scale, min_std=0)
        torch.testing.assert_close(got, want[:, 0], rtol=1e-12, atol=1e-15)
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    grouped = rewards.reshape(-1, 8)
    want = (grouped - grouped.mean(1, keepdim=True)) / nanstd(grouped, dim=1, keepdim=True)
    got = group_advantages(rewards, group_size=8, min_std=0).reshape(-1, 8)
    # TRL's n / (n - 1) is a float32.
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-15)


def test_works_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def every(values: Tensor, mask: Tensor, cu_seqlens: Tensor, least: Tensor) -> list[Tensor]:
        functions = [getattr(sequences, name) for name, _ in CASES]
        layouts = [(values.reshape(3, 4), mask.reshape(3, 4), None), (values, mask, cu_seqlens)]
        found = [
            function(x, m, cu_seqlens=bounds, **options)
            for function, (_, options) in zip(functions, CASES, strict=True)
            for x, m, bounds in layouts
        ]
        found += [group_advantages(values, cu_seqlens[mask.long()], min_std=least)]
        return [*found, group_advantages(values, group_size=3, scale="none")]

    values = torch.randn(12, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 3, 3, 12])
    works_everywhere(monkeypatch, every, values, values > -1, bounds, torch.tensor(1e-3))


def test_a_compiled_gradient() -> None:
    values, mask, layout, _ = both_layouts()[1]
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    torch._dynamo.reset()

    def loss(x: Tensor) -> Tensor:
        mean = sequence_mean(x, mask, **layout)
        return (mean.sin().sum() + prefix_min(x, mask, **layout).sum()).float()

    loss(leaves[0]).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(leaves[1]).backward()
    assert leaves[0].grad is not None and leaves[0].grad.abs().sum() > 1
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


# Mistakes that the comparisons above have to find.


def _to_loops(name: str, function: Callable[..., Tensor], **options: Any) -> Callable[[], None]:
    return lambda: check_against_loops(name, function, **options)


def _mean_over_all(values: Tensor, mask: Tensor, **layout: Any) -> Tensor:
    return sequence_sum(values, mask, **layout) / values.shape[-1]


def _mean_of_everything(values: Tensor, mask: Tensor, **layout: Any) -> Tensor:
    return sequence_mean(values.nan_to_num(0, posinf=0), **layout)


def _sum_in_float32(values: Tensor, mask: Tensor, **layout: Any) -> Tensor:
    return torch.where(mask, values, 0.0).cumsum(-1)[..., -1].double()


def _suffix_across(values: Tensor, mask: Tensor, **layout: Any) -> Tensor:
    flat = torch.where(mask, values, 0.0).double().flatten()
    return torch.where(mask, flat.flip(0).cumsum(0).flip(0).reshape(values.shape), 0.0)


def _suffix_without_itself(values: Tensor, mask: Tensor, **layout: Any) -> Tensor:
    return suffix_sum(values, mask, **layout) - torch.where(mask, values, 0.0)


def _without(option: str) -> Callable[..., Tensor]:
    def function(*args: Any, **options: Any) -> Tensor:
        options.pop(option)
        return prefix_min(*args, **options)

    return function


def _planted_advantages(right: str, wrong: str) -> Callable[[], None]:
    return lambda: check_advantages(planted(group_advantages, right, wrong))


def _planted_sums(wrong: str) -> Callable[[], None]:
    mistaken = planted(weights.suffix_sums, "index[reach:] == index[:-reach]", wrong)

    def check() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "suffix_sums", mistaken)
            check_against_loops("suffix_sum", suffix_sum)

    return check


PLANTED: dict[str, Callable[[], None]] = {
    "a mean over padding": _to_loops("sequence_mean", _mean_over_all),
    "a mean without mask": _to_loops("sequence_mean", _mean_of_everything),
    "a sum in float32": _to_loops("sequence_sum", _sum_in_float32),
    "a suffix over the next sequence": _to_loops("suffix_sum", _suffix_across),
    "a suffix without its token": _to_loops("suffix_sum", _suffix_without_itself),
    "a border overlooked": _planted_sums("index[reach:] <= index[:-reach] + 1"),
    "an inclusive minimum": _to_loops("prefix_min", _without("exclusive"), exclusive=True),
    "another number for nothing": _to_loops(
        "prefix_min", _without("empty"), exclusive=True, empty=0.5),
    "a minimum of masked zeros": _to_loops(
        "prefix_min", lambda x, m, **k: prefix_min(torch.where(m, x, 0.0), **k) * m),
    "GSPO with a sum": lambda: check_golden(sequence_mean=sequence_sum),
    "VESPO with a mean": lambda: check_golden(sequence_sum=sequence_mean),
    "MinPRO with itself": lambda: check_golden(
        prefix_min=lambda x, mask, **_: prefix_min(x, mask)),
    "a biased deviation": _planted_advantages("/ (counts - 1)", "/ counts"),
    "a deviation added to": _planted_advantages(
        "torch.maximum(variance.sqrt(), least)", "(variance.sqrt() + least)"),
    "a mean that rounds": _planted_advantages("given = given - given[starts]\n", "pass\n"),
    "the order of the sort": _planted_advantages(".scatter_(0, order, given)", ".copy_(given)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(name: str) -> None:
    with pytest.raises(AssertionError):
        PLANTED[name]()


X = torch.ones(2, 3)
IDS = torch.zeros(2, 3, dtype=torch.int64)
REFUSED: list[Refusal] = [
    ("values", lambda: sequence_sum([1.0]), TypeError, "list"),
    ("values", lambda: sequence_sum(IDS), TypeError, "torch.int64"),
    ("values", lambda: sequence_mean(torch.ones(3)), ValueError, r"cu_seqlens, got shape \(3,\)"),
    ("mask", lambda: sequence_sum(X, torch.ones(2)), ValueError, r"\(2, 3\), got \(2,\)"),
    ("mask", lambda: suffix_sum(X, torch.ones(2, 3, device="meta")), ValueError, "cpu"),
    ("cu_seqlens", lambda: sequence_sum(X, cu_seqlens=IDS[0]), ValueError, r"packed values \(N,\)"),
    (
        "cu_seqlens",
        lambda: suffix_sum(X[0], cu_seqlens=torch.tensor([0, 2, 4])),
        ValueError,
        r"\[0, 2, 4\]",
    ),
    ("cu_seqlens", lambda: suffix_sum(X[0], cu_seqlens=X[0]), TypeError, "torch.float32"),
    ("exclusive", lambda: prefix_min(X, exclusive=1), TypeError, "int"),
    ("empty", lambda: prefix_min(X, empty="0"), TypeError, "str"),
    ("logits", lambda: sequence_logps(X, IDS[:, 0]), ValueError, r"\(B, T, V\)"),
    ("rewards", lambda: group_advantages([1.0], group_size=1), TypeError, "list"),
    ("group_ids", lambda: group_advantages(X), ValueError, "neither"),
    ("group_size", lambda: group_advantages(X, IDS, 3), ValueError, "both"),
    ("group_size", lambda: group_advantages(X, group_size=4), ValueError, "the 6 rewards, got 4"),
    ("group_size", lambda: group_advantages(X, group_size=2.0), TypeError, "float"),
    ("group_size", lambda: group_advantages(X, 3), TypeError, "int"),
    ("group_ids", lambda: group_advantages(X, X), TypeError, "torch.float32"),
    ("group_ids", lambda: group_advantages(X, IDS[0]), ValueError, r"\(2, 3\), got \(3,\)"),
    ("scale", lambda: group_advantages(X, IDS, scale="batch"), ValueError, "'none'"),
    ("min_std", lambda: group_advantages(X, IDS, min_std=-1.0), ValueError, "0 or more, got -1"),
    ("min_std", lambda: group_advantages(X, IDS, min_std=X[0]), ValueError, r"\(3,\)"),
]


@refused(REFUSED)
def test_refused(case: Refusal) -> None:
    check_refused(case)


def test_examples() -> None:
    run_examples(sequences)
    assert cfpo_kernels.sequences is sequences


def test_torch_warns_of_no_bounds() -> None:
    """One padded sequence, and bounds with gaps: searchsorted copies such, and says so."""
    logits, old = torch.randn(1, 3, 20), torch.full((1, 3), -3.0)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    torch.set_warn_always(True)  # rather than once a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cfpo_kernels.cfpo_loss(logits, ids, torch.ones(1), old, ratio_level="sequence")
            cu_seqlens = torch.tensor([0, 9, 2, 9, 3])[::2]
            packed = logits[0], ids[0], torch.ones(2), old[0]
            cfpo_kernels.cfpo_loss(*packed, cu_seqlens=cu_seqlens, ratio_level="sequence")
    finally:
        torch.set_warn_always(False)
