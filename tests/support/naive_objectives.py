"""Each named objective as its paper or trainer writes it, not as a shape; part of the oracle.

Plain ratios, detached where the source detaches; derivatives are autograd's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Given(NamedTuple):
    """low, high: bounds on r itself, from log_ratio_bounds; None: the objective's own."""

    logps: Tensor
    log_ratio: Tensor
    advantages: Tensor
    low: Tensor | None
    high: Tensor | None

    @property
    def r(self) -> Tensor:
        return self.log_ratio.exp()

    def bounds(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        if self.low is not None and self.high is not None:
            return self.low, self.high
        return torch.full_like(self.r, low), torch.full_like(self.r, high)

    def by_sign(self, positive: float, negative: float) -> Tensor:
        return torch.where(self.advantages > 0, torch.full_like(self.r, positive), negative)

    def clipped(self, low: float, high: float) -> Tensor:
        low_bound, high_bound = self.bounds(low, high)
        return torch.minimum(torch.maximum(self.r, low_bound), high_bound)


def cfpo(o: Any, t: Given) -> Tensor:
    a, x = t.advantages, t.log_ratio
    if o.log_ratio_clip is not None:
        x = x.clamp(-o.log_ratio_clip, o.log_ratio_clip)
    above = o.epsilon if o.epsilon_high is None else o.epsilon_high
    below = torch.full_like(x, o.epsilon)
    if t.low is not None and t.high is not None:
        below, above = 1 - t.low, t.high - 1
    epsilon = torch.where(a > 0, above, below)
    return -(x.exp() * a - a.abs() / (2 * epsilon) * (x.exp() - 1) ** 2)


def ppo_clip(o: Any, t: Given) -> Tensor:
    a = t.advantages
    loss = torch.maximum(-t.r * a, -t.clipped(1 - o.epsilon_low, 1 + o.epsilon_high) * a)
    if o.dual_clip is not None:
        loss = torch.where(a < 0, torch.minimum(loss, -o.dual_clip * a), loss)
    return loss


def cispo(o: Any, t: Given) -> Tensor:
    return -t.clipped(o.low, o.high).detach() * t.advantages * t.logps


def sapo(o: Any, t: Given) -> Tensor:
    tau = t.by_sign(o.tau_positive, o.tau_negative)
    return -torch.sigmoid(tau * (t.r - 1)) * (4 / tau) * t.advantages


def dppo(o: Any, t: Given) -> Tensor:
    assert t.low is not None and t.high is not None
    a, r = t.advantages, t.r.detach()
    unsafe = ((a > 0) & (r > t.high)) | ((a <= 0) & (r < t.low))
    return -torch.where(unsafe, 0.0, r.clamp(max=o.cap)) * a * t.logps


def ice_pop(o: Any, t: Given) -> Tensor:
    low, high = t.bounds(o.low, o.high)
    return -torch.where((t.r >= low) & (t.r <= high), t.r, 0.0) * t.advantages


def gppo(o: Any, t: Given) -> Tensor:
    a, r = t.advantages, t.r
    low, high = t.bounds(1 - o.epsilon_low, 1 + o.epsilon_high)
    loss = -r * a
    # A beta of 0 is PPO, which reports the bound.
    kept_low = (o.beta_low or 1.0) * low / r.detach() * (r if o.beta_low else r.detach())
    kept_high = (o.beta_high or 1.0) * high / r.detach() * (r if o.beta_high else r.detach())
    loss = torch.where((a < 0) & (r < low), -kept_low * a, loss)
    loss = torch.where((a > 0) & (r > high), -kept_high * a, loss)
    if o.dual_clip is not None:
        loss = torch.where((a < 0) & (r > o.dual_clip), -o.dual_clip * a, loss)
    return loss


def aspo(o: Any, t: Given) -> Tensor:
    a, r = t.advantages, t.r
    low, high = t.bounds(1 - o.epsilon_low, 1 + o.epsilon_high)
    turned = r / r.detach() ** 2
    capped = o.dual_clip * r / r.detach()
    gain = torch.where(turned > o.dual_clip, capped, turned)
    gain = torch.where(r > high, (1 / high), gain)
    cost = torch.where(r < low, low, torch.where(r > o.dual_clip, capped, r))
    return -torch.where(a > 0, gain, cost) * a


def topr(o: Any, t: Given) -> Tensor:
    weight = torch.where(t.advantages > 0, 1.0, t.r.detach().clamp(0.0, 1.0))
    return -weight * t.advantages * t.logps


def reinforce(o: Any, t: Given) -> Tensor:
    return -t.advantages * t.logps


def ipo(o: Any, t: Given) -> Tensor:
    assert t.low is not None and t.high is not None
    return -torch.where((t.r < t.low) | (t.r > t.high), 0.0, t.r * t.advantages)


def power_is(o: Any, t: Given) -> Tensor:
    power = t.by_sign(o.power_positive, o.power_negative)
    return -(t.r.detach() ** (power - 1)) * t.r * t.advantages


def dro(o: Any, t: Given) -> Tensor:
    return -(t.advantages * t.logps - o.beta / 2 * t.log_ratio**2)


NAIVE = {
    "aspo": aspo,
    "cfpo": cfpo,
    "cispo": cispo,
    "dppo": dppo,
    "dro": dro,
    "gppo": gppo,
    "ice_pop": ice_pop,
    "ipo": ipo,
    "power_is": power_is,
    "ppo_clip": ppo_clip,
    "reinforce": reinforce,
    "sapo": sapo,
    "topr": topr,
}


def naive_policy(
    objective: Any,
    logps: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The policy term with its drift; `bounds` are on log r. 0 where the advantage is 0."""
    low, high = (None, None) if bounds is None else (bound.exp() for bound in bounds)
    # 0 times a ratio is 0, unless it overflows.
    finite = torch.where((advantages == 0) & (log_ratio > 300), 0.0, log_ratio)
    loss = NAIVE[objective.name](objective, Given(logps, finite, advantages, low, high))
    return loss + objective.drift / 2 * log_ratio**2
