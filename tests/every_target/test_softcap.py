"""Gradients through a softcap y = c tanh(z / c), from the logits y that the kernels are given.

The kernels are called as the loss from hidden states calls them: below the operators.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import DTYPES, Case, logps64, make_case, oracle, with_everything
from stages import (
    Arrived,
    borders,
    check_gradient,
    gradient,
    kernels,
    rows_of,
    sums,
    temperatures,
)
from torch import Tensor

from cfpo_kernels import CFPO, reference
from cfpo_kernels.backends.base import KernelRows, KernelTerms
from cfpo_kernels.inputs import LossSettings, TokenInputs

pytestmark = pytest.mark.not_on("reference", reason="it has no kernels; test_the_reference")

SOFTCAPS = (4.0, 30.0)  # the logits have a spread of 3: some near 4, none near 30


def capped(case: Case, softcap: float) -> Case:
    """The case with logits that have been through the softcap; the first column to its very end."""
    z = 1.5 * case.logits.double()
    case.logits = (softcap * torch.tanh(z / softcap)).to(case.logits.dtype)
    case.logits[0, 0] = softcap
    case.token_ids[0] = 0
    case.old_logps = logps64(case.logits, case.token_ids).float() - 0.1
    return case


def slope(y: Tensor, softcap: float) -> Tensor:
    return 1 - (y.double() / softcap) ** 2


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("v", "softcap"), [(1, 4.0), (7, 4.0), (1000, 30.0), (20001, 4.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_log_probs(dtype: torch.dtype, v: int, softcap: float, inplace: bool) -> None:
    g = torch.Generator().manual_seed(v)
    case = capped(make_case(6, v, dtype, seed=v), softcap)
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


def policy_gradient(rows: KernelRows, case: Case, inplace: bool = False) -> Tensor:
    options = case.options
    inputs = TokenInputs(
        case.advantages, case.old_logps, options.get("token_weights"), options.get("ref_logps")
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
    return dlogits


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("v", [1, 7, 1000, 20001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_loss(dtype: torch.dtype, v: int, everything: bool, inplace: bool) -> None:
    """What the kernels give without a softcap, which others compare with float64, times the slope;
    and rounded once."""
    for softcap in SOFTCAPS if v == 7 else SOFTCAPS[:1]:
        case = capped(make_case(8, v, dtype, seed=v), softcap)
        if everything:
            case = with_everything(case)
        temperature = case.options.get("temperature", torch.ones(1))
        rows = rows_of(case.logits, case.token_ids, temperature)
        rows.weights[5] = 0.0
        free = policy_gradient(rows._replace(logits=case.logits.float()), case).double()
        got = policy_gradient(rows._replace(softcap=softcap), case, inplace)
        assert got.dtype == dtype and not got[5].any() and (got.any() or v == 1)
        want = free * slope(case.logits, softcap)
        ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        tiny = 6e-8 if dtype == torch.float16 else 1e-15
        allowed = (1e-5 + ulp) * want.abs() + 5e-7 * free.abs() + tiny
        worst = ((got.double() - want).abs() / allowed).max()
        assert worst <= 1, f"{worst:.2f} times the allowed error"


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_a_loss_against_float64(softcap: float) -> None:
    case = capped(make_case(8, 1000, reduction="none"), softcap)
    case.old_logps = None
    want = oracle(case).dlogits * slope(case.logits, softcap)
    rows = rows_of(case.logits, case.token_ids, torch.ones(1), softcap=softcap)
    error = (policy_gradient(rows, case).double() - want).norm(dim=-1)
    assert (error <= 1e-5 * want.norm(dim=-1) + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bans_and_numbers_that_are_none(dtype: torch.dtype) -> None:
    for v in (7, 1000, 20001):
        for fill in (-math.inf, torch.finfo(dtype).min):
            case = capped(make_case(5, v, dtype), 4.0)
            case.old_logps = None
            banned = torch.arange(v) % 3 == 1
            case.token_ids[:] = 0
            case.logits[:, banned] = fill
            case.logits[2, v - 1] = math.nan
            rows = rows_of(case.logits, case.token_ids, torch.ones(1), softcap=4.0)
            got = policy_gradient(rows, case)
            assert got[2].isnan().all()
            others = got[[0, 1, 3, 4]]
            assert others.isfinite().all() and not others[:, banned].any() and others.any()


def test_nothing_else_depends_on_it() -> None:
    case = capped(make_case(6, 1000), 4.0)
    rows = rows_of(case.logits, case.token_ids, torch.ones(1))
    for x, y in zip(sums(rows), sums(rows._replace(softcap=4.0)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference(dtype: torch.dtype) -> None:
    """Of capped logits in plain torch; masked rows and bans are zeros."""
    case = capped(make_case(6, 101, dtype), 4.0)
    case.logits[:, 50] = -math.inf
    case.logits[3] = math.nan
    active = torch.arange(6) != 3
    found = []
    for softcap in (4.0, 0.0):
        leaf = case.logits.clone().requires_grad_()
        logps, entropy, _ = reference.token_logps(
            leaf, case.token_ids, active, temperatures(6), True, False, softcap=softcap
        )
        (logps + 0.3 * entropy)[active].sum().backward()
        found.append((logps.detach(), entropy.detach(), leaf.grad))
    (logps, entropy, got), (plain_logps, plain_entropy, free) = found
    assert torch.equal(logps, plain_logps) and torch.equal(entropy, plain_entropy)
    want = torch.where(free == 0, 0.0, free.double() * slope(case.logits, 4.0))
    assert not got[3].any() and not got[:, 50].any() and got[0].any()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
