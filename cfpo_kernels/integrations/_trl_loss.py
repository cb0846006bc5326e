"""TRL's loss of tokens from their logits: one fused pass, or two where a term asks for it."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import formula
from ..api import policy_loss, token_logps
from ..inputs import LossSettings, TokenInputs
from ..objectives import Objective
from ..stats import CFPOStats, collect_stats
from ._trl_batch import Tokens, accumulation_steps, denominator


class Scored(NamedTuple):
    """The loss is 0-d; the rest has the shape of the tokens and is detached."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    bonus_mask: Tensor  # the tokens that the entropy bonus acts on


class TokenLoss:
    """The loss of some tokens of a micro-batch as a function of their logits, (..., V)::

        sum_i w_i (correction_i policy_i + beta KL_i) - bonus / bonus_tokens sum_i H_i

    Args:
        trainer, inputs: what TRL's ``_compute_loss`` has.
        tokens: the whole micro-batch, from :func:`align`.
        how: temperature, inplace and backend of the package's functions.
    """

    def __init__(
        self,
        trainer: Any,
        inputs: dict[str, Any],
        tokens: Tokens,
        objective: Objective,
        how: dict[str, Any],
    ) -> None:
        self.trainer = trainer
        self.objective = objective
        self.how = how
        self.beta = trainer.beta
        # TRL then differentiates through the ratio too.
        self.kl_times_ratio = self.beta != 0 and trainer.args.use_bias_correction_kl
        self.bonus = bonus_coefficient(trainer)
        self.bonus_tokens = tokens.mask.sum().clamp(min=1) * accumulation_steps(trainer)
        self.weights_differ = trainer.loss_type == "grpo"
        self.denominator = denominator(trainer, inputs, tokens.mask)

    @property
    def one_pass(self) -> bool:
        """The kernel has one weight a token, and a second one for the policy term only."""
        differ = self.weights_differ and self.beta != 0
        return not (needs_all_tokens(self.trainer) or self.kl_times_ratio or differ)

    @cached_property
    def entropy_coef(self) -> float:
        """The bonus under the normaliser of one pass; once, since it waits for the device."""
        if self.weights_differ or not self.bonus:
            return self.bonus
        return self.bonus * float(self.denominator / self.bonus_tokens)

    def __call__(self, logits: Tensor, tokens: Tokens) -> Scored:
        return self._in_one_pass(logits, tokens) if self.one_pass else self._in_two(logits, tokens)

    def _in_one_pass(self, logits: Tensor, tokens: Tokens) -> Scored:
        normalizer, factors = self.denominator, tokens.correction
        if self.weights_differ:
            normalizer, factors = self.bonus_tokens, tokens.weights * self.bonus_tokens
            if tokens.correction is not None:
                factors = factors * tokens.correction
        loss, stats = policy_loss(
            logits,
            tokens.token_ids,
            tokens.advantages,
            tokens.old_logps,
            objective=self.objective,
            mask=tokens.mask,
            reduction="sum",
            normalizer=normalizer,
            token_weights=factors,
            ref_logps=tokens.ref_logps,
            kl_coef=self.beta,
            entropy_coef=self.entropy_coef,
            return_stats=True,
            **self.how,
        )
        return Scored(loss, stats.logps, stats.entropy, tokens.mask)

    def _in_two(self, logits: Tensor, tokens: Tokens) -> Scored:
        """Log-probs and entropies first, the loss from them in torch; backward is the second."""
        mask = tokens.mask
        logps, entropy = token_logps(
            logits, tokens.token_ids, mask=mask, return_entropy=True, **self.how
        )

        def unmasked(x: Tensor) -> Tensor:
            return torch.where(mask, x, torch.zeros_like(x))

        advantages = unmasked(tokens.advantages)
        old = logps.detach() if tokens.old_logps is None else unmasked(tokens.old_logps)
        shape = self.objective.shape()
        loss = formula.policy_loss(logps, logps - old, TokenInputs(advantages), shape)
        kept, bonus_mask = self._masks(logps.detach(), entropy.detach(), old, tokens)
        loss = loss * kept
        if tokens.correction is not None:
            loss = loss * unmasked(tokens.correction)
        if self.beta != 0:
            loss = loss + self.beta * self.kl(logps, old, tokens)
        bonus_tokens = self.bonus_tokens
        if bonus_mask is not mask:
            bonus_tokens = bonus_mask.sum().clamp(min=1) * accumulation_steps(self.trainer)
        bonus = torch.where(bonus_mask, entropy, torch.zeros_like(entropy)).sum() / bonus_tokens
        loss = (unmasked(loss) * tokens.weights).sum() - self.bonus * bonus
        return Scored(loss, logps.detach(), entropy.detach(), bonus_mask)

    def kl(self, logps: Tensor, old_logps: Tensor, tokens: Tokens) -> Tensor:
        """TRL's estimate of each token; 0 where masked."""
        assert tokens.ref_logps is not None  # align
        ref_logps = torch.where(tokens.mask, tokens.ref_logps, logps.detach())
        kl = formula.kl_term("k3", logps, ref_logps)
        return kl * (logps - old_logps).exp() if self.kl_times_ratio else kl

    def _masks(
        self, logps: Tensor, entropy: Tensor, old_logps: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        """The tokens whose policy term counts, and those that the bonus acts on; TRL's own code."""
        trainer = self.trainer
        kept = bonus_mask = tokens.mask
        if trainer.top_entropy_quantile < 1:
            quantile = 1 - trainer.top_entropy_quantile
            kept = bonus_mask = trainer.get_high_entropy_mask(entropy, tokens.mask, quantile)
        if trainer.off_policy_mask_threshold is not None:
            sampling = old_logps if tokens.sampling_logps is None else tokens.sampling_logps
            kept = kept & trainer.get_off_policy_mask(
                tokens.advantages,
                logps,
                sampling,
                tokens.mask,
                trainer.off_policy_mask_threshold,
            )
        return kept, bonus_mask


def needs_all_tokens(trainer: Any) -> bool:
    """Whether a token's loss depends on the log-probs or entropies of the others."""
    return trainer.top_entropy_quantile < 1 or trainer.off_policy_mask_threshold is not None


def bonus_coefficient(trainer: Any) -> float:
    """The entropy bonus of this step; the adaptive one is off while the entropy is high."""
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return float(trainer.entropy_coef)


class LossTerms(NamedTuple):
    """What is logged about a loss; all detached."""

    policy_loss: Tensor  # 0-d; with the KL term, without the bonus, not scaled for accumulation
    stats: CFPOStats
    mask: Tensor
    bonus_mask: Tensor


def loss_terms(loss_of: TokenLoss, scored: Scored, tokens: Tokens) -> LossTerms:
    """From the scores of all tokens of the micro-batch."""
    logps, entropy, mask, bonus_mask = scored.logps, scored.entropy, tokens.mask, scored.bonus_mask
    old_logps = logps if tokens.old_logps is None else tokens.old_logps
    stats = collect_stats(
        logps.flatten(),
        entropy.flatten(),
        mask.flatten(),
        TokenInputs(tokens.advantages.expand(mask.shape).flatten(), old_logps.flatten()),
        LossSettings(loss_of.objective.shape()),
        loss_of.objective.trust_region(),
        mask.shape,
    )
    if loss_of.beta != 0:
        kl = torch.where(mask, loss_of.kl(logps, old_logps, tokens), torch.zeros_like(logps))
        stats = stats._replace(ref_kl=kl.sum() / mask.sum())
    trainer = loss_of.trainer
    steps = accumulation_steps(trainer)
    policy = scored.loss.detach()
    if loss_of.bonus:
        bonus = torch.where(bonus_mask, entropy, torch.zeros_like(entropy)).sum()
        policy = policy + loss_of.bonus * bonus / (bonus_mask.sum().clamp(min=1) * steps)
    if trainer.loss_type != "dapo":  # its denominator spans the accumulated micro-batches
        policy = policy * steps
    return LossTerms(policy, stats, mask, bonus_mask)
