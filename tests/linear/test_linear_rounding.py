"""Options of losses from hidden states that trainers' integrations rest on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cfpo_kernels import CFPO, linear_policy_loss, linear_token_logps

N, V, H, CAP, SCALE = 40, 301, 24, 5.0, 0.6


def case(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(N, H, generator=g).to(dtype),
        "weight": torch.randn(V, H, generator=g).to(dtype),
        "bias": torch.randn(V, generator=g).to(dtype),
        "token_ids": torch.randint(0, V, (N,), generator=g),
    }


def capped(z: Tensor, ids: Tensor) -> Tensor:
    y = CAP * torch.tanh(SCALE * z.double() / CAP)
    return torch.log_softmax(y, -1).gather(-1, ids[:, None])[:, 0]


OPTIONS: dict[str, Any] = {"logit_scale": SCALE, "softcap": CAP, "chunk_tokens": 16}


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_rounded_before_the_cap_as_a_head_rounds_them(autocast: bool) -> None:
    """With logits_dtype the product's; without, not at all. The cap is in float32 both times."""
    given = case(torch.float32 if autocast else torch.bfloat16)
    ids = given["token_ids"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = torch.nn.functional.linear(given["hidden"], given["weight"], given["bias"])
        as_rounded = linear_token_logps(**given, **OPTIONS, logits_dtype=torch.bfloat16)
        default = linear_token_logps(**given, **OPTIONS)
    assert z.dtype == torch.bfloat16
    exact = torch.nn.functional.linear(
        *(given[name].bfloat16().double() for name in ("hidden", "weight", "bias"))
    )

    def error(got: Any, want: Tensor) -> Tensor:
        return (got.double() - capped(want, ids)).abs().max()

    assert error(default, exact) < 1e-5
    # An own order of summation can flip the rounding of a logit, whose p is small.
    assert (as_rounded.double() - capped(z, ids)).abs().median() < 1e-4
    assert error(default, z) > 20 * (as_rounded.double() - capped(z, ids)).abs().median()


def test_the_gradient_of_rounded_logits_is_that_of_the_others() -> None:
    given = case()
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        logps = linear_token_logps(
            leaves[0],
            leaves[1],
            given["token_ids"],
            bias=leaves[2],
            logits_dtype=dtype,
            **OPTIONS,
        )
        found.append(torch.autograd.grad(logps.sum(), leaves))
    for rounded, exact in zip(*found, strict=True):
        assert 0 < (rounded - exact).norm() < 2e-2 * exact.norm()


def test_a_dtype_that_is_not_the_products_is_refused() -> None:
    message = r"must be None or, for this head, one of torch\.bfloat16, torch\.float32, got"
    with pytest.raises(ValueError, match=message):
        linear_token_logps(**case(), logits_dtype=torch.float16)


def test_room_for_active_tokens_is_all_that_log_probs_multiply() -> None:
    given = case(torch.float32)
    mask = torch.arange(N) % 3 == 0
    want = linear_token_logps(**given, mask=mask, chunk_tokens=16)
    got = linear_token_logps(**given, mask=mask, chunk_tokens=16, active_tokens=16)
    assert torch.equal(got, want) and got[mask].all()
    with pytest.raises(ValueError, match="active_tokens must be at least the number of unmasked"):
        linear_token_logps(**given, mask=mask, active_tokens=int(mask.sum()) - 1)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1))
    gradients = []
    for room in (None, 14, N):
        leaf = given["weight"].clone().requires_grad_()
        logps = linear_token_logps(
            **given | {"weight": leaf}, mask=mask, chunk_tokens=16, active_tokens=room
        )
        gradients.append(torch.autograd.grad((logps * weights).sum(), leaf)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_scores_and_loss_round_alike() -> None:
    given = case()
    ids = given.pop("token_ids")
    old = linear_token_logps(token_ids=ids, logits_dtype=torch.bfloat16, **given, **OPTIONS)
    how: dict[str, Any] = {"objective": CFPO(), "return_stats": True, **OPTIONS}
    for logits_dtype, same in ((torch.bfloat16, True), (None, False)):
        _, stats = linear_policy_loss(
            token_ids=ids,
            advantages=torch.ones(N),
            old_logps=old,
            logits_dtype=logits_dtype,
            **given,
            **how,
        )
        assert (stats.ratio_max == 1) == same
