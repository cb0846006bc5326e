"""Losses from hidden states against whole logits in float64: every objective, option and shape."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from chosen_objectives import CHOSEN, name_of, with_drift
from heads import (
    HeadCase,
    check,
    is_noticed,
    linear,
    logits_of,
    logps64,
    make,
    planted,
    regularizers,
    relative,
    split,
)
from heads import whole as whole_logits
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import CFPO, DPPO, TOPR, PPOClip, TokenTerms
from cfpo_kernels.linear import api, fused, scores
from cfpo_kernels.linear import batch as batch_module
from cfpo_kernels.objectives import Objective

pytestmark = pytest.mark.usefixtures("small_slices", "one_thread")

# How the same loss is reached: rows by rows, and over the vocabulary in slices.
WAYS: dict[str, dict[str, Any]] = {
    "rows": {"chunk_tokens": 16},
    "one-tile": {"chunk_tokens": 64},
    "slices": {"chunk_tokens": 16, "low_memory": True},
    "none": {"chunk_tokens": 16, "reduction": "none"},
}
ways = pytest.mark.parametrize("way", WAYS)


def bounds_for(objective: Objective, n: int) -> dict[str, Any]:
    if not objective.needs_bounds:
        return {}
    g = torch.Generator().manual_seed(5)
    low, high = (torch.rand(n, generator=g) * 0.02 for _ in range(2))
    return {"log_ratio_bounds": (-0.19 - low, 0.17 + high)}


def compare(case: HeadCase, tolerance: float = 3e-6, **how: Any) -> None:
    """With float64, and with the kernels on whole logits; a number upstream, of either sign."""
    upstream: Any = -1.7
    if how.get("reduction") == "none":
        upstream = torch.linspace(-2, 3, case.token_ids.numel()).reshape(case.token_ids.shape)
    got = linear(case, stats=True, upstream=upstream, **how)
    check(got, whole_logits(case, upstream=upstream, **how), tolerance)
    whole_too = whole_logits(case, torch.float32, upstream=upstream, **how)
    check(got, whole_too, 2 * tolerance)


@ways
@pytest.mark.parametrize("objective", CHOSEN, ids=name_of)
def test_objectives(objective: Objective, way: str) -> None:
    case = make(mask_every=6)
    compare(case, objective=objective, **bounds_for(objective, 37), **WAYS[way])


@pytest.mark.parametrize("objective", with_drift, ids=name_of)
def test_drifts_keep_tokens_without_an_advantage(objective: Objective) -> None:
    compare(make(), objective=objective, **bounds_for(objective, 37), chunk_tokens=16)


@ways
@pytest.mark.parametrize("ratio_weighted", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1+", "k3+"])
def test_kl_entropy_weights_and_temperatures(
    estimator: str, ratio_weighted: bool, way: str
) -> None:
    g = torch.Generator().manual_seed(3)
    case = make(mask_every=6, temperature=0.7 + 0.6 * torch.rand(37, generator=g))
    case.options |= regularizers(case, g)
    case.options |= {"kl_estimator": estimator, "kl_ratio_weighted": ratio_weighted}
    compare(case, **WAYS[way])


@ways
def test_entropies_alone(way: str) -> None:
    compare(make(entropy_coef=0.1), objective=CFPO(), **WAYS[way])


def test_on_policy() -> None:
    compare(replace(make(), old_logps=None), **WAYS["rows"])


REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none")


def without_dropping(case: HeadCase, **how: Any) -> Any:
    with planted(api, "_idle", lambda rows, terms: None):
        return linear(case, **how)


@pytest.mark.parametrize("chunk", [1, 7, 128, 40])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_with_and_without_dropping(reduction: str, chunk: int) -> None:
    """Sequences without any row left among them, and chunk borders inside of sequences."""
    case = make(40, idle_every=2, mask_every=3)
    case.advantages[8:16] = 0.0
    case = split(case, 5, 8)
    upstream: Any = 2.0 if reduction != "none" else torch.linspace(-1, 2, 40).reshape(5, 8)
    how = {"reduction": reduction, "chunk_tokens": chunk, "stats": True, "upstream": upstream}
    got = linear(case, **how)
    check(got, whole_logits(case, reduction=reduction, upstream=upstream))
    all_rows = without_dropping(case, **how)
    check(got, all_rows, 1e-6)
    for name, value in all_rows.stats._asdict().items():
        torch.testing.assert_close(
            getattr(got.stats, name), value, rtol=1e-5, atol=1e-6, equal_nan=True
        )


def test_statistics_are_identical_with_dropping() -> None:
    """In bits: a row does not depend on which others are multiplied beside it."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make(300, idle_every=2, mask_every=3, dtype=dtype)
        for options in ({}, {"low_memory": True}):
            dropped = linear(case, stats=True, **options).stats
            complete = without_dropping(case, stats=True, **options).stats
            for got, want in zip(dropped, complete, strict=True):
                assert torch.equal(got, want) or got.isnan() & want.isnan()


