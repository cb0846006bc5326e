"""Every formula of a token's loss, once for Python: the specification in code.

Elementwise plain torch on any device. Derivatives are autograd's; where an objective detaches a
part, so does this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import LossSettings, TokenInputs
from .shapes import SCORE, SURROGATE, Shape
from .two_pass import Beyond

ONE_TOKEN = Beyond()
SHAPES = ("window", "quadratic", "sigmoid")


def policy_term(
    shape: Shape,
    logps: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """The negated objective of each token without its drift.

    Args:
        log_ratio: differentiable; logps: differentiable too, for what weighs log-probabilities.
        low, high: numbers for the shape in place of its own.
    """
    if shape.kind == "window":
        return _window(shape, logps, log_ratio, advantages, low, high)
    if shape.kind == "quadratic":
        return _quadratic(shape, log_ratio, advantages, high)
    if shape.kind == "sigmoid":
        return _sigmoid(shape, log_ratio, advantages)
    raise ValueError(f"{shape.kind!r} is no shape of formula.py")


def _by_sign(advantages: Tensor, positive: float, negative: float) -> Tensor:
    return torch.where(advantages > 0, torch.full_like(advantages, positive), negative)


def _bound(advantages: Tensor, given: Tensor | None, positive: float, negative: float) -> Tensor:
    return _by_sign(advantages, positive, negative) if given is None else given


def _sides(
    shape: Shape, x: Tensor, advantages: Tensor, low: Tensor | None, high: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log r within the bounds and the cap, and what is left of a token's gradient."""
    low = _bound(advantages, low, shape.low_positive, shape.low_negative)
    high = _bound(advantages, high, shape.high_positive, shape.high_negative)
    below, above = x < low, x > high
    # Comparisons, not clamp, which would swallow a NaN.
    bounded = torch.where(below, low, torch.where(above, high, x))
    bounded = torch.where(bounded > shape.cap, shape.cap, bounded)
    slope = torch.where(above, _by_sign(advantages, shape.above_positive, shape.above_negative), 1)
    kept_below = _by_sign(advantages, shape.below_positive, shape.below_negative)
    return bounded, torch.where(below, kept_below, slope)


