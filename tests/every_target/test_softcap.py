"""Logits behind a softcap, y = c tanh(z / c), from the z that the kernels are given.

The kernels are called as the loss from hidden states calls them: below the operators.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import DTYPES, TAIL, Case, logps64, make_case, oracle, with_everything
from stages import (
    Arrived,
    borders,
    check_gradient,
    exact,
    gradient,
    gradient64,
    kernels,
    merge,
    rows_of,
    sums,
    temperatures,
)
from targets import Target
from torch import Tensor

from cfpo_kernels import CFPO, reference
from cfpo_kernels.backends.base import KernelRows, KernelTerms
from cfpo_kernels.inputs import LossSettings, TokenInputs

pytestmark = [
    pytest.mark.not_on("reference", reason="it has no kernels; test_the_reference"),
    pytest.mark.not_on("*-cluster", reason="not for softcaps: test_when_it_is_chosen"),
    pytest.mark.nightly_on("*-transient", reason="softcaps take the row kernel there"),
    pytest.mark.nightly_on("cuda-ptx-*", reason="rows in one block run on every commit"),
    pytest.mark.nightly_on("triton-ptx*", reason="minutes of compilations; interpreted they run"),
]
INTERPRETED = pytest.mark.nightly_on(
    "triton-interpreted", reason="a minute; losses against float64 run on every commit"
)

SOFTCAPS = (4.0, 30.0)  # the logits have a spread of 4.5: some far above 4, none near 30


def capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits.double() / softcap)


def uncapped(case: Case, softcap: float) -> Case:
    """The case with logits for a softcap; some far beyond it, the first of them a target."""
    case.logits = 1.5 * case.logits
    case.logits[0, 0] = 3.0 * softcap
    case.logits[1:, -1] = -20.0 * softcap
    case.token_ids[0] = 0
    case.old_logps = logps64(capped(case.logits, softcap), case.token_ids).float() - 0.1
    return case


def slope(logits: Tensor, softcap: float) -> Tensor:
    return 1 - (capped(logits, softcap) / softcap) ** 2


@INTERPRETED
@pytest.mark.parametrize(("v", "softcap"), [(1, 4.0), (7, 4.0), (1000, 30.0), (20001, 4.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(dtype: torch.dtype, v: int, softcap: float) -> None:
    """Of whole rows and of shards, whose tokens may be elsewhere."""
    case = uncapped(make_case(6, v, dtype, seed=v), softcap)
    ids, t = case.token_ids, temperatures(6)
    ids[:3] = torch.tensor([0, v - 1, v // 2])
    rows = rows_of(case.logits, ids, t, softcap=softcap)
    want = exact(capped(case.logits, softcap), ids, t)
    for with_entropy in (False, True):
        got = sums(rows, with_entropy)
        assert (got.logps <= 0).all()
        torch.testing.assert_close(got.logps.double(), want.logps, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(got.total, want.total, rtol=5e-7, atol=1e-6)
        if with_entropy:
            torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=5e-6, atol=5e-6)
    parts = []
    for first, last in borders(v, 3):
        part = rows._replace(logits=case.logits[:, first:last], token_ids=ids - first)
        parts.append(sums(part._replace(sharded=True)))
    merged = merge(parts, t)
    torch.testing.assert_close(merged.logps, want.logps, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(merged.total, want.total, rtol=5e-7, atol=1e-6)
    torch.testing.assert_close(merged.entropy, want.entropy, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("softcap", [1e-3, 0.7, 30.0, 1e6])
def test_value_of_one_logit(softcap: float) -> None:
    """In float32, to a few units in the last place: from logits that are not touched to those that
    are c. A target in float64.

    With one column T * logsumexp is the logit itself, to what rounds 2^u of it: 1e-6 T.
    """
    c = float(torch.tensor(softcap))
    x = torch.cat([c * 10.0 ** torch.linspace(-6, 2, 33), c * torch.linspace(0.1, 12, 67)])
    x = torch.cat([x, torch.tensor([math.inf, 3e38])])
    x = torch.cat([x, -x, torch.zeros(1)])
    n, t = len(x), torch.full((1,), max(c * 1e-5, 1e-6))
    want = capped(x, c)
    for ids, units in ((torch.full((n,), -1), 12.0), (torch.zeros(n, dtype=torch.int64), 0.5)):
        got = sums(rows_of(x[:, None], ids, t, sharded=True, softcap=c)).total
        # A reference far away: its product with scale, a float32, is the exponent's error.
        allowed = units * 2.0**-24 * want.abs() + 1e-6 * t.double()
        worst = ((got - want).abs() / allowed).max()
        assert worst <= 1, f"{worst * units:.2f} units"


@INTERPRETED
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("v", "softcap"), [(1, 4.0), (7, 4.0), (1000, 30.0), (20001, 4.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_log_probs(dtype: torch.dtype, v: int, softcap: float, inplace: bool) -> None:
    g = torch.Generator().manual_seed(v)
    case = uncapped(make_case(6, v, dtype, seed=v), softcap)
    ids, t = case.token_ids, temperatures(6)
    ids[:3] = torch.tensor([0, v - 1, v // 2])
    rows = rows_of(case.logits, ids, t, softcap=softcap)
    known = sums(rows)
    for dentropy in (None, torch.randn(6, generator=g)):
        arrived = Arrived(known.lse, known.entropy, torch.randn(6, generator=g), dentropy)
        got = gradient(rows, arrived, inplace)
        check_gradient(got, case.logits, ids, t, arrived, softcap)
        parts = []
        for first, last in borders(v, 3):
            part = rows._replace(logits=case.logits[:, first:last], token_ids=ids - first)
            parts.append(gradient(part._replace(sharded=True), arrived, inplace))
        assert torch.equal(torch.cat(parts, 1), got)


def policy_gradient(
    rows: KernelRows, case: Case, inplace: bool = False, old_logps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """And the log-probs."""
    options = case.options
    inputs = TokenInputs(
        case.advantages,
        case.old_logps if old_logps is None else old_logps,
        options.get("token_weights"),
        options.get("ref_logps"),
    )
    settings = LossSettings(
        CFPO().shape(),
        kl_coef=options.get("kl_coef", 0.0),
        entropy_coef=options.get("entropy_coef", 0.0),
    )
    n = len(case.token_ids)
    loss, logps, entropy = (torch.full((n,), 7.0) for _ in range(3))
    if inplace:
        rows = rows._replace(logits=rows.logits.clone())
    dlogits = rows.logits if inplace else torch.full_like(rows.logits, 7.0)
    kernels(rows.logits).policy_loss(
        rows,
        KernelTerms(inputs, settings, None),
        loss=loss,
        logps=logps,
        entropy=entropy if options.get("entropy_coef") else None,
        dlogits=dlogits,
    )
    return dlogits, logps


@INTERPRETED
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("v", [1, 7, 1000, 20001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_loss(dtype: torch.dtype, v: int, everything: bool, inplace: bool) -> None:
    """What the kernels give for the capped logits, which others compare with float64, times the
    slope; and rounded once."""
    for softcap in SOFTCAPS if v == 7 else SOFTCAPS[:1]:
        case = uncapped(make_case(8, v, dtype, seed=v), softcap)
        logits, case.logits = case.logits, capped(case.logits, softcap)
        if everything:
            case = with_everything(case)
        temperature = case.options.get("temperature", torch.ones(1))
        rows = rows_of(logits, case.token_ids, temperature)
        rows.weights[5] = 0.0
        known = rows._replace(logits=case.logits.float())
        free, want_logps = policy_gradient(known, case)
        got, logps = policy_gradient(rows._replace(softcap=softcap), case, inplace)
        assert got.dtype == dtype and not got[5].any() and (got[:, -TAIL:].any() or v == 1)
        torch.testing.assert_close(logps, want_logps, rtol=2e-6, atol=2e-6)
        free = free.double()
        want = free * slope(logits, softcap)
        ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        tiny = 6e-8 if dtype == torch.float16 else 1e-15
        # The coefficient of a row changes with the rounding of its log p.
        p = torch.softmax(case.logits / temperature.double()[:, None], -1)
        p = p.scatter(1, case.token_ids[:, None], 1.0)
        allowed = (2e-5 + ulp) * want.abs() + 1e-6 * free.abs() + 1e-5 * p + tiny
        worst = ((got.double() - want).abs() / allowed).max()
        assert worst <= 1, f"{worst:.2f} times the allowed error"


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_a_loss_against_float64(softcap: float) -> None:
    case = uncapped(make_case(8, 1000, reduction="none"), softcap)
    case.old_logps = None
    rows = rows_of(case.logits, case.token_ids, torch.ones(1), softcap=softcap)
    got, _ = policy_gradient(rows, case)
    case.logits = capped(case.logits, softcap)
    want = oracle(case).dlogits * slope(rows.logits, softcap)
    error = (got.double() - want).norm(dim=-1)
    assert (error <= 1e-5 * want.norm(dim=-1) + 1e-12).all()


@pytest.mark.parametrize("v", [7, 20001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_scored_has_a_ratio_of_1(dtype: torch.dtype, v: int) -> None:
    case = uncapped(make_case(8, v, dtype), 4.0)
    rows = rows_of(case.logits, case.token_ids, torch.ones(1), softcap=4.0)
    scored = sums(rows, with_entropy=False).logps.float()
    on_policy, logps = policy_gradient(rows, case, old_logps=scored)
    assert torch.equal(logps, scored) and (scored <= 0).all()
    case.old_logps = None
    assert torch.equal(policy_gradient(rows, case)[0], on_policy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_numbers_that_are_none(dtype: torch.dtype) -> None:
    """An infinity is +-c: no ban. A NaN spoils its row, and a masked row is not read."""
    for v in (1, 7, 1000, 20001):
        case = uncapped(make_case(7, v, dtype), 4.0)
        ids = case.token_ids
        ids[:] = torch.arange(7) % v
        ids[5:] = v - 1
        for row, fill in enumerate((-math.inf, torch.finfo(dtype).min, math.inf)):
            case.logits[row, v // 2 :] = fill
        case.logits[3, v // 3] = math.nan
        case.logits[4] = math.nan
        case.logits[5, -1] = -math.inf  # targets
        case.logits[6, -1] = math.inf
        rows = rows_of(case.logits, ids, torch.ones(1), softcap=4.0)
        rows.weights[4] = 0.0
        good = torch.tensor([0, 1, 2, 5, 6])
        got = sums(rows)
        want = exact(capped(case.logits[good], 4.0), ids[good], torch.ones(1))
        for name in ("logps", "total", "entropy"):
            x = getattr(got, name)
            torch.testing.assert_close(x[good].double(), getattr(want, name), rtol=5e-6, atol=5e-6)
            assert x[3].isnan() and x[4] == 0
        case.old_logps = None
        dlogits, _ = policy_gradient(rows, case)
        assert dlogits[3].isnan().all() and not dlogits[4].any()
        assert dlogits[good].isfinite().all()
        # Where a logit is +-c it has no gradient; in float32 up to the slope's rounding.
        flat = dlogits[:3, v // 2 :].double().abs()
        assert (flat <= 1e-6).all()


@INTERPRETED
@pytest.mark.parametrize("v", [1000, 20001])
def test_entropy_of_confident_rows(v: int) -> None:
    """Of a token that is not the target: its element is left out of sums, and written apart."""
    case = make_case(4, v)
    case.logits[:, 3] = torch.tensor([20.0, 25.0, 35.0, 300.0])
    ids, t = torch.tensor([0, v - 1, 4, 3]), torch.ones(1)
    rows = rows_of(case.logits, ids, t, softcap=30.0)
    got, want = sums(rows), exact(capped(case.logits, 30.0), ids, t)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=3e-5, atol=0)
    arrived = Arrived(got.lse, got.entropy, torch.zeros(4), torch.ones(4))
    found = gradient(rows, arrived).double()[:, 3]
    exactly = gradient64(case.logits, ids, t, arrived, 30.0)[:, 3]
    free = gradient64(capped(case.logits, 30.0), ids, t, arrived)[:, 3]
    assert ((found - exactly).abs() <= 3e-5 * exactly.abs() + 1e-6 * free.abs()).all()


def test_a_cap_that_is_far_away_changes_nothing() -> None:
    case = make_case(6, 1000)
    rows = rows_of(case.logits, case.token_ids, torch.ones(1))
    for x, y in zip(sums(rows), sums(rows._replace(softcap=1e6)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    found = [policy_gradient(rows._replace(softcap=c), case)[0] for c in (0.0, 1e6)]
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=1e-12)


def test_a_row_has_the_same_bits_alone(target: Target) -> None:
    """Also where several threads or blocks share it."""
    case = uncapped(make_case(target.unsplit, 40001), 4.0)
    ids, t = case.token_ids, temperatures(target.unsplit)
    rows = rows_of(case.logits, ids, t, softcap=4.0)
    want = sums(rows)
    arrived = Arrived(want.lse, want.entropy, t, -t)
    dlogits = gradient(rows, arrived)
    for i in (0, 3):
        alone = rows_of(*(x[i : i + 1] for x in (case.logits, ids, t)), softcap=4.0)
        for x, y in zip(sums(alone), want, strict=True):
            assert torch.equal(x, y[i : i + 1])
        its = Arrived(*(x[i : i + 1] for x in arrived if x is not None))
        assert torch.equal(gradient(alone, its), dlogits[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference(dtype: torch.dtype) -> None:
    """In plain torch; a masked row's gradient is 0."""
    case = uncapped(make_case(6, 101, dtype), 4.0)
    case.logits[:, 50] = -math.inf
    case.logits[3] = math.nan
    active = torch.arange(6) != 3
    found = []
    for softcap in (4.0, 0.0):
        leaf = case.logits.clone() if softcap else capped(case.logits, 4.0)
        leaf.requires_grad_()
        logps, entropy, _ = reference.token_logps(
            leaf, case.token_ids, active, temperatures(6), True, False, softcap=softcap
        )
        (logps + 0.3 * entropy)[active].sum().backward()
        found.append((logps.detach().double(), entropy.detach().double(), leaf.grad))
    (logps, entropy, got), (plain_logps, plain_entropy, free) = found
    torch.testing.assert_close(logps, plain_logps, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy, plain_entropy, rtol=2e-6, atol=2e-6)
    want = torch.where(active[:, None], free * slope(case.logits, 4.0), 0.0)
    assert not got[3].any() and not got[:, 50].any() and got[0].any()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