def test_normalisers_of_the_kept_rows_are_noticed() -> None:
    original = api.select

    def of_kept(active: Tensor, idle: Tensor | None, *others: Any) -> Any:
        if idle is not None:
            active &= ~idle
        return original(active, idle, *others)

    def normalised() -> None:
        case = make(idle_every=2)
        check(linear(case, stats=True), whole_logits(case))

    normalised()
    with planted(api, "select", of_kept):
        is_noticed(normalised)


class Sequences:
    """Five padded sequences of 1 to 8 tokens."""

    lengths = (8, 3, 7, 1, 5)

    @classmethod
    def padded(cls, **options: Any) -> HeadCase:
        case = make(40, **options)
        case.options["mask"] = (torch.arange(8) < torch.tensor(cls.lengths)[:, None]).reshape(-1)
        return split(case, 5, 8)

    @classmethod
    def packed(cls, **options: Any) -> HeadCase:
        n = sum(cls.lengths)
        case = make(n, **options)
        case.options["cu_seqlens"] = torch.tensor([0, *cls.lengths]).cumsum(0)
        return case


@pytest.mark.parametrize("chunk", [4, 8, 11, 64])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "token-mean"])
def test_ratios_of_sequences(chunk: int, by_token: bool, layout: str, reduction: str) -> None:
    """Shorter and longer than a tile; one sequence has no advantage, and is dropped."""
    case = getattr(Sequences, layout)()
    if not by_token:
        case.advantages = torch.tensor([1.0, -1.5, 0.0, 0.7, -0.4])
    how = {"ratio_level": "sequence", "reduction": reduction, "chunk_tokens": chunk}
    for objective in (PPOClip(0.02, 0.02), CFPO(0.1)):
        compare(case, objective=objective, **how)
    compare(case, objective=CFPO(0.1), low_memory=True, **how)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(
    "objective", [CFPO(0.1), PPOClip(0.02, 0.02), TOPR(drift=0.1), DPPO()], ids=name_of
)
def test_ratios_of_sequences_on_policy(objective: Objective, by_token: bool) -> None:
    """Longer than a tile, with weights that differ within a sequence."""
    case = replace(Sequences.packed(), old_logps=None)
    g = torch.Generator().manual_seed(2)
    case.options["token_weights"] = torch.rand(24, generator=g) * (torch.arange(24) % 4 != 1)
    case.options |= {"ref_logps": logps64(case).float() + 0.1, "kl_coef": 0.2}
    if not by_token:
        case.advantages = torch.tensor([1.0, -1.5, 0.0, 0.7, -0.4])
    bounds: dict[str, Any] = {}
    if objective.needs_bounds:
        low = torch.where(torch.arange(24) % 3 == 0, 0.1, -0.2)  # which 1 is outside of
        bounds["log_ratio_bounds"] = (low, low + 0.3)
    for reduction in ("seq-mean-token-mean", "none"):
        how = {"ratio_level": "sequence", "reduction": reduction, "kl_ratio_weighted": True}
        compare(case, objective=objective, chunk_tokens=4, **how, **bounds)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_ratios_of_sequences_with_everything(reduction: str) -> None:
    case = Sequences.padded()
    assert case.old_logps is not None
    case.options |= {
        "ref_logps": case.old_logps + 0.1,
        "token_weights": torch.rand(5, 8, generator=torch.Generator().manual_seed(1)),
        "kl_coef": 0.2,
        "kl_ratio_weighted": True,
        "entropy_coef": 0.01,
    }
    compare(case, ratio_level="sequence", reduction=reduction, chunk_tokens=9)


def test_a_dropped_token_of_a_kept_sequence_is_noticed() -> None:
    """Its advantage is 0, but its log p is part of its sequence's ratio."""

    def ratios() -> None:
        case = Sequences.padded(idle_every=3)
        how = {"ratio_level": "sequence", "objective": PPOClip(0.02, 0.02), "chunk_tokens": 8}
        check(linear(case, stats=True, **how), whole_logits(case, **how))

    ratios()
    with planted(api, "_idle", lambda rows, terms: terms.inputs.advantages == 0):
        is_noticed(ratios)


def tilted(terms: TokenTerms) -> Tensor:
    weight = terms.log_ratio.exp().clamp(max=1.2).detach()
    return -weight * terms.advantages * terms.logps - 0.1 * terms.log_ratio**2


def against_certainty(terms: TokenTerms) -> Tensor:
    assert terms.entropy is not None
    return tilted(terms) * terms.entropy.detach() - 0.05 * terms.entropy**2