def _window(
    shape: Shape,
    logps: Tensor,
    x: Tensor,
    advantages: Tensor,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    bounded, slope = _sides(shape, x.detach(), advantages, low, high)
    power = _by_sign(advantages, shape.power_positive, shape.power_negative)
    weight = torch.where(power == 0, 1, torch.exp(power * bounded))  # 0 * inf is NaN
    gradient = torch.where(slope == 0, 0, slope * weight)
    if shape.value == SCORE:
        return -advantages * gradient * torch.where(gradient == 0, 0, logps)
    # The value is `gradient`, and so is the derivative.
    finite = torch.where(x.isinf(), 0, x)
    reported = gradient * torch.exp(finite - finite.detach())
    if shape.value == SURROGATE:
        reported = torch.where(slope == 0, weight, reported)
    return -advantages * reported


def _quadratic(shape: Shape, x: Tensor, advantages: Tensor, width: Tensor | None) -> Tensor:
    width = _bound(advantages, width, shape.high_positive, shape.high_negative)
    # Comparisons, not clamp, whose derivative at a NaN is 0.
    capped = torch.where(x > shape.cap, shape.cap, torch.where(x < -shape.cap, -shape.cap, x))
    excess = torch.expm1(capped)  # r - 1
    penalty = advantages.abs() / (2 * width) * excess
    return -(advantages + excess * (advantages - penalty))


def _sigmoid(shape: Shape, x: Tensor, advantages: Tensor) -> Tensor:
    tau = _by_sign(advantages, shape.power_positive, shape.power_negative)
    z = tau * torch.expm1(torch.where(x > shape.cap, shape.cap, x))
    # Not abs, whose derivative at 0 is 0; and nothing cancels in either tail.
    q = torch.exp(torch.where(z < 0, z, -z))
    return -4 / tau * advantages * torch.where(z < 0, q, 1) / (1 + q)


def is_dropped(shape: Shape, log_ratio: Tensor, inputs: TokenInputs) -> Tensor:
    """Whether the objective leaves a token no gradient of its own; (N,) bool."""
    if shape.kind == "window":
        return _sides(shape, log_ratio, inputs.advantages, inputs.low, inputs.high)[1] == 0
    if shape.kind == "quadratic":
        return log_ratio.abs() > shape.cap
    return torch.zeros_like(log_ratio, dtype=torch.bool)


def is_idle(inputs: TokenInputs, settings: LossSettings) -> Tensor | None:
    """Whether a token's loss and its gradient are 0 whatever its logits are; (N,) bool.

    None: no token's are. With a sequence's log r that only holds where it does for all of it.
    """
    if settings.needs_entropy or (settings.kl_coef != 0 and inputs.ref_logps is not None):
        return None
    idle = torch.zeros_like(inputs.advantages, dtype=torch.bool)
    if settings.shape.drift == 0:
        idle = inputs.advantages == 0
    if inputs.token_weights is not None:
        idle = idle | (inputs.token_weights == 0)
    return idle


def kl_term(estimator: str, logps: Tensor, ref_logps: Tensor) -> Tensor:
    """An estimate of KL(pi || ref) from the sampled token.

    "k1", "k2", "k3" are Schulman's. "k1+" and "k3+" have the value of k1 and k3 and the gradient of
    k2, whose expectation is that of the KL divergence.
    """
    d = ref_logps - logps
    if estimator == "k2":
        return 0.5 * d * d
    value = -d if estimator in ("k1", "k1+") else torch.expm1(d) - d
    if not estimator.endswith("+"):
        return value
    k2 = 0.5 * d * d
    return value.detach() + (k2 - k2.detach())


def kl_loss(settings: LossSettings, logps: Tensor, log_ratio: Tensor, ref_logps: Tensor) -> Tensor:
    """The KL term of each token without its coefficient."""
    kl = kl_term(settings.kl_estimator, logps, ref_logps)
    return kl * log_ratio.exp() if settings.kl_ratio_weighted else kl


def log_ratio_of(logps: Tensor, old_logps: Tensor | None) -> Tensor:
    """log r of each token, differentiable.

    Exactly 0 where `old_logps` is None, or is what rounding to a lower precision leaves of logps.
    """
    exact = logps.detach()
    if old_logps is None:
        return logps - exact
    if old_logps.dtype == logps.dtype:
        return logps - old_logps
    scored = old_logps == exact.to(old_logps.dtype)
    return logps - torch.where(scored, exact, old_logps.to(exact.dtype))


def loss_of_logps(
    logps: Tensor,
    entropy: Tensor | None,
    weights: Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
    beyond: Beyond = ONE_TOKEN,
) -> Tensor:
    """Each token's weighted loss (N,), differentiable in logps and entropy.

    Args:
        logps: unrounded, if of a higher precision than the inputs.
        all tensors: (N,). What a token with weight 0 holds may be anything: it reaches neither the
            loss nor a gradient. entropy is used only where something wants it.
        beyond: what looks at more than a token, or is written in torch.
    """
    active = weights != 0

    def of_active(x: Tensor) -> Tensor:
        return torch.where(active, x.to(logps.dtype), torch.zeros_like(logps))

    logps = of_active(logps)
    inputs = inputs.each(lambda x: torch.where(active, x.detach(), torch.zeros_like(x)))
    log_ratio = log_ratio_of(logps, inputs.old_logps)
    inputs = inputs.each(lambda x: x.to(logps.dtype))
    kl_log_ratio = log_ratio
    if beyond.ratio is not None:
        log_ratio, kl_log_ratio = beyond.ratio(log_ratio, active)
    if beyond.function is None:
        loss = policy_loss(logps, log_ratio, inputs, settings.shape)
    else:
        wanted = None
        if beyond.needs_entropy:
            assert entropy is not None  # its caller
            wanted = of_active(entropy)
        loss = beyond.function(logps, log_ratio, inputs, wanted, active)
        loss = weighted(loss, inputs.token_weights)
    if settings.kl_coef != 0 and inputs.ref_logps is not None:
        kl = kl_loss(settings, logps, kl_log_ratio, inputs.ref_logps)
        loss = loss + settings.kl_coef * kl
    if settings.needs_entropy:
        assert entropy is not None  # validation
        loss = loss - settings.entropy_coef * of_active(entropy)
    return torch.where(active, weights * loss, torch.zeros_like(loss))


def policy_loss(logps: Tensor, log_ratio: Tensor, inputs: TokenInputs, shape: Shape) -> Tensor:
    """The policy term with its drift and its weight.

    A token whose advantage or weight is 0 has exactly 0 of what they scale, also where r overflows:
    torch.where on the result alone would leave a gradient of 0 * inf.
    """

    def zero_where(out: Tensor, x: Tensor) -> Tensor:
        return torch.where(out, torch.zeros_like(x), x)

    idle = inputs.advantages == 0
    ignored = idle if shape.drift == 0 else torch.zeros_like(idle)
    if inputs.token_weights is not None:
        ignored = ignored | (inputs.token_weights == 0)
    outside = idle | ignored
    term = policy_term(
        shape,
        zero_where(outside, logps),
        zero_where(outside, log_ratio),
        inputs.advantages,
        inputs.low,
        inputs.high,
    )
    loss = zero_where(outside, term)
    if shape.drift != 0:
        log_ratio = zero_where(ignored, log_ratio)
        loss = loss + 0.5 * shape.drift * log_ratio * log_ratio
    if inputs.token_weights is not None:
        loss = loss * inputs.token_weights
    return zero_where(ignored, loss)


def weighted(loss: Tensor, token_weights: Tensor | None) -> Tensor:
    """A weight of 0 leaves 0 of any loss."""
    if token_weights is None:
        return loss
    return torch.where(token_weights == 0, torch.zeros_like(loss), loss * token_weights)
