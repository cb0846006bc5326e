"""Bounds on log r of each token, for ``log_ratio_bounds=(low, high)``: a divergence as a clip.

A token is inside where ``low <= log r <= high``. All are computed in float64 and log space without
a device sync, and are constants: once a rollout batch is enough, but for :func:`bapo`. With p the
probability of the sampled token under the anchor, the policy that sampled, and q = r p under the
policy being trained, the divergences are those of two Bernoulli distributions: sampled or not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .validation import scalars, tensors
from .validation.errors import type_error
from .validation.types import PerToken

DIVERGENCES = ("kl", "total_variation", "chi_squared")
# Nine bring _lower_root to the last bits for every p and for delta from 1e-8 to 1e3.
NEWTON_STEPS = 12
SMALLEST = 1e-307  # of a probability: its inverse is finite, and it is a normal number


def total_variation(anchor_logps: Tensor, delta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Where ``|q - p| = delta``: DPPO with total variation, arXiv 2602.04879.

    ``low = log(1 - delta / p)``, -inf where p <= delta; ``high = log(1 + delta / p)``.

    Args:
        anchor_logps: (...) floating point, log p of the tokens, in nats. Numbers above 0, which
            rounding makes, count as 0. Numbers of 16 bits are accepted, but a bfloat16 log p of -5
            is known to 0.016 only.
        delta: positive number or 0-d tensor.

    Returns:
        (low, high): (...) float32, or float64 for float64 anchor_logps; -inf or inf where there is
        no bound or none that the dtype can hold. NaN where the anchor is NaN; no token depends on
        another, so masked ones may hold anything.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.

    Memory: O(N), float64 inside.

    Example:
        >>> low, high = total_variation(torch.tensor([0.5, 0.01]).log(), 0.1)
        >>> low.exp(), high.exp()
        (tensor([0.8000, 0.0000]), tensor([ 1.2000, 11.0000]))
    """
    logp = _anchors(anchor_logps)
    log_step = scalars.on_device(scalars.positive("delta", delta), logp.device).log() - logp
    return _rounded(_log1m_exp(log_step), _log1p_exp(log_step), anchor_logps)


