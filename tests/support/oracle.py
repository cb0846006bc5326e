"""Float64 autograd on the same rounded inputs, and comparisons that a broken kernel fails.

The loss is written here a second time, as naively as possible, so that a mistake in the package's
reference cannot hide in its own tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from naive_objectives import naive_policy
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import CFPO
from cfpo_kernels.objectives import Objective

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE_V = (50257, 50280, 128256, 151936, 262144)
SMALL_V = (1, 2, 7, 1000, 4096, 32000)


@dataclass
class Case:
    """Inputs of a policy loss. logits: (..., V); per-token tensors: (...)."""

    logits: Tensor
    token_ids: Tensor
    advantages: Tensor
    old_logps: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)
    objective: Objective = field(default_factory=CFPO)

    def mask(self) -> Tensor:
        mask = self.options.get("mask")
        shape = self.logits.shape[:-1]
        return torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0


@dataclass
class Outcome:
    loss: Tensor
    dlogits: Tensor
    logps: Tensor
    entropy: Tensor


def assert_same(got: Outcome, want: Outcome) -> None:
    """Bit by bit."""
    for name in ("loss", "dlogits", "logps", "entropy"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def logps64(logits: Tensor, token_ids: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    scaled = logits.double() / (
        temperature[..., None].double() if isinstance(temperature, Tensor) else temperature
    )
    return torch.log_softmax(scaled, -1).gather(-1, token_ids[..., None].long()).squeeze(-1)


def boundary_deltas(epsilon: float = 0.2) -> list[float]:
    """log r below, inside, above and exactly on every boundary, and 0."""
    edges = [math.log(1 - epsilon), math.log(1 + epsilon)]
    return [0.0, *edges, 0.05, -0.05, -0.15, 0.1, 0.3, -0.4, 1.5, -2.0, 1e-4]


def make_case(
    n: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    spread: float = 2.0,
    offset: float = 0.0,
    peak: float | None = None,
    mask_every: int = 0,
    **options: Any,
) -> Case:
    """`peak`: make the target's probability about this. `mask_every`: mask each k-th token."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=g) * spread
    token_ids = torch.randint(0, v, (n,), generator=g)
    if peak is not None and v > 1:
        logits.scatter_(1, token_ids[:, None], -math.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        logits.scatter_(1, token_ids[:, None], lse + math.log(peak / (1 - peak)))
    logits = (logits + offset).to(dtype)
    deltas = torch.tensor(boundary_deltas())[torch.arange(n) % len(boundary_deltas())]
    advantages = torch.randn(n, generator=g)
    advantages[3::7] = 0.0
    temperature = options.get("temperature", 1.0)
    old_logps = (logps64(logits, token_ids, temperature) - deltas).float()
    if mask_every:
        options["mask"] = torch.arange(n) % mask_every != 0
    objective = options.pop("objective", CFPO())
    return Case(logits, token_ids, advantages, old_logps, options, objective)


def peak_over_a_flat_tail(v: int, dtype: torch.dtype, top: float, below: float) -> Case:
    """One early peak, and a tail so low and equal that all of its sums round the same way."""
    logits = torch.full((2, v), top - below)
    logits[:, 5] = top
    logits[0, -1] = top - 3
    return Case(logits.to(dtype), torch.tensor([v - 1, 5]), torch.ones(2), None)


def with_everything(case: Case, seed: int = 1) -> Case:
    """Adds a KL term, an entropy bonus, token weights and a temperature a row."""
    g = torch.Generator().manual_seed(seed)
    shape = case.token_ids.shape
    temperature = 0.7 + 0.6 * torch.rand(shape, generator=g)
    moved = logps64(case.logits, case.token_ids, temperature)
    shift = 0.3 * torch.randn(shape, generator=g)
    case.old_logps = (moved - shift).float()
    case.options |= {
        "temperature": temperature,
        "ref_logps": (moved + 0.2 * torch.randn(shape, generator=g)).float(),
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
        "token_weights": 0.5 + torch.rand(shape, generator=g),
    }
    return case


def naive_kl(estimator: str, logps: Tensor, ref: Tensor) -> Tensor:
    d = ref - logps
    if estimator.endswith("+"):  # straight through: another's gradient
        value, slope = naive_kl(estimator[:-1], logps, ref), naive_kl("k2", logps, ref)
        return value.detach() + slope - slope.detach()
    return {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[estimator]


def naive_weights(case: Case) -> Tensor:
    """Written with loops over sequences, unlike weights.py."""
    mask = case.mask().double()
    reduction = case.options.get("reduction", "token-mean")
    normalizer = case.options.get("normalizer")
    if reduction in ("sum", "none"):
        return mask / (1 if normalizer is None else float(normalizer))
    if reduction == "token-mean":
        return mask / (mask.sum() if normalizer is None else float(normalizer))
    if (bounds := case.options.get("cu_seqlens")) is not None:
        pairs = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        sequences = [slice(begin, end) for begin, end in pairs]
        flat = mask.clone()
    else:
        length = mask.shape[-1]
        flat = mask.reshape(-1).clone()
        sequences = [slice(i, i + length) for i in range(0, flat.numel(), length)]
    counted = sum(1 for s in sequences if flat[s].sum() > 0)
    for s in sequences:
        if reduction == "seq-mean-token-mean" and flat[s].sum() > 0:
            flat[s] /= flat[s].sum().clone()
    return (flat / (counted if normalizer is None else float(normalizer))).reshape(mask.shape)


def oracle(case: Case) -> Outcome:
    """Float64 loss and gradient; masked rows take no part. Loss of shape (...) for "none"."""
    options, mask = case.options, case.mask()
    leaf = case.logits.detach().double().requires_grad_()
    rows = torch.where(mask[..., None], leaf, 0.0)
    temperature = options.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.double()[..., None]
    log_p = torch.log_softmax(rows / temperature, -1)
    logps = log_p.gather(-1, torch.where(mask, case.token_ids, 0)[..., None].long()).squeeze(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e300)).sum(-1)

    def given(x: Tensor) -> Tensor:
        return torch.where(mask, x.double(), 0.0)

    advantages = case.advantages
    if advantages.dim() < case.token_ids.dim():
        advantages = advantages[:, None].expand(case.token_ids.shape)
    advantages = given(advantages.expand(case.token_ids.shape))
    old = logps.detach() if case.old_logps is None else given(case.old_logps)
    bounds = options.get("log_ratio_bounds")
    if bounds is not None:
        low, high = (torch.as_tensor(bound).expand(mask.shape) for bound in bounds)
        bounds = given(low), given(high)
    loss = naive_policy(case.objective, logps, logps - old, advantages, bounds)
    if "token_weights" in options:
        loss = loss * given(options["token_weights"])
    if options.get("kl_coef"):
        estimator = options.get("kl_estimator", "k3")
        kl = naive_kl(estimator, logps, given(options["ref_logps"]))
        if options.get("kl_ratio_weighted"):
            kl = kl * (logps - old).exp()
        loss = loss + options["kl_coef"] * kl
    loss = loss - options.get("entropy_coef", 0.0) * entropy
    weighted = naive_weights(case) * torch.where(mask, loss, 0.0)
    weighted.sum().backward()
    assert leaf.grad is not None
    final = weighted if options.get("reduction") == "none" else weighted.sum()
    zero = torch.zeros_like(logps)
    return Outcome(
        final.detach(),
        leaf.grad,
        torch.where(mask, logps, zero).detach(),
        torch.where(mask, entropy, zero).detach(),
    )


def run(
    case: Case, *, backend: str = "cpu", inplace: bool = False, device: str = "cpu", **extra: Any
) -> Outcome:
    """The package on a fresh copy of the case's logits, laid out as they are; results on the CPU.

    On a GPU a new gradient is likely to be the poisoned memory that was freed just before.
    """
    base = case.logits.detach()
    storage = torch.empty(base.untyped_storage().nbytes(), dtype=torch.uint8, device=device)
    storage.untyped_storage().copy_(base.untyped_storage())
    logits = storage.view(base.dtype).as_strided(base.shape, base.stride(), base.storage_offset())
    logits = logits.detach().requires_grad_()

    def there(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    if device != "cpu":
        torch.full_like(logits, torch.nan)
    loss, stats = cfpo_kernels.policy_loss(
        logits,
        there(case.token_ids),
        there(case.advantages),
        there(case.old_logps),
        objective=case.objective,
        backend=backend,
        inplace=inplace,
        return_stats=True,
        **{name: there(x) for name, x in (case.options | extra).items()},
    )
    loss.sum().backward()
    return Outcome(loss.detach().cpu(), logits.grad.cpu(), stats.logps.cpu(), stats.entropy.cpu())


def rounding_error(x: Tensor, dtype: torch.dtype) -> Tensor:
    """||round(x) - x|| of each row."""
    return (x.to(dtype).double() - x).norm(dim=-1)


def steepness(case: Case) -> Tensor:
    """The width on which c changes by as much as the advantage, of each token; (...)."""
    low, high = case.objective.trust_region() or (-math.inf, math.inf)
    if isinstance(case.objective, CFPO) and "log_ratio_bounds" in case.options:
        low, high = case.options["log_ratio_bounds"]
    ends = (1 - torch.as_tensor(low).double().exp(), torch.as_tensor(high).double().exp() - 1)
    return torch.minimum(*ends).expand(case.token_ids.shape).clamp(max=1.0)


TAIL = 8
SMALLEST = 1e-36  # kernels flush what is subnormal in float32


def check_gradient(got: Tensor, want: Tensor, case: Case, relative: float = 1e-5) -> None:
    """Target column and off-target columns apart, the latter by relative error of each row."""
    dtype, mask = case.logits.dtype, case.mask()
    assert got.dtype == dtype and got.shape == case.logits.shape
    assert not got[~mask].view(torch.int16 if dtype != torch.float32 else torch.int32).any(), (
        "a masked row's gradient is not bitwise zero"
    )
    got, want = got[mask].double(), want[mask]
    ids = case.token_ids[mask].long()[:, None]
    target_got, target_want = got.gather(1, ids), want.gather(1, ids)
    off_got, off_want = got.scatter(1, ids, 0.0), want.scatter(1, ids, 0.0)
    assert torch.isfinite(got).all(), "the gradient is not finite"

    # Near its optimum c is small, but still changes by about |A| / epsilon times the 6e-7 to which
    # float32 sums give log p. So this is the least that errors are measured against.
    weight = naive_weights(case)[mask].abs()
    shape = case.token_ids.shape
    advantages = (
        case.advantages.expand(shape)
        if case.advantages.dim() == len(shape)
        else (case.advantages[:, None].expand(shape))
    )
    p_off = torch.softmax(case.logits[mask].double(), -1).scatter(1, ids, 0.0)
    width = steepness(case)[mask]
    temperature = case.options.get("temperature", 1.0)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature[mask].double()
    slope = advantages[mask].double().abs() / width
    for name in ("kl_coef", "entropy_coef"):  # where A is 0, these terms may cancel each other
        slope = slope + abs(case.options.get(name, 0.0))
    floor = 0.1 * weight * slope / temperature
    # Most of a row's norm is in a few columns, so the end is looked at by itself: where a kernel's
    # last, narrower piece is. There no average over columns makes errors smaller.
    for columns, of, factor in (
        (slice(None), "", 1.0),
        (slice(-TAIL, None), " of the last columns", 4.0),
    ):
        exact = off_want[:, columns]
        scale = torch.maximum(exact.norm(dim=-1), floor * p_off[:, columns].norm(dim=-1))
        error = (off_got[:, columns] - exact).norm(dim=-1)
        allowed = factor * relative * scale
        if columns.start is not None:
            allowed = allowed + SMALLEST
        if dtype != torch.float32:
            allowed = allowed + 1.1 * rounding_error(exact, dtype)
        worst = (error / allowed.clamp_min(1e-300)).max() if len(error) else torch.tensor(0.0)
        assert (error <= allowed).all(), (
            f"off-target gradient{of}: {worst:.2f} times the allowed error"
        )

    target_error = (target_got - target_want).abs().squeeze(1)
    target_scale = torch.maximum(target_want.abs().squeeze(1), floor * p_off.sum(-1))
    ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype] + relative
    tiny = 6e-8 if dtype == torch.float16 else 1e-12
    worst = (target_error / (ulp * target_scale + tiny)).max() if len(error) else 0.0
    assert (target_error <= ulp * target_scale + tiny).all(), (
        f"target gradient: {worst:.2f} times the allowed error"
    )
    if not case.options.get("entropy_coef") and len(got):
        # The exact gradient sums to zero; what is left is the rounding of each element.
        bound = ulp * got.abs().sum(-1)
        assert (got.sum(-1).abs() <= bound + want.shape[-1] * tiny).all(), (
            "a row's gradient does not sum to 0"
        )


def check_values(got: Outcome, want: Outcome, relative: float = 1e-5) -> None:
    scale = want.logps.abs().max().clamp_min(1.0) if want.logps.numel() else 1.0
    assert (got.logps.double() - want.logps).abs().max() <= 0.1 * relative * scale, "logps"
    assert (got.entropy.double() - want.entropy).abs().max() <= 0.3 * relative * scale, "entropy"
    # Terms of either sign cancel in the loss; its error is that of the terms. d loss / d logp is
    # up to |A| r |r - 1| / epsilon, and logp is known to 1e-6.
    loss_scale = want.loss.abs().max().clamp_min(1.0)
    assert (got.loss.double() - want.loss).abs().max() <= relative * loss_scale, "loss"


RELATIVE = 1e-5
# What torch's own float32 log_softmax over 262144 columns leaves.
REFERENCE_RELATIVE = 3e-4


def check(case: Case, *, backend: str = "cpu", **how: Any) -> Outcome:
    """Runs the case and compares everything with the oracle; returns what was got."""
    got, want = run(case, backend=backend, **how), oracle(case)
    relative = REFERENCE_RELATIVE if backend == "reference" else RELATIVE
    check_gradient(got.dlogits, want.dlogits, case, relative)
    check_values(got, want, relative)
    return got


def token_logps64(
    logits: torch.Tensor, ids: torch.Tensor, temperature: object, dlogps: object, dentropy: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leaf = logits.detach().double().requires_grad_()
    scaled = leaf / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = torch.log_softmax(scaled, -1)
    logps = log_p.gather(-1, ids[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    (logps * dlogps + entropy * dentropy).sum().backward()
    return logps.detach(), entropy.detach(), leaf.grad


def check_token_logps(dtype: torch.dtype, v: int, *, inplace: bool) -> None:
    """Log-probs, entropies and the gradient of both."""
    n = 5
    case = make_case(n, v, dtype, seed=v)
    g = torch.Generator().manual_seed(1)
    dlogps, dentropy = torch.randn(n, generator=g), torch.randn(n, generator=g)
    temperature = 0.5 + torch.rand(n, generator=g)
    want = token_logps64(case.logits, case.token_ids, temperature, dlogps, dentropy)

    logits = case.logits.clone().requires_grad_()
    logps, entropy = cfpo_kernels.token_logps(
        logits, case.token_ids, temperature=temperature, return_entropy=True, inplace=inplace
    )
    (logps * dlogps + entropy * dentropy).sum().backward()
    torch.testing.assert_close(logps.double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), want[1], rtol=3e-6, atol=3e-6)
    pieces = [(slice(None), 1.0, 1e-9)]
    if v > TAIL:  # the end by itself, as in check_gradient
        pieces.append((slice(-TAIL, None), 4.0, SMALLEST))
    for columns, factor, least in pieces:
        exact = want[2][:, columns]
        error = (logits.grad[:, columns].double() - exact).norm(dim=-1)
        allowed = 2e-5 * factor * exact.norm(dim=-1) + least
        if dtype != torch.float32:
            allowed += 1.1 * rounding_error(exact, dtype)
        assert (error <= allowed).all(), columns
    if inplace:
        assert logits.grad.data_ptr() == logits.data_ptr()
