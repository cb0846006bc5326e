"""Small heads, and their losses twice: from hidden states, and from whole logits in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from oracle import boundary_deltas
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import CFPO
from cfpo_kernels.linear import batch, head, products, scores, support

NAMES = ("hidden", "weight", "bias", "u", "lora")
OF_HEAD = ("logit_scale", "softcap")  # what a loss from logits knows nothing of
OF_TILES = ("chunk_tokens", "low_memory", "accumulate", "logits_dtype", "active_tokens")


@dataclass
class HeadCase:
    """hidden (N, H), weight (V, H), bias (V,), u (N, r), lora (V, r); of tokens (N,)."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    advantages: Tensor
    old_logps: Tensor | None
    bias: Tensor | None = None
    u: Tensor | None = None
    lora: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self, frozen: tuple[str, ...] = (), dtype: torch.dtype | None = None) -> Leaves:
        found: dict[str, Tensor] = {}
        for name in NAMES:
            if (x := getattr(self, name)) is not None:
                x = x.detach().clone() if dtype is None else x.detach().to(dtype, copy=True)
                found[name] = x.requires_grad_(name not in frozen)
        return found


Leaves = dict[str, Tensor]


def regularizers(case: HeadCase, g: torch.Generator) -> dict[str, Any]:
    """Options: a KL term, a bonus, weights of tokens."""
    assert case.old_logps is not None
    n = len(case.token_ids)
    return {
        "ref_logps": case.old_logps + 0.3 * torch.randn(n, generator=g),
        "token_weights": 0.5 + torch.rand(n, generator=g),
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
    }


@dataclass
class Found:
    """What a call gave: detached, gradients by the names of the parameters."""

    loss: Tensor
    stats: cfpo_kernels.CFPOStats | None
    gradients: dict[str, Tensor]


