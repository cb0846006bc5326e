"""TRL's loss of tokens from their logits: one fused pass, or two where a term asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import formula
from ..inputs import LossSettings, TokenInputs
from ..objectives import Objective
from ..shapes import Shape
from ..stats import CFPOStats, collect_stats
from ..two_pass import TokenTerms
from ._trl_batch import MEANS_OF_SEQUENCES, SPANNING, Tokens, accumulation_steps, denominator
from ._trl_config import Vespo


class Scored(NamedTuple):
    """The loss is 0-d; the rest has the shape of the tokens and is detached."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    bonus_mask: Tensor  # the tokens that the entropy bonus acts on


class TokenLoss:
    """The loss of a micro-batch as a function of its logits or of what they are made of::

        sum_i w_i (correction_i policy_i + beta KL_i) - bonus / bonus_tokens sum_i H_i

    Args:
        trainer, inputs: what TRL's ``_compute_loss`` has.
        tokens: from :func:`align`.
    """

    def __init__(
        self,
        trainer: Any,
        inputs: dict[str, Any],
        tokens: Tokens,
        objective: Objective | Vespo,
    ) -> None:
        self.trainer = trainer
        self.tokens = tokens
        self.objective = objective
        self.beta = trainer.beta
        # TRL then differentiates through the ratio too.
        self.kl_times_ratio = self.beta != 0 and trainer.args.use_bias_correction_kl
        self.bonus = bonus_coefficient(trainer)
        self.bonus_tokens = tokens.mask.sum().clamp(min=1) * accumulation_steps(trainer)
        self.level = trainer.importance_sampling_level
        parallelism = getattr(trainer.accelerator, "parallelism_config", None)
        if needs_all_tokens(trainer) and getattr(parallelism, "cp_size", 1) > 1:
            raise ValueError(
                "context parallelism splits sequences over processes, which this loss needs whole: "
                "set importance_sampling_level='token', loss_type to another than 'vespo', "
                "top_entropy_quantile=1.0 and off_policy_mask_threshold=None, or cp_size=1"
            )
        self.weights_differ = trainer.loss_type in MEANS_OF_SEQUENCES
        self.denominator = denominator(trainer, inputs, tokens.mask)

    @property
    def one_pass(self) -> bool:
        """The kernel has one weight a token, and a second one for the policy term only."""
        differ = self.weights_differ and self.beta != 0 and self.bonus != 0
        return not (needs_all_tokens(self.trainer) or differ)

    def __call__(self, loss_of: Callable[..., Any]) -> Scored:
        """`loss_of`: policy_loss or linear_policy_loss, with all but what is of the tokens."""
        tokens = self.tokens
        term = None if self.one_pass else TokenTerm(self)
        loss, stats = loss_of(
            token_ids=tokens.token_ids,
            advantages=tokens.advantages,
            old_logps=tokens.old_logps,
            objective=self.objective if term is None else term,
            mask=tokens.mask,
            ref_logps=tokens.ref_logps,
            temperature=self.trainer.temperature,
            return_stats=True,
            **(self._normalised() if term is None else {"reduction": "sum"}),
        )
        bonus_mask = tokens.mask if term is None else term.bonus_mask
        return Scored(loss, stats.logps, stats.entropy, bonus_mask)

    def _normalised(self) -> dict[str, Any]:
        """The weights of one pass. The bonus has the same for every token, so that where those of
        sequences differ they become factors of the policy term."""
        tokens, factors = self.tokens, self.tokens.correction
        reduction, normalizer, bonus = "sum", self.denominator, self.bonus
        if self.weights_differ and not bonus:
            reduction = "seq-mean-token-mean"
        elif self.weights_differ:
            normalizer, factors = self.bonus_tokens, tokens.weights * self.bonus_tokens
            if tokens.correction is not None:
                factors = factors * tokens.correction
        elif bonus:
            bonus *= float(self.denominator / self.bonus_tokens)  # waits for the device
        return {
            "reduction": reduction,
            "normalizer": normalizer,
            "token_weights": factors,
            "kl_coef": self.beta,
            "kl_ratio_weighted": self.kl_times_ratio,
            "entropy_coef": bonus,
        }

    def log_ratio(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """That of TRL's importance_sampling_level, expanded."""
        if self.level == "token":
            return log_ratio
        counts = mask.sum(-1, keepdim=True).clamp(min=1)
        return (torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True) / counts).expand_as(mask)

    def kl(self, logps: Tensor, ref_logps: Tensor, log_ratio: Tensor) -> Tensor:
        """TRL's estimate of each token; by its own, with the level's ratio, differentiated."""
        kl = formula.kl_term("k3", logps, ref_logps)
        return kl * log_ratio.exp() if self.kl_times_ratio else kl