against_certainty.needs_entropy = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["rows", "one-tile", "none"])
@pytest.mark.parametrize("objective", [tilted, against_certainty])
def test_callables(objective: Any, way: str) -> None:
    compare(make(mask_every=4), objective=objective, **WAYS[way])
    padded = Sequences.padded()
    compare(padded, objective=objective, ratio_level="sequence", **WAYS[way])


# What surrounds the call.


def test_a_common_offset_changes_nothing() -> None:
    """A running maximum or a reference that starts at 0 would make log 0 of sums of exp(-200)."""
    case = make(bias=True)
    assert case.bias is not None
    for offset in (-200.0, 1e4):
        moved = replace(case, bias=case.bias + offset)
        for way in ("rows", "slices"):
            got = linear(moved, stats=True, **WAYS[way])
            # The offset rounds the logits: to 8e-6, and to 5e-4.
            check(got, whole_logits(moved, **WAYS[way]), 3e-5 if offset < 0 else 3e-3)
            assert got.stats is not None and torch.isfinite(got.stats.logps).all()


@pytest.mark.parametrize("how", [{}, {"low_memory": True}, {"active_tokens": 30}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hidden_states_of_masked_rows_may_be_anything(value: float, how: dict[str, Any]) -> None:
    def anything() -> None:
        case = make(mask_every=3, rank=2)
        clean = linear(case, stats=True, chunk_tokens=16, **how)
        mask = case.options["mask"]
        assert case.u is not None
        case.hidden[~mask] = value
        case.u[~mask] = value
        case.advantages[~mask] = value
        case.token_ids[~mask] = -100
        for got in (
            linear(case, stats=True, chunk_tokens=16, **how),
            linear(case, stats=True, chunk_tokens=16, upstream=torch.tensor(1.0), **how),
        ):
            assert torch.equal(got.loss, clean.loss)
            for name, gradient in clean.gradients.items():
                assert torch.equal(got.gradients[name], gradient), name
            assert not got.gradients["hidden"][~mask].any()

    anything()
    if "active_tokens" in how:  # rows of 0 in dloss/dz are not enough: 0 * NaN is NaN

        def unmasked(self: Any, chunk: Any, p: Any) -> Any:
            def pad(x: Tensor) -> Tensor:
                return torch.nn.functional.pad(chunk.of(x.detach()), (0, 0, 0, 16 - chunk.size))

            return pad(p.hidden), pad(p.u)

        with planted(batch_module.Batch, "operands", unmasked):
            is_noticed(anything)


@pytest.mark.parametrize("room", [25, 30, 37, 100])
def test_room_for_some_tokens(room: int) -> None:
    """Where the mask is on a device nobody counts: rows beyond the unmasked ones fill the room."""
    case = make(mask_every=3, chunk_tokens=16)
    for how in (
        {},
        {"low_memory": True},
        {"ratio_level": "sequence", "cu_seqlens": torch.tensor([0, 5, 19, 37])},
        {"objective": against_certainty},
    ):
        got = linear(case, stats=True, active_tokens=room, **how)
        check(got, linear(case, stats=True, **how), 1e-6)
    with pytest.raises(ValueError, match="active_tokens must be at least"):
        linear(case, active_tokens=19, stats=True)


@pytest.mark.parametrize("way", ["rows", "slices"])
def test_tokens_that_cannot_be(way: str) -> None:
    """Logits of -inf, whose p log p is 0, in all columns of a slice too."""
    case = make(bias=True, entropy_coef=0.1)
    assert case.bias is not None
    kept = (case.token_ids[:, None] == torch.arange(203)).any(0)
    case.bias[64:128] = torch.where(kept[64:128], case.bias[64:128], -torch.inf)
    case.bias[~kept] = -torch.inf
    case.old_logps = logps64(case).float() - 0.1
    check(linear(case, stats=True, **WAYS[way]), whole_logits(case))


@pytest.mark.parametrize("way", ["rows", "slices"])
def test_a_row_that_is_not_finite_touches_no_other(way: str) -> None:
    case = make(idle_every=0)
    clean = linear(case, stats=True, **WAYS[way])
    for value in (torch.nan, torch.inf):
        case.hidden[5] = value
        got = linear(case, stats=True, **WAYS[way])
        others = torch.arange(37) != 5
        assert got.loss.isnan() and got.gradients["hidden"][5].isnan().all()
        assert torch.equal(got.gradients["hidden"][others], clean.gradients["hidden"][others])
        assert got.stats is not None and clean.stats is not None
        assert torch.equal(got.stats.logps[others], clean.stats.logps[others])


def test_what_arrives_at_masked_rows_may_be_anything() -> None:
    mask = torch.arange(37) % 3 != 0
    upstream = torch.where(mask, torch.linspace(-1, 1, 37), torch.nan)
    case = make()
    for frozen in ((), ("weight",)):
        given = case.leaves(frozen)
        logps = cfpo_kernels.linear_token_logps(
            given["hidden"], given["weight"], case.token_ids, mask=mask, chunk_tokens=16
        )
        assert isinstance(logps, Tensor)
        logps.backward(upstream)
        for x in given.values():
            assert x.grad is None or torch.isfinite(x.grad).all()
        assert given["hidden"].grad is not None and not given["hidden"].grad[~mask].any()


@pytest.mark.parametrize("n", [0, 37])
@pytest.mark.parametrize("upstream", [1.0, torch.inf])
@pytest.mark.parametrize("how", [*WAYS.values(), {"active_tokens": 4}], ids=str)
def test_no_token_gives_zero_connected_to_every_parameter(
    n: int, upstream: float, how: dict[str, Any]
) -> None:
    case = make(n, bias=True, rank=2, mask=torch.zeros(n))
    got = linear(case, stats=True, upstream=upstream, **how)
    assert got.loss.sum() == 0
    assert set(got.gradients) == {"hidden", "weight", "bias", "u", "lora"}
    assert not any(gradient.any() for gradient in got.gradients.values())


def test_an_infinite_ratio_of_an_idle_token() -> None:
    case = make(idle_every=2)
    assert case.old_logps is not None
    case.old_logps = torch.where(case.advantages == 0, -1e4, case.old_logps)
    for options in ({}, {"low_memory": True}):
        got = linear(case, **options)
        assert torch.isfinite(got.loss)
        check(got, replace_stats(whole_logits(case)))


def replace_stats(found: Any) -> Any:
    return replace(found, stats=None)


@pytest.mark.parametrize("shape", [(37,), (1, 37), (37, 1), (2, 3, 6), (1,), ()], ids=str)
@pytest.mark.parametrize("way", ["rows", "slices", "none"])
def test_any_leading_shape(shape: tuple[int, ...], way: str) -> None:
    n = 1
    for size in shape:
        n *= size
    case = split(make(n, idle_every=0), *shape)
    how = WAYS[way]
    got = linear(case, stats=True, **how)
    check(got, whole_logits(case, **how), 1e-5)  # of one token no errors cancel
    assert got.stats is not None and got.stats.logps.shape == shape
    assert got.gradients["hidden"].shape == (*shape, 16)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:-2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["rows", "slices"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_and_weights_in_any_layout(layout: str, way: str, dtype: torch.dtype) -> None:
    """A kernel that scales gradients reads rows: theirs are not laid out as the parameter's."""
    case = make(dtype=dtype)

    def found(change: Any) -> Any:
        given = {
            "hidden": change(case.hidden).detach().requires_grad_(),
            "weight": (case.weight if layout == "expanded" else change(case.weight))
            .detach()
            .requires_grad_(),
        }
        return linear(case, leaves=given, upstream=3.0, **WAYS[way])

    # A multiply of an operand in another layout may sum in another order.
    tolerance = 3e-6 if dtype == torch.float32 else 3e-3
    check(found(LAYOUTS[layout]), found(lambda x: LAYOUTS[layout](x).contiguous()), tolerance)


def test_a_view_of_a_padded_weight() -> None:
    case = make()
    padded = torch.nn.functional.pad(case.weight, (0, 0, 0, 21)).requires_grad_()
    for way in ("rows", "slices"):
        given = {"hidden": case.hidden.clone().requires_grad_(), "weight": padded[:203]}
        linear(case, leaves=given, **WAYS[way])
        assert padded.grad is not None and not padded.grad[203:].any()
        want = whole_logits(case).gradients["weight"]
        assert relative(padded.grad[:203], want) < 3e-6
        padded.grad = None


def test_int32_token_ids() -> None:
    case = make()
    got, want = linear(replace(case, token_ids=case.token_ids.int())), linear(case)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradients["weight"], want.gradients["weight"])


# Backward.


def loss_of(case: HeadCase, given: dict[str, Tensor], **how: Any) -> Tensor:
    options = {"objective": CFPO(), "chunk_tokens": 16} | case.options | how
    loss = cfpo_kernels.linear_policy_loss(
        given["hidden"],
        given["weight"],
        case.token_ids,
        case.advantages,
        case.old_logps,
        **options,
    )
    assert isinstance(loss, Tensor)
    return loss


def gradients_of_sum(terms: list[tuple[float, HeadCase]]) -> dict[str, Tensor]:
    """Of a weighted sum of losses of one head and one batch of hidden states; in float64."""
    given = terms[0][1].leaves(dtype=torch.float64)
    total = given["hidden"].new_zeros(())
    for factor, case in terms:
        loss = cfpo_kernels.cfpo_loss(
            logits_of(given, {}),
            case.token_ids,
            case.advantages,
            case.old_logps,
            backend="reference",
        )
        assert isinstance(loss, Tensor)
        total = total + factor * loss
    total.backward()
    return {name: x.grad for name, x in given.items() if x.grad is not None}


@pytest.mark.parametrize("how", [{}, {"low_memory": True}], ids=str)
def test_a_factor_and_another_loss(how: dict[str, Any]) -> None:
    def summed() -> None:
        case = make()
        given = case.leaves()
        aux = (given["hidden"].square().sum() + given["weight"].sum()) * 0.01
        (3 * loss_of(case, given, **how) + aux).backward()
        want = gradients_of_sum([(3.0, case)])
        want["hidden"] += 0.02 * case.hidden
        want["weight"] += 0.01
        for name, exact in want.items():
            gradient = given[name].grad
            assert gradient is not None and relative(gradient, exact) < 3e-6

    summed()
    if not how:
        backward = fused._FusedLoss.backward

        def ignores(ctx: Any, dloss: Tensor, *others: Any) -> Any:
            return backward(ctx, torch.ones_like(dloss), *others)

        with planted(fused._FusedLoss, "backward", staticmethod(ignores)):
            is_noticed(summed)


@pytest.mark.parametrize("how", [{}, {"low_memory": True}], ids=str)
def test_losses_that_share_a_head(how: dict[str, Any]) -> None:
    """Both forwards come first; one more of them is never differentiated."""
    case = make()
    other = replace(case, advantages=-2 * case.advantages.flip(0))
    given = case.leaves()
    first, second = loss_of(case, given, **how), loss_of(other, given, **how)
    loss_of(other, given, **how)
    with torch.no_grad():
        assert torch.equal(loss_of(case, given, **how), first.detach())
    (0.5 * first - 2 * second).backward()
    for name, exact in gradients_of_sum([(0.5, case), (-2.0, other)]).items():
        gradient = given[name].grad
        assert gradient is not None and relative(gradient, exact) < 3e-6


def test_gradients_accumulate() -> None:
    case = make()
    given = case.leaves()
    for _ in range(2):
        loss_of(case, given).backward()
    once = linear(case, chunk_tokens=16).gradients
    for name, gradient in once.items():
        assert torch.equal(given[name].grad, 2 * gradient)


@pytest.mark.parametrize("frozen", [(), ("weight",)])
@pytest.mark.parametrize("how", [{}, {"low_memory": True}], ids=str)
def test_a_second_or_a_double_backward_is_refused(
    frozen: tuple[str, ...], how: dict[str, Any]
) -> None:
    given = make().leaves(frozen)
    loss = loss_of(make(), given, **how)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, given["hidden"], create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        loss.backward()


def test_forward_mode_is_refused() -> None:
    case = make()
    with torch.autograd.forward_ad.dual_level():
        for name in ("hidden", "weight"):
            given = case.leaves()
            given[name] = torch.autograd.forward_ad.make_dual(given[name], given[name])
            with pytest.raises(RuntimeError, match="forward-mode AD"):
                loss_of(case, given)


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_changed_between_forward_and_backward(way: str) -> None:
    """What is multiplied again has to be what was."""
    given = make().leaves()
    loss = loss_of(make(), given, **WAYS[way]).sum()
    with torch.no_grad():
        given["weight"].mul_(2)
    if way in ("slices", "none"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:  # its gradient is known already
        loss.backward()
        assert torch.equal(given["weight"].grad, linear(make(), **WAYS[way]).gradients["weight"])


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_kept_after_the_loss_is_gone(way: str) -> None:
    """Gradients that were reachable from their own graph would wait for the cycle collector."""

    def gone() -> None:
        given = make().leaves()
        loss = loss_of(make(), given, **WAYS[way])
        watched = [weakref.ref(x) for x in (loss, *given.values())]
        del loss, given
        assert [ref() for ref in watched] == [None] * 3

    gc.collect()
    gc.disable()
    try:
        gone()
        if way == "rows":
            forward = fused._FusedLoss.forward

            def cyclic(ctx: Any, *arguments: Any) -> Any:
                result = forward(ctx, *arguments)
                ctx.found = result
                return result

            with planted(fused._FusedLoss, "forward", staticmethod(cyclic)):
                is_noticed(gone)
    finally:
        gc.enable()


def test_frozen_parameters_get_no_gradient() -> None:
    case = make(bias=True, rank=2)
    everything = {"hidden", "weight", "bias", "u", "lora"}
    for way in WAYS.values():
        upstream = torch.ones(37) if "reduction" in way else 1.0
        for frozen in (("weight",), ("hidden", "u"), ("weight", "bias", "lora"), ("hidden",)):
            got = linear(case, frozen=frozen, upstream=upstream, **way)
            assert got.gradients.keys() == everything - set(frozen)
            check(got, replace_stats(whole_logits(case, frozen=frozen, upstream=upstream, **way)))
    for way in WAYS.values():
        loss = linear(case, frozen=tuple(everything), **way).loss
        assert torch.equal(loss, linear(case, **way).loss)


@pytest.mark.parametrize("how", [{}, {"low_memory": True}, {"entropy_coef": 0.1}], ids=str)
def test_derivatives_are_those_of_the_values(how: dict[str, Any]) -> None:
    """Differences of values in float64, along random directions."""
    case = make(13, 31, 5, bias=True, rank=2)
    case.options |= how | {"backend": "reference", "chunk_tokens": 4, "temperature": 0.8}
    given = case.leaves(dtype=torch.float64)
    gradients = linear(case, leaves=given).gradients
    g = torch.Generator().manual_seed(0)
    for name, gradient in gradients.items():
        direction = torch.randn(gradient.shape, generator=g, dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):
            moved = {other: x.detach() for other, x in given.items()}
            moved[name] = moved[name] + step * direction
            values.append(linear(case, leaves=moved).loss)
        slope = (values[0] - values[1]) / 2e-6
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_breaks_its_graph_at_the_call(backend: str) -> None:
    case = make(idle_every=2)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        given = {"hidden": 2 * hidden, "weight": weight}
        return loss_of(case, given) + hidden.sum() * 0.1

    found = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for function in (step, torch.compile(step, backend=backend)):
        given = case.leaves()
        loss = function(given["hidden"], given["weight"])
        loss.backward()
        found.append((loss.detach(), given["hidden"].grad, given["weight"].grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)
    (reason,) = torch._dynamo.utils.counters["graph_break"]
    assert "linear_policy_loss" in reason
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"linear_policy_loss.*torch\.compiler\.disable"):
        torch.compile(step, backend=backend, fullgraph=True)(**case.leaves())


# Log-probs.


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias", "lora")], ids=["trained", "frozen"])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_token_logps(chunk: int, frozen: tuple[str, ...], with_entropy: bool) -> None:
    case = make(mask_every=4, bias=True, rank=2, temperature=0.7)
    g = torch.Generator().manual_seed(1)
    mask = case.options["mask"]
    upstream = [torch.randn(37, generator=g) for _ in range(1 + with_entropy)]

    def found(given: dict[str, Tensor], score: Any, *logits: Any, **how: Any) -> Any:
        values = score(
            *logits, case.token_ids, mask=mask, temperature=0.7, return_entropy=with_entropy, **how
        )
        values = values if with_entropy else (values,)
        sum((x * u).sum() for x, u in zip(values, upstream, strict=True)).backward()
        return [x.detach() for x in values], {name: x.grad for name, x in given.items()}

    given, whole = case.leaves(frozen), case.leaves(frozen, torch.float64)
    arguments = (given["hidden"], given["weight"])
    lora = (given["u"], given["lora"])
    got = found(
        given,
        cfpo_kernels.linear_token_logps,
        *arguments,
        bias=given["bias"],
        lora=lora,
        chunk_tokens=chunk,
    )
    logits = logits_of(whole, {})
    want = found(whole, cfpo_kernels.token_logps, logits, backend="reference")
    for value, exact in zip(got[0], want[0], strict=True):
        assert not value[~mask].any()
        assert (value - exact).abs().max() < 3e-6
    for name, exact in want[1].items():
        assert (got[1][name] is None) == (exact is None) == (name in frozen)
        if exact is not None:
            assert relative(got[1][name], exact) < 3e-6


def test_a_gradient_scaled_after_its_sum_is_noticed() -> None:
    """Each token's upstream gradient belongs into the sum over tokens."""
    original = scores._add_slices

    def late(batch: Any, head: Any, parameters: Any, sums: Any, *others: Any) -> None:
        *first, dlogps, dentropy = others
        original(batch, head, parameters, sums, *first, torch.ones_like(dlogps), dentropy)
        sums.found[1] *= dlogps.mean()
        sums.found[0] *= dlogps[:, None]

    test_token_logps(16, (), False)
    with planted(scores, "_add_slices", late):
        is_noticed(lambda: test_token_logps(16, (), False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 1, 7, 50])
def test_the_ratio_of_the_policy_that_scored_is_1(chunk: int | None, dtype: torch.dtype) -> None:
    """Half of the rows are not multiplied again, and the others are in other places of a tile."""
    case = make(N_SCORED, 500, 32, dtype, bias=True, rank=4)
    is_one(case, chunk_tokens=chunk)
    if chunk not in (1, 7):
        is_one(case, chunk_tokens=chunk, low_memory=True, temperature=0.7)
        is_one(case, chunk_tokens=chunk, softcap=5.0, logit_scale=0.5)
        is_one(case, chunk_tokens=chunk, logits_dtype=torch.float32)


@pytest.mark.usefixtures("two_threads")
def test_tiles_of_few_rows_on_several_threads() -> None:
    """Where a row is in a tile of 7 decides about its bits, unless that is filled up."""
    is_one(make(N_SCORED, 203), chunk_tokens=7)
    x, w = torch.randn(7, 16), torch.randn(203, 16)
    if not torch.equal((x @ w.T).roll(3, 0), x.roll(3, 0) @ w.T):  # so it is with MKL
        with planted(api, "LEAST_ROWS", 1):
            is_noticed(lambda: is_one(make(N_SCORED, 203), chunk_tokens=7))


N_SCORED = 130


def is_one(case: HeadCase, **options: Any) -> None:
    given = case.leaves()
    lora = (given["u"], given["lora"]) if "u" in given else None
    low_memory = options.pop("low_memory", False)
    for kept in (slice(None), slice(0, None, 3)):  # another batch size too
        ids = case.token_ids[kept]
        old = cfpo_kernels.linear_token_logps(
            given["hidden"][kept],
            given["weight"],
            ids,
            bias=given.get("bias"),
            lora=None if lora is None else (lora[0][kept], lora[1]),
            **options,
        )
        assert isinstance(old, Tensor)
        given_old = torch.full((N_SCORED,), -1.0)
        given_old[kept] = old.detach()
        mask = torch.zeros(N_SCORED, dtype=torch.bool)
        mask[kept] = True
        advantages = torch.where(torch.arange(N_SCORED) % 2 == 0, 0.0, case.advantages)
        scored = replace(case, old_logps=given_old, advantages=advantages)
        scored.options = {"mask": mask, "low_memory": low_memory} | options
        stats = linear(scored, stats=True).stats
        assert stats is not None
        assert stats.ratio_max == 1 and stats.ratio_mean == 1


def test_products_of_another_number_of_rows_are_noticed() -> None:
    """As if a row's logits depended on how many rows are used beside it; on some CPUs they do."""
    project = batch_module.Head.project

    def of_used(self: Any, tile: Tensor, x: Tensor, *others: Any) -> None:
        project(self, tile, x, *others)
        tile *= 1 + 1e-6 * int(x.any(-1).sum())

    with planted(batch_module.Head, "project", of_used):
        is_noticed(lambda: is_one(make(N_SCORED, 203), chunk_tokens=64))


# Bad input.


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        (
            {"support": torch.zeros(5, 2, dtype=torch.int64), name: value},
            ValueError,
            f"{name} must be",
        )
        for name, value in (("low_memory", True), ("accumulate", "weight"), ("active_tokens", 5))
    ),
    ({"hidden": [1.0]}, TypeError, "hidden must be a float32"),
    ({"hidden": torch.ones(5, 16, dtype=torch.int64)}, TypeError, "hidden must be.*int64"),
    ({"hidden": torch.ones(5, 16).double()}, TypeError, "float64 needs backend='reference'"),
    ({"hidden": torch.ones(5, 15)}, ValueError, "hidden must have the weight's H, 16"),
    ({"hidden": torch.ones(())}, ValueError, r"hidden must have shape \(..., H\)"),
    ({"hidden": torch.ones(5, 16).to_sparse()}, TypeError, "hidden must be.*layout"),
    ({"hidden": torch.ones(5, 16).bfloat16()}, TypeError, "hidden must have the weight's dtype"),
    ({"weight": None}, TypeError, "weight must be a float32"),
    ({"weight": torch.ones(203)}, ValueError, r"weight must have shape \(V, H\), got.*203"),
    ({"weight": torch.ones(0)}, ValueError, "weight.*no elements.*ZeRO-3"),
    ({"weight": torch.ones(203, 16, device="meta")}, ValueError, "weight must be on the device"),
    ({"weight": torch.ones(203, 16).to(torch.int8)}, TypeError, "weight.*int8.*quantised"),
    ({"bias": torch.ones(202)}, ValueError, r"bias must have shape \(203,\), got \(202,\)"),
    ({"bias": torch.ones(203).long()}, TypeError, "bias must be a floating-point tensor"),
    ({"bias": torch.ones(203, device="meta")}, ValueError, "bias must be on the device of hidden"),
    ({"lora": torch.ones(5, 2)}, TypeError, r"lora must be a pair \(u, B\)"),
    ({"lora": (torch.ones(4, 2), torch.ones(203, 2))}, ValueError, r"lora\[0\] must have shape"),
    ({"lora": (torch.ones(5, 2), torch.ones(203, 3))}, ValueError, r"lora\[1\] must have shape"),
    ({"token_ids": torch.ones(6).long()}, ValueError, "token_ids must have the shape of hidden"),
    (
        {"token_ids": torch.full((5,), 203)},
        IndexError,
        r"token_ids must be in \[0, 203\).*at \[0\]",
    ),
    ({"token_ids": torch.ones(5)}, TypeError, "token_ids must be an int64 or int32"),
    ({"advantages": torch.ones(4)}, ValueError, "advantages must"),
    ({"old_logps": torch.ones(4)}, ValueError, "old_logps must"),
    ({"mask": torch.ones(4)}, ValueError, "mask must"),
    ({"temperature": 0.0}, ValueError, "temperature must"),
    ({"temperature": torch.ones(4)}, ValueError, "temperature must"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale must"),
    ({"softcap": 0.0}, ValueError, "softcap must"),
    ({"logits_dtype": torch.float16}, ValueError, "logits_dtype must be None"),
    ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1"),
    ({"chunk_tokens": 1.5}, TypeError, "chunk_tokens must be an integer"),
    ({"active_tokens": 0}, ValueError, "active_tokens must be at least 1"),
    ({"active_tokens": 4}, ValueError, "active_tokens must be at least the number of unmasked"),
    ({"accumulate": "bfloat16"}, ValueError, "accumulate must be"),
    ({"accumulate": "weight", "chunk_tokens": 1}, ValueError, "at most 4 chunks, got 5 of 1"),
    ({"low_memory": 1}, TypeError, "low_memory must"),
    ({"return_stats": 1}, TypeError, "return_stats must"),
    ({"reduction": "mean"}, ValueError, "reduction must be"),
    ({"reduction": "seq-mean-token-sum"}, ValueError, "cu_seqlens"),
    ({"ratio_level": "sequence"}, ValueError, "cu_seqlens"),
    ({"kl_coef": 1.0}, ValueError, "ref_logps must be given"),
    ({"objective": "cfpo"}, TypeError, "objective must be"),
    ({"objective": cfpo_kernels.DPPO()}, ValueError, "log_ratio_bounds must be given"),
    ({"backend": "fast"}, ValueError, "backend must be"),
    ({"vocab_parallel": 4}, TypeError, "vocab_parallel must be a VocabParallel"),
    (
        {"support": torch.ones(5).long()},
        ValueError,
        "support must have the shape of token_ids and one",
    ),
    ({"support": torch.ones(5, 2)}, TypeError, "support must be an int64 or int32"),
]


def name_of_change(change: Any) -> str:
    return "-".join(change) if isinstance(change, dict) else ""


@pytest.mark.parametrize(("change", "error", "said"), REFUSED, ids=name_of_change)
def test_bad_input(change: dict[str, Any], error: type[Exception], said: str) -> None:
    case = make(5, idle_every=0)
    arguments: dict[str, Any] = {
        "hidden": case.hidden,
        "weight": case.weight,
        "token_ids": case.token_ids,
        "advantages": case.advantages,
        "old_logps": case.old_logps,
        "objective": CFPO(),
    }
    with pytest.raises(error, match=said):
        cfpo_kernels.linear_policy_loss(**(arguments | change))
    of_scores = ("hidden", "weight", "token_ids", "bias", "lora", "temperature", "logit_scale")
    if set(change) <= set(of_scores):
        scored = {name: arguments[name] for name in ("hidden", "weight", "token_ids")}
        with pytest.raises(error, match=said):
            cfpo_kernels.linear_token_logps(**(scored | change))


@pytest.mark.parametrize("frozen", [(), ("weight",)])
def test_entropies_for_a_log(frozen: tuple[str, ...]) -> None:
    """The same numbers, and the gradients of the log-probs alone."""
    case = make(mask_every=4)
    mask = case.options["mask"]

    def scored(**how: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = case.leaves(frozen)
        logps, entropy = cfpo_kernels.linear_token_logps(
            *(given[name] for name in ("hidden", "weight")),
            case.token_ids,
            mask=mask,
            chunk_tokens=16,
            return_entropy=True,
            **how,
        )
        (logps * torch.linspace(-1, 2, 37)).sum().backward()
        return logps, entropy, given["hidden"].grad

    (logps, entropy, gradient), want = scored(entropy_grad=False), scored()
    assert torch.equal(logps, want[0]) and torch.equal(entropy, want[1]) and entropy.any()
    assert relative(gradient, want[2]) < 1e-6
    assert want[1].requires_grad and not entropy.requires_grad and logps.requires_grad