def make(
    n: int = 37,
    v: int = 203,
    h: int = 16,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    spread: float = 2.0,
    bias: bool = False,
    rank: int = 0,
    mask_every: int = 0,
    idle_every: int = 5,
    **options: Any,
) -> HeadCase:
    """Log-ratios on all sides of the boundaries; each `idle_every`-th token has no advantage."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    case = HeadCase(
        random(n, h),
        random(v, h, scale=spread / h**0.5),
        torch.randint(0, v, (n,), generator=g),
        torch.randn(n, generator=g),
        None,
        random(v, scale=0.5) if bias else None,
        random(n, rank, scale=0.3) if rank else None,
        random(v, rank, scale=0.5) if rank else None,
        options,
    )
    if idle_every:
        case.advantages[3::idle_every] = 0.0
    # Not on the boundaries: there the rounding of logits decides.
    deltas = torch.tensor(boundary_deltas())[torch.arange(n) % len(boundary_deltas())] + 0.013
    case.old_logps = (logps64(case) - deltas).float()
    if mask_every:
        case.options["mask"] = torch.arange(n) % mask_every != 0
    return case


def logits_of(given: Leaves, options: dict[str, Any]) -> Tensor:
    """Whole, as a model would write them."""
    logits = given["hidden"] @ given["weight"].T
    if "bias" in given:
        logits = logits + given["bias"]
    if "u" in given:
        logits = logits + given["u"] @ given["lora"].T
    logits = logits * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logps64(case: HeadCase) -> Tensor:
    temperature = case.options.get("temperature", 1.0)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature[..., None].double()
    logits = logits_of(case.leaves(dtype=torch.float64), case.options).detach()
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(-1, case.token_ids.long()[..., None]).squeeze(-1)


def head_arguments(given: Leaves) -> dict[str, Any]:
    lora = (given["u"], given["lora"]) if "u" in given else None
    return {"bias": given.get("bias"), "lora": lora}


def finish(result: Any, given: Leaves, stats: bool, upstream: Tensor | float = 1.0) -> Found:
    loss, found = result if stats else (result, None)
    if loss.requires_grad:
        (loss * upstream).sum().backward()
    leaves = {name: x for name, x in given.items() if x.is_leaf}
    gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return Found(loss.detach(), found, gradients)


def linear(
    case: HeadCase,
    *,
    frozen: tuple[str, ...] = (),
    stats: bool = False,
    upstream: Tensor | float = 1.0,
    leaves: Leaves | None = None,
    **extra: Any,
) -> Found:
    """From hidden states."""
    given = case.leaves(frozen) if leaves is None else leaves
    options = {"objective": CFPO()} | case.options | extra
    result = cfpo_kernels.linear_policy_loss(
        given["hidden"],
        given["weight"],
        case.token_ids,
        case.advantages,
        case.old_logps,
        return_stats=stats,
        **head_arguments(given),
        **options,
    )
    return finish(result, given, stats, upstream)


def whole(
    case: HeadCase,
    dtype: torch.dtype = torch.float64,
    *,
    frozen: tuple[str, ...] = (),
    stats: bool = True,
    upstream: Tensor | float = 1.0,
    **extra: Any,
) -> Found:
    """From whole logits: plain torch in float64, the kernels otherwise."""
    given = case.leaves(frozen, dtype)
    options = {"objective": CFPO()} | case.options | extra
    backend = "reference" if dtype == torch.float64 else "auto"
    result = cfpo_kernels.policy_loss(
        logits_of(given, options),
        case.token_ids,
        case.advantages,
        case.old_logps,
        backend=backend,
        return_stats=stats,
        **{name: x for name, x in options.items() if name not in OF_HEAD + OF_TILES},
    )
    return finish(result, given, stats, upstream)


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def check(got: Found, want: Found, tolerance: float = 3e-6) -> None:
    """Norms of whole gradients, and of each of their rows."""
    assert got.loss.shape == want.loss.shape
    scale = want.loss.double().abs().max().clamp(min=1.0) if want.loss.numel() else 1.0
    error = (got.loss.double() - want.loss.double()).abs()
    assert (error <= 3 * tolerance * scale).all(), f"loss: {error.max()}"
    assert got.gradients.keys() == want.gradients.keys()
    for name, exact in want.gradients.items():
        found = got.gradients[name]
        assert found.shape == exact.shape
        error_of_all = relative(found, exact)
        assert error_of_all <= tolerance, f"gradient of {name}: {error_of_all}"
        if exact.numel() == 0 or exact.dim() < 2:
            continue
        # Rows that are nearly 0 are differences of larger numbers.
        exact, found = (x.double().reshape(-1, x.shape[-1]) for x in (exact, found))
        norms = exact.norm(dim=-1)
        worst = ((found - exact).norm(dim=-1) / (norms + 0.02 * norms.max() + 1e-30)).max()
        assert worst <= 10 * tolerance, f"a row of the gradient of {name}: {worst}"
    if got.stats is not None and want.stats is not None:
        for name, expected in want.stats._asdict().items():
            torch.testing.assert_close(
                getattr(got.stats, name),
                expected.float(),
                rtol=10 * tolerance,
                atol=10 * tolerance,
                equal_nan=True,
                msg=lambda said, name=name: f"stats.{name}: {said}",
            )


def split(case: HeadCase, *shape: int) -> HeadCase:
    """With tokens of this shape, such as (B, T)."""

    def shaped(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        return x.reshape((*shape, *x.shape[1:]))

    return replace(
        case,
        hidden=shaped(case.hidden),
        u=shaped(case.u),
        token_ids=shaped(case.token_ids),
        advantages=shaped(case.advantages),
        old_logps=shaped(case.old_logps),
        options={name: shaped(x) for name, x in case.options.items()},
    )


@contextmanager
def planted(target: object, name: str, mistake: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, mistake)
        yield


def is_noticed(check_again: Callable[[], object]) -> None:
    """A check of this suite fails, with a mistake in place."""
    with pytest.raises(AssertionError):
        check_again()


def use_slices(patch: pytest.MonkeyPatch, columns: int) -> None:
    """The vocabulary in slices of so many columns, which a small one does not fill otherwise."""
    for module in (batch, head, scores):
        patch.setattr(module, "SLICE", columns)


def pretend_speed(patch: pytest.MonkeyPatch, fast: bool) -> None:
    """A CPU with instructions for low precision, or without: its products are right either way."""
    for module in (products, support):
        patch.setattr(module, "is_fast", lambda dtype, device: fast or dtype == torch.float32)