class TokenTerm:
    """All of TRL's loss of a token, with its weight: an objective of two passes."""

    needs_entropy = True

    def __init__(self, loss: TokenLoss) -> None:
        self.loss, self.tokens = loss, loss.tokens
        self.bonus_mask = self.tokens.mask

    def __call__(self, terms: TokenTerms) -> Tensor:
        of, tokens, mask = self.loss, self.tokens, terms.mask
        log_ratio = of.log_ratio(terms.log_ratio, mask)
        kept, self.bonus_mask = self._masks(terms)
        policy = self._policy(terms._replace(log_ratio=log_ratio)) * kept
        if tokens.correction is not None and not isinstance(of.objective, Vespo):
            policy = policy * torch.where(mask, tokens.correction, 0.0)
        if of.beta != 0:
            assert terms.ref_logps is not None  # align
            policy = policy + of.beta * of.kl(terms.logps, terms.ref_logps, log_ratio)
        weighted = policy * tokens.weights
        if not of.bonus:
            return weighted
        assert terms.entropy is not None
        count = of.bonus_tokens
        if self.bonus_mask is not tokens.mask:
            count = self.bonus_mask.sum().clamp(min=1) * accumulation_steps(of.trainer)
        return weighted - of.bonus / count * torch.where(self.bonus_mask, terms.entropy, 0.0)

    def _policy(self, terms: TokenTerms) -> Tensor:
        if not isinstance(self.loss.objective, Vespo):
            return self.loss.objective(terms)
        args = self.loss.trainer.args
        phi = self.loss.trainer.get_gamma_weights(
            advantages=terms.advantages,
            log_ratio_per_token=(terms.logps - terms.old_logps).detach(),
            mask=terms.mask,
            importance_sampling_ratio=self.tokens.correction,
            k_pos=args.vespo_k_pos,
            lambda_pos=args.vespo_lambda_pos,
            k_neg=args.vespo_k_neg,
            lambda_neg=args.vespo_lambda_neg,
        )
        return -phi * terms.advantages * terms.logps

    def _masks(self, terms: TokenTerms) -> tuple[Tensor, Tensor]:
        """The tokens whose policy term counts, and those that the bonus acts on; TRL's own code."""
        trainer, tokens = self.loss.trainer, self.tokens
        kept = bonus_mask = tokens.mask
        if trainer.top_entropy_quantile < 1:
            assert terms.entropy is not None
            quantile = 1 - trainer.top_entropy_quantile
            entropy = terms.entropy.detach()
            kept = bonus_mask = trainer.get_high_entropy_mask(entropy, tokens.mask, quantile)
        if trainer.off_policy_mask_threshold is not None:
            sampling = tokens.sampling_logps
            kept = kept & trainer.get_off_policy_mask(
                terms.advantages,
                terms.logps.detach(),
                terms.old_logps if sampling is None else sampling,
                tokens.mask,
                trainer.off_policy_mask_threshold,
            )
        return kept, bonus_mask


def needs_all_tokens(trainer: Any) -> bool:
    """Whether a token's loss depends on the log-probs or entropies of the others."""
    by_sequence = trainer.importance_sampling_level == "sequence" or trainer.loss_type == "vespo"
    return (
        by_sequence
        or trainer.top_entropy_quantile < 1
        or trainer.off_policy_mask_threshold is not None
    )


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


def loss_terms(loss_of: TokenLoss, scored: Scored) -> LossTerms:
    """From the scores of all tokens of the micro-batch."""
    tokens = loss_of.tokens
    logps, entropy, mask, bonus_mask = scored.logps, scored.entropy, tokens.mask, scored.bonus_mask
    old_logps = logps if tokens.old_logps is None else tokens.old_logps
    shape, region = Shape("torch"), None
    if isinstance(loss_of.objective, Objective):
        shape, region = loss_of.objective.shape(), loss_of.objective.trust_region()
    stats = collect_stats(
        logps.flatten(),
        entropy.flatten(),
        mask.flatten(),
        TokenInputs(tokens.advantages.flatten(), old_logps.flatten()),
        LossSettings(shape),
        region,
        mask.shape,
    )
    if tokens.ref_logps is not None and loss_of.beta != 0:
        log_ratio = loss_of.log_ratio(logps - old_logps, mask)
        kl = loss_of.kl(logps, tokens.ref_logps, log_ratio)
        stats = stats._replace(ref_kl=torch.where(mask, kl, 0.0).sum() / mask.sum())
    trainer = loss_of.trainer
    steps = accumulation_steps(trainer)
    policy = scored.loss.detach()
    if loss_of.bonus:
        bonus = torch.where(bonus_mask, entropy, torch.zeros_like(entropy)).sum()
        policy = policy + loss_of.bonus * bonus / (bonus_mask.sum().clamp(min=1) * steps)
    if trainer.loss_type not in SPANNING:
        policy = policy * steps
    return LossTerms(policy, stats, mask, bonus_mask)
