"""Losses of preference pairs, from what :func:`cfpo_kernels.sequences.sequence_logps` gives.

The log ratio of a response is ``log pi(y | x) - log pi_ref(y | x)``, one number, best in float64:
that of a long response is a small difference of large sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .validation import scalars, tensors

# exp of it is finite in float64, and so is the difference of two such.
LARGEST_EXPONENT = 700.0


def dpo_loss(
    chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float | Tensor = 0.1
) -> Tensor:
    """Direct preference optimisation: ``-log sigmoid(beta (z_chosen - z_rejected))``.

    Args:
        chosen_log_ratios: (...) floating point, z of the preferred responses, in nats;
            differentiable.
        rejected_log_ratios: (...) of the others, differentiable.
        beta: positive number or 0-d tensor.

    Returns:
        (...) a loss a pair, float32 or, for float64 chosen_log_ratios, float64.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value.

    Memory: O(B), float64 inside. Differentiable twice.

    Source: arXiv 2305.18290, equation 7.

    Example:
        >>> dpo_loss(torch.tensor([2.0, -2.0]), torch.tensor([0.0, 0.0]), beta=0.5)
        tensor([0.3133, 1.3133])
    """
    chosen, rejected = _pairs(chosen_log_ratios, rejected_log_ratios)
    margin = scalars.on_device(scalars.positive("beta", beta), chosen.device) * (chosen - rejected)
    return _loss(-logsigmoid(margin), chosen_log_ratios)


def ipo_loss(
    chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float | Tensor = 0.1
) -> Tensor:
    """Identity preference optimisation: ``(z_chosen - z_rejected - 1 / (2 beta))^2``.

    Not what prime-rl calls IPO: that is a policy objective, a token's policy gradient where
    ``|p - mu|`` is small, and `IPO` among the objectives here.

    Args:
        chosen_log_ratios, rejected_log_ratios: (...) floating point, in nats; differentiable. TRL
            and the paper's authors use means over a response's tokens
            (:func:`cfpo_kernels.sequences.sequence_mean`), because sums make the loss grow with the
            square of the length.
        beta: positive number or 0-d tensor, the paper's tau.

    Returns, raises, memory: see :func:`dpo_loss`.

    Source: arXiv 2310.12036, equation 17.

    Example:
        >>> ipo_loss(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.25)
        tensor([1.])
    """
    chosen, rejected = _pairs(chosen_log_ratios, rejected_log_ratios)
    goal = 0.5 / scalars.on_device(scalars.positive("beta", beta), chosen.device)
    return _loss((chosen - rejected - goal) ** 2, chosen_log_ratios)


def chi_po_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    *,
    beta: float | Tensor,
    r_max: float | Tensor,
) -> Tensor:
    """Chi-squared preference optimisation: DPO with the link ``phi(z) = e^z + z``, clipped.

    ``-log sigmoid(clip(beta (phi(z_chosen) - phi(z_rejected)), -2 r_max, 2 r_max))``. A pair beyond
    the clip has no gradient.

    Args:
        chosen_log_ratios, rejected_log_ratios: see :func:`dpo_loss`; sums over the response, of
            which e^z is the ratio. Any finite number, also where e^z overflows.
        beta: positive number or 0-d tensor.
        r_max: positive number or 0-d tensor, the largest reward there is; it and beta depend on the
            rewards' scale, so that neither has a default.

    Returns, raises, memory: see :func:`dpo_loss`.

    Source: arXiv 2407.13399.

    Example:
        >>> z = torch.tensor([4.0]), torch.tensor([0.0])
        >>> chi_po_loss(*z, beta=0.05, r_max=1.0), chi_po_loss(*z, beta=0.05, r_max=2.0)
        (tensor([0.1269]), tensor([0.0546]))
    """
    chosen, rejected = _pairs(chosen_log_ratios, rejected_log_ratios)
    scale = scalars.on_device(scalars.positive("beta", beta), chosen.device)
    largest = 2 * scalars.on_device(scalars.positive("r_max", r_max), chosen.device)
    # Beyond the range of exp the pair is far outside the clip, unless the two are equal: scaled
    # down together they keep their order, and the difference its sign.
    with torch.no_grad():
        shift = (torch.maximum(chosen, rejected) - LARGEST_EXPONENT).clamp(min=0)
    powers = (chosen - shift).exp() - (rejected - shift).exp()
    margin = scale * (powers + chosen - rejected)
    return _loss(-logsigmoid(margin.clamp(-largest, largest)), chosen_log_ratios)


def fpo_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    chosen_feature_distances: Tensor,
    rejected_feature_distances: Tensor,
    *,
    beta: float | Tensor = 0.1,
    alpha: float | Tensor = 0.5,
) -> Tensor:
    """Feature-level preference optimisation: DPO whose margin has a term from a sparse autoencoder.

    ``-log sigmoid(beta (m_chosen - m_rejected - alpha (mse_rejected - sg(mse_chosen))))``, where sg
    stops the gradient.

    Args:
        chosen_log_ratios, rejected_log_ratios: (...) floating point, in nats, differentiable; means
            over a response's tokens (:func:`cfpo_kernels.sequences.sequence_mean`).
        chosen_feature_distances, rejected_feature_distances: (...) floating point, the mean squared
            difference between the features of the policy and of the reference: of a response's mean
            features, the 50 that are largest for the policy, in the paper's code. The caller's, as
            they come from hidden states; gradients go to the rejected responses' only.
        beta: positive number or 0-d tensor.
        alpha: finite number or 0-d tensor.

    Returns, raises, memory: see :func:`dpo_loss`.

    Source: arXiv 2411.07618, and its authors' code, whose defaults these are.

    Example:
        >>> ratios = torch.tensor([0.4]), torch.tensor([0.1])
        >>> features = torch.tensor([0.0]), torch.tensor([0.2])
        >>> fpo_loss(*ratios, *features, beta=10.0)
        tensor([0.1269])
    """
    chosen, rejected = _pairs(chosen_log_ratios, rejected_log_ratios)
    features = [
        tensors.same_shape(name, value, "chosen_log_ratios", chosen_log_ratios)
        for name, value in (
            ("chosen_feature_distances", chosen_feature_distances),
            ("rejected_feature_distances", rejected_feature_distances),
        )
    ]
    scale = scalars.on_device(scalars.positive("beta", beta), chosen.device)
    weight = scalars.number("alpha", alpha, "a finite number", lambda x: abs(x) < float("inf"))
    drift = features[1] - features[0].detach()
    margin = chosen - rejected - scalars.on_device(weight, chosen.device) * drift
    return _loss(-logsigmoid(scale * margin), chosen_log_ratios)


def _pairs(chosen: object, rejected: object) -> tuple[Tensor, Tensor]:
    like = tensors.floats("chosen_log_ratios", chosen)
    other = tensors.same_shape("rejected_log_ratios", rejected, "chosen_log_ratios", like)
    return like.double(), other


def _loss(loss: Tensor, like: Tensor) -> Tensor:
    return loss.to(tensors.result_dtype(like))