def chi_squared(anchor_logps: Tensor, delta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Where ``(q - p)^2 / (p (1 - p)) = delta``: BandPO with Pearson's chi-squared.

    ``r = 1 -+ sqrt(delta (1 - p) / p)``; low is -inf where that is not positive.

    Args, returns, raises, memory: see :func:`total_variation`.

    Source: arXiv 2603.04918, proposition 4.

    Example:
        >>> low, high = chi_squared(torch.tensor([0.5]).log(), 0.04)
        >>> low.exp(), high.exp()
        (tensor([0.8000]), tensor([1.2000]))
    """
    logp = _anchors(anchor_logps)
    log_delta = scalars.on_device(scalars.positive("delta", delta), logp.device).log()
    log_step = (log_delta + _log1m_exp(logp) - logp) / 2
    return _rounded(_log1m_exp(log_step), _log1p_exp(log_step), anchor_logps)


def kl(anchor_logps: Tensor, delta: float | Tensor) -> tuple[Tensor, Tensor]:
    """The two roots of ``KL(p || q) = delta``: DPPO with KL, and the clip of BandPO.

    ``KL = p log(p / q) + (1 - p) log((1 - p) / (1 - q))``. ``low < 0 < high <= -log p``.

    Args, returns, raises, memory: see :func:`total_variation`. low is finite for every p > 0, but
    about -delta / p: -3e33 for p = 1e-35, which float32 holds, and -inf beyond its range.

    Source: arXiv 2602.04879 (DPPO), arXiv 2603.04918 (BandPO).

    Example:
        >>> low, high = kl(torch.tensor([0.5, 0.1], dtype=torch.float64).log(), 0.05)
        >>> (low.exp() * 10000).round().tolist(), (high.exp() * 10000).round().tolist()
        ([6915.0, 3128.0], [13085.0, 22008.0])
    """
    logp = _anchors(anchor_logps)
    step = scalars.on_device(scalars.positive("delta", delta), logp.device)
    p, rest = logp.exp().clamp(min=SMALLEST), (-torch.expm1(logp)).clamp(min=SMALLEST)
    low = torch.where(logp < math.log(SMALLEST), -math.inf, _lower_root(p, rest, step))
    # The divergence does not care which of two outcomes is called the token. So the upper root is
    # the lower one of the other outcome, c = log((1 - q) / (1 - p)), and
    # q / p = 1 + (1 - p) / p (1 - e^c).
    complement = _lower_root(rest, p, step)
    log_step = _log1m_exp(logp) - logp + _log1m_exp(complement)
    # q <= 1, whatever rounding says.
    high = torch.minimum(_log1p_exp(log_step), -logp)
    return _rounded(low, high, anchor_logps)


def band(
    anchor_logps: Tensor,
    delta: float | Tensor = 0.05,
    cap: float | Tensor = 10.0,
    divergence: str = "kl",
) -> tuple[Tensor, Tensor]:
    """BandPO's clip range: a divergence's bounds, with r at most ``1 / p`` and `cap`.

    Args:
        anchor_logps, delta: see :func:`total_variation`.
        cap: number or 0-d tensor above 1, the largest ratio; math.inf for none.
        divergence: "kl", "total_variation" or "chi_squared", the functions of these names.

    Returns, raises, memory: see :func:`total_variation`.

    Source: arXiv 2603.04918. The defaults are those of its released runs.

    Example:
        >>> low, high = band(torch.tensor([0.9, 0.001]).log(), 0.2, divergence="total_variation")
        >>> high.exp()
        tensor([ 1.1111, 10.0000])
    """
    solve = {"kl": kl, "total_variation": total_variation, "chi_squared": chi_squared}
    chosen = scalars.check_choice("divergence", divergence, DIVERGENCES)
    largest = scalars.above_one("cap", cap)
    logp = _anchors(anchor_logps)
    low, high = solve[chosen](logp, delta)
    high = torch.minimum(torch.minimum(high, -logp), scalars.on_device(largest, logp.device).log())
    return _rounded(low, high, anchor_logps)


def dac(
    anchor_logps: Tensor,
    epsilon_low: float | Tensor,
    epsilon_high: float | Tensor,
    *,
    cap: float | Tensor = 10.0,
) -> tuple[Tensor, Tensor]:
    """Dynamic adaptive clipping of DCPO: where ``|r - 1| r p`` reaches epsilon.

    ``low = log(1/2 + sqrt(max(1 - 4 epsilon_low / p, 0)) / 2)``, at least log(1/2), and
    ``high = log(1/2 + sqrt(1 + 4 epsilon_high / p) / 2)``, at most log(cap).

    Args:
        anchor_logps: see :func:`total_variation`.
        epsilon_low, epsilon_high: positive numbers or 0-d tensors; 0.16 and 0.20 in DCPO.
        cap: see :func:`band`.

    Returns, raises, memory: see :func:`total_variation`.

    Source: arXiv 2509.02333.

    Example:
        >>> low, high = dac(torch.tensor([0.8, 1e-6]).log(), 0.16, 0.2)
        >>> low.exp(), high.exp()
        (tensor([0.7236, 0.5000]), tensor([ 1.2071, 10.0000]))
    """
    logp = _anchors(anchor_logps)

    def step(name: str, epsilon: float | Tensor) -> Tensor:
        log_epsilon = scalars.on_device(scalars.positive(name, epsilon), logp.device).log()
        # Finite, and so is what is made of it.
        return (math.log(4) + log_epsilon - logp).exp().clamp(max=1e307)

    below, above = step("epsilon_low", epsilon_low).clamp(max=1), step("epsilon_high", epsilon_high)
    largest = scalars.on_device(scalars.above_one("cap", cap), logp.device)
    # sqrt(1 + x) - 1 = x / (1 + sqrt(1 + x)), which keeps its digits near 0.
    low = torch.log1p(-below / (1 + (1 - below).sqrt()) / 2)
    high = torch.log1p(above / (1 + (1 + above).sqrt()) / 2)
    return _rounded(low, torch.minimum(high, largest.log()), anchor_logps)


def kl3(delta: float | Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """The two roots of ``r - 1 - log r = delta``, a bound on Schulman's k3 of each token.

    Args:
        delta: positive number or 0-d tensor.

    Returns:
        (low, high): the same for all tokens; floats, or 0-d float64 tensors for a tensor.

    Raises:
        TypeError, ValueError: delta has a wrong type, shape or value.

    Source: arXiv 2602.05494.

    Example:
        >>> low, high = kl3(0.02)
        >>> f"{low:.4f} {high:.4f}"
        '-0.2069 0.1935'
    """
    step = scalars.positive("delta", delta)
    if isinstance(step, Tensor):
        tensor = step.double()
        high = torch.minimum((2 * tensor).sqrt(), 1 + torch.log1p(2 * tensor))
        low = -tensor - (2 * tensor).sqrt()
        for _ in range(NEWTON_STEPS):
            low = low - (torch.expm1(low) - low - tensor) / torch.expm1(low)
            high = high - (torch.expm1(high) - high - tensor) / torch.expm1(high)
        return low, high
    ends = (-step - math.sqrt(2 * step), min(math.sqrt(2 * step), 1 + math.log1p(2 * step)))

    def root(x: float) -> float:
        for _ in range(NEWTON_STEPS):
            x -= (math.expm1(x) - x - step) / math.expm1(x)
        return x

    return root(ends[0]), root(ends[1])


def bapo(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    target: float | Tensor = 0.5,
    low: tuple[float, float] = (0.8, 0.95),
    high: tuple[float, float] = (1.2, 2.0),
    low_step: float = 0.05,
    high_step: float = 0.05,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """BAPO's clip range of a batch: raised until gains weigh enough against losses.

    First the lower bound rises, then the upper one, by a step at a time, until ::

        sum_{A > 0} min(r, high) A  >=  target * sum_{A < 0} max(r, low) |A|

    or both have reached their ends. All steps are computed, and the first that fits is chosen on
    the device; BAPO itself also has a dual clip of 3 (``PPOClip(dual_clip=3.0)``).

    Args:
        log_ratio: (...) floating point, log r of the tokens under the current policy; clamped to
            +-20. Detached.
        advantages: (...) floating point, or one a sequence: (B,) or (B, 1) for (B, T).
        mask: (...) bool or number; where it is 0 a token does not count, and may hold NaN.
        target: number or 0-d tensor, 0 or more.
        low, high: pairs of ratios, where the bound starts and where it ends.
        low_step, high_step: positive numbers.
        group: the sums are taken over the ranks of this process group, so that all get the same
            bounds; None: of this process only.

    Returns:
        (low, high): 0-d float64 tensors, bounds on log r.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value.

    Memory: O(N), once for each step one after the other.

    Source: arXiv 2510.18927. The defaults are those of its released script.

    Example:
        >>> advantages = torch.tensor([1.0, -1.0, -1.0])
        >>> low, high = bapo(torch.tensor([0.5, 0.0, 0.0]), advantages, target=0.7)
        >>> low.exp(), high.exp()
        (tensor(0.9500, dtype=torch.float64), tensor(1.4000, dtype=torch.float64))
    """
    tokens = PerToken("log_ratio", tensors.floats("log_ratio", log_ratio))
    goal = scalars.number(
        "target", target, "a finite number, 0 or more", lambda x: 0 <= x < math.inf
    )
    lows, highs = _grid("low", low, low_step), _grid("high", high, high_step)
    with torch.no_grad():
        active = tensors.active_rows(mask, tokens)
        x = torch.where(active, log_ratio.detach().reshape(-1).double(), 0.0)
        ratio = x.clamp(-20, 20).exp()
        given, _ = tensors.check_advantages(advantages, tokens)
        weight = torch.where(active, given.double(), 0.0)
        gain, loss = weight.clamp(min=0), (-weight).clamp(min=0)
        sums = torch.stack(
            [(ratio.clamp(max=bound) * gain).sum() for bound in highs]
            + [(ratio.clamp(min=bound) * loss).sum() for bound in lows]
        )
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        gains, losses = sums[: len(highs)], sums[len(highs) :]
        # The order of the search: every lower bound with the first upper one, then the others.
        gains = torch.cat([gains[:1].expand(len(lows)), gains[1:]])
        losses = torch.cat([losses, losses[-1:].expand(len(highs) - 1)])
        unmet = gains < scalars.on_device(goal, x.device) * losses
        steps = unmet.double().cumprod(0).sum()
        raised = steps.clamp(max=len(lows) - 1)
        widened = (steps - raised).clamp(max=len(highs) - 1)
        return (
            (lows[0] + raised * float(low_step)).clamp(max=lows[-1]).log(),
            (highs[0] + widened * float(high_step)).clamp(max=highs[-1]).log(),
        )


def _grid(name: str, ends: object, step: object) -> list[float]:
    """The bounds that bapo tries, in Python numbers: their count is known to the host."""
    accepted = "a pair of numbers, 0 < start <= end"
    if not isinstance(ends, (tuple, list)) or len(ends) != 2:
        raise type_error(name, ends, accepted)
    start, end = (scalars.plain_number(name, x, accepted, lambda x: 0 < x < math.inf) for x in ends)
    if start > end:
        raise ValueError(f"{name} must be {accepted}, got {tuple(ends)}")
    by = scalars.plain_number(f"{name}_step", step, "a positive number", lambda x: 0 < x < math.inf)
    # What rounding leaves of a step is no step of its own.
    count = math.ceil((end - start) / by - 1e-9)
    return [min(start + i * by, end) for i in range(count + 1)]


def _anchors(anchor_logps: object) -> Tensor:
    return tensors.floats("anchor_logps", anchor_logps).detach().double().clamp(max=0)


def _rounded(low: Tensor, high: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    dtype = tensors.result_dtype(like)
    return low.to(dtype), high.to(dtype)


def _log1p_exp(x: Tensor) -> Tensor:
    """log(1 + e^x) for any x."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _log1m_exp(x: Tensor) -> Tensor:
    """log(1 - e^x), -inf from x = 0 on."""
    x = x.clamp(max=0)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))


def _lower_root(p: Tensor, rest: Tensor, delta: Tensor) -> Tensor:
    """x <= 0 with KL(p || p e^x) = delta, for rest = 1 - p, given apart for its digits.

    KL is convex in x, so that Newton's method from outside stays outside and falls monotonically.
    Three bounds on KL say where outside is: KL >= -p x + (1 - p) log(1 - p), (q - p)^2 / (2 p) for
    q < p, and Pinsker's 2 (q - p)^2. One of them is near wherever p and delta are.
    """
    tail = -(delta + torch.special.entr(rest)) / p
    width = torch.minimum((delta / 2).sqrt() / p, (2 * delta / p).sqrt())
    x = torch.maximum(tail, torch.log1p(-width.clamp(max=1)))
    for _ in range(NEWTON_STEPS):
        moved = p * torch.expm1(x)  # q - p
        excess = -p * x - rest * torch.log1p(-moved / rest) - delta
        x = x - excess * (rest - moved) / moved
    return x.clamp(max=0)
