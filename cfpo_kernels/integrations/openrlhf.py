"""CFPO in OpenRLHF: its PolicyLoss with one line changed, and log-probs without logits.

OpenRLHF has no registry of losses; :mod:`.openrlhf_ray` puts these in place by one line of
configuration, :func:`use_cfpo` in a process of your own.
"""

from __future__ import annotations

from functools import partial, wraps
from inspect import signature
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..from_logps import policy_loss_from_logps
from ..linear import linear_token_logps
from ..objectives import CFPO
from ..two_pass import TokenTerms
from ._head import AfterHead, HeadOutputChangedError, after_head, replaceable_head, run_in_head
from ._logps import entropy_of_rows, logps_of_labels, replace_everywhere

try:
    import openrlhf.models.actor as openrlhf_actor
    import openrlhf.models.loss as openrlhf_loss
except ImportError as error:
    raise ImportError(
        "cfpo_kernels.integrations.openrlhf needs OpenRLHF, with its flash-attn and deepspeed: "
        "pip install 'openrlhf>=0.11.2'"
    ) from error

__all__ = ["PolicyLoss", "log_probs_from_logits", "use_cfpo"]

# OpenRLHF's own loss clamps log r to this range before it takes its exponential.
LOG_RATIO_CLIP = 20.0
_ActorForward = openrlhf_actor.Actor.forward
_FORWARD_SIGNATURE = signature(_ActorForward)
_unpad_and_slice_tensor = openrlhf_actor.unpad_and_slice_tensor


class PolicyLoss(openrlhf_loss.PolicyLoss):
    """OpenRLHF's PolicyLoss with the CFPO objective in the place of the clipped one.

    Aggregation, normalisers and the correction for the rollout's log-probs are OpenRLHF's own code.

    Args:
        clip_eps_low, clip_eps_high: CFPO's epsilon for A < 0 and for A > 0.
        dual_clip: must be None.
        policy_loss_type: "ppo" or "cfpo": CFPO of each token's ratio; "gspo": of its sequence's.
        others: as OpenRLHF's.

    Raises:
        ValueError: an argument that CFPO cannot take; the message says what to set.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        **others: Any,
    ) -> None:
        if dual_clip is not None:
            raise ValueError(
                f"dual_clip={dual_clip} has no meaning for CFPO, which clips nothing: leave "
                "--actor.dual_clip unset"
            )
        if policy_loss_type not in ("ppo", "cfpo", "gspo"):
            raise ValueError(
                f"policy_loss_type={policy_loss_type!r} is unknown: set --actor.policy_loss_type "
                "to 'ppo' to train with CFPO, or to 'gspo' for ratios of whole sequences"
            )
        kind = "gspo" if policy_loss_type == "gspo" else "ppo"
        super().__init__(
            clip_eps_low, clip_eps_high, None, token_level_loss, policy_loss_type=kind, **others
        )
        self.by_sequence = kind == "gspo"
        # OpenRLHF clamps the log-ratios of tokens only.
        clip = None if self.by_sequence else LOG_RATIO_CLIP
        self.objective = CFPO(clip_eps_low, clip, epsilon_high=clip_eps_high)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        **normalizers: Any,
    ) -> tuple[Any, ...]:
        """As OpenRLHF's, with all arguments (B, T).

        Returns:
            What OpenRLHF's returns, (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio), where
            clip_ratio is the share of tokens with |r - 1| > epsilon: CFPO clips none.
        """
        if self.is_correction_level != "off" and rollout_log_probs is None:
            raise ValueError(
                "rollout_log_probs must be given where is_correction_level is "
                f"{self.is_correction_level!r}: set --algo.advantage.is_correction_level off, or "
                "have the rollout return its log-probs"
            )
        if action_mask is not None:  # NaN times 0 is NaN, so what is masked is cleaned first

            def cleaned(x: Tensor) -> Tensor:
                return torch.where(action_mask != 0, x, 0.0)

            log_probs, old_log_probs = cleaned(log_probs), cleaned(old_log_probs)
            advantages = cleaned(advantages)
            rollout_log_probs = None if rollout_log_probs is None else cleaned(rollout_log_probs)
        others = {"action_mask": action_mask, "rollout_log_probs": rollout_log_probs, **normalizers}
        with torch.no_grad():
            _, _, ppo_kl, *rest = super().forward(log_probs, old_log_probs, advantages, **others)
        token_weights = self._token_weights(old_log_probs, others)
        anchor = old_log_probs
        if self.by_sequence and rollout_log_probs is not None and self.is_correction_level != "off":
            anchor = rollout_log_probs  # as in OpenRLHF
        given = (log_probs, advantages, anchor)
        how: dict[str, Any] = {
            "mask": action_mask,
            "token_weights": token_weights,
            "reduction": "sum",
        }
        objective: Any = self._of_sequences if self.by_sequence else self.objective
        loss, stats = policy_loss_from_logps(*given, objective=objective, return_stats=True, **how)
        if self.by_sequence:
            with torch.no_grad():
                _, stats = policy_loss_from_logps(
                    *given,
                    objective=self.objective,
                    ratio_level="sequence",
                    return_stats=True,
                    **how,
                )
        return loss, stats.outside_fraction, ppo_kl, *rest

    def _of_sequences(self, terms: TokenTerms) -> Tensor:
        """The loss of each token by its sequence's ratio, differentiated through the mean.

        ``ratio_level="sequence"`` would take GSPO-token for advantages that come by token.
        """
        counts = terms.mask.sum(-1, keepdim=True).clamp(min=1)
        mean = (terms.log_ratio * terms.mask).sum(-1, keepdim=True) / counts
        return self.objective(terms._replace(log_ratio=mean.expand_as(terms.log_ratio)))

    def _token_weights(self, old_log_probs: Tensor, others: dict[str, Any]) -> Tensor:
        """The factor (B, T) by which each token's loss enters OpenRLHF's.

        OpenRLHF's loss is linear in the losses of tokens. With A = -1 at r = 1 that of a token is
        r, whose derivative is 1; so the factors are the gradient, whatever the settings are.
        """
        with torch.enable_grad():
            logps = old_log_probs.detach().float().requires_grad_()
            minus_one = torch.full_like(logps, -1.0)
            if self.by_sequence:  # whose ratio may be to these
                others = others | {"rollout_log_probs": logps.detach()}
            loss, *_ = super().forward(logps, logps.detach(), minus_one, **others)
            return torch.autograd.grad(loss, logps)[0]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """OpenRLHF's function of this name over :func:`cfpo_kernels.token_logps`.

    Args:
        logits: (..., V) float32, bfloat16 or float16; not modified, unlike by OpenRLHF's.
        labels: (...) int64.

    Returns:
        (...) float32. No float32 copy of the logits is made.
    """
    return logps_of_labels(logits, labels, temperature=temperature)


class _NoLogits:
    """Stands for logits inside Actor.forward, whose steps have been taken: in the head's place."""

    logits = None

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def to(self, dtype: torch.dtype) -> _NoLogits:
        return self

    def div_(self, temperature: float) -> _NoLogits:
        return self

    def entropy(self) -> Tensor:
        return self.values[1]

    def log_probs(self, labels: Tensor) -> Tensor:
        return self.values[0]


class _ModelLogits:
    """Stands for a model's logits inside Actor.forward: takes its steps without doing them."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.logits = logits
        self.temperature = temperature
        self.entropy_reads_them = False

    def to(self, dtype: torch.dtype) -> _ModelLogits:
        return self  # the kernels accumulate in float32 whatever they read

    def div_(self, temperature: float) -> _ModelLogits:
        return self

    def entropy(self) -> Tensor:
        self.entropy_reads_them = True
        return entropy_of_rows(self.logits, temperature=self.temperature)

    def log_probs(self, labels: Tensor) -> Tensor:
        return logps_of_labels(
            self.logits,
            labels,
            temperature=self.temperature,
            inplace=not self.entropy_reads_them,
        )


def _compute_entropy(logits: Any) -> Tensor:
    return (
        logits.entropy()
        if isinstance(logits, (_NoLogits, _ModelLogits))
        else entropy_of_rows(logits)
    )


def _log_probs_from_logits(logits: Any, labels: Tensor, temperature: float = 1.0) -> Tensor:
    if isinstance(logits, (_NoLogits, _ModelLogits)):
        return logits.log_probs(labels)
    return log_probs_from_logits(logits, labels, temperature)


class _ModelCall:
    """Stands for an actor's model in one call of Actor.forward, and returns no logits.

    Log-probs and entropies are computed in the head's place, from hidden states, of the rows that
    are asked for; or from the model's logits, where it does more than its head and config say.
    """

    changes_logits: ClassVar[WeakSet[nn.Module]] = WeakSet()

    def __init__(self, actor: Any, arguments: dict[str, Any]) -> None:
        self.model, self.temperature = actor.model, actor.temperature
        self.arguments = arguments
        self.packed: tuple[Any, ...] | None = None

    def unpad_and_slice_tensor(self, *arguments: Any) -> tuple[Any, ...]:
        """OpenRLHF's, where samples are packed."""
        self.packed = _unpad_and_slice_tensor(*arguments)
        return self.packed

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        def run() -> Any:
            return self.model(*arguments, **named)

        model = getattr(self.model, "module", self.model)  # DeepSpeed's engine has it
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
        head = None if model in self.changes_logits else replaceable_head(model)
        if head is not None:
            after = after_head(model)
            try:
                output, values = run_in_head(run, head, after, partial(self.scores, head, after))
            except HeadOutputChangedError:
                self.changes_logits.add(model)
                output, values = run(), None
        else:
            output, values = run(), None
        if values is not None:
            output["logits"] = _NoLogits(values)
        else:
            output["logits"] = _ModelLogits(output["logits"], self.temperature)
        return output

    def scores(self, head: nn.Linear, after: AfterHead, hidden: Tensor) -> Tensor:
        """log-probs (1, ...), or with entropies (2, ...), of the rows that the model has."""
        labels, wanted = self.rows()
        n_wanted = None
        if wanted is not None and wanted.device.type != "cpu":
            n_wanted = max(1, int(wanted.sum()))  # waits for the device
        found = linear_token_logps(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            mask=wanted,
            temperature=self.temperature,
            logit_scale=after.scale,
            softcap=after.softcap,
            return_entropy=bool(self.arguments.get("return_entropy")),
            active_tokens=n_wanted,
        )
        return found[None] if isinstance(found, Tensor) else torch.stack(found)

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Their labels, and which of them are asked for; None: all."""
        sequences, action_mask = self.arguments["sequences"], self.arguments.get("action_mask")
        wanted = None
        if action_mask is not None:
            wanted = torch.zeros_like(sequences, dtype=torch.bool)
            wanted[:, -action_mask.shape[1] - 1 : -1] = action_mask != 0
        if self.packed is None:
            return torch.roll(sequences, -1, 1), wanted
        _, _, labels, _, indices = self.packed
        if wanted is None or self.arguments.get("ring_attn_group") is not None:  # it splits rows
            return labels, None
        return labels, wanted.flatten()[indices][None]


@wraps(_ActorForward)
def _actor_forward(self: Any, *arguments: Any, **named: Any) -> Any:
    given = _FORWARD_SIGNATURE.bind(self, *arguments, **named).arguments
    if given.get("action_mask") is None and not given.get("return_logprobs"):
        return _ActorForward(self, *arguments, **named)  # the logits are wanted
    call = _ModelCall(self, given)
    # In the instance's dict it comes before the submodule of that name, which stays registered.
    self.__dict__["model"] = call
    openrlhf_actor.unpad_and_slice_tensor = call.unpad_and_slice_tensor
    try:
        result = _ActorForward(self, *arguments, **named)
    finally:
        del self.__dict__["model"]
        openrlhf_actor.unpad_and_slice_tensor = _unpad_and_slice_tensor
    if given.get("return_output"):
        result[1]["logits"] = result[1]["logits"].logits
    return result


def use_cfpo(*, fused_log_probs: bool = True) -> None:
    """Puts CFPO in the place of OpenRLHF's PPO loss, in this process; may be called again.

    Args:
        fused_log_probs: also let Actor.forward take log-probs and entropies by
            :func:`cfpo_kernels.linear_token_logps`, in the place of the model's head: no logits
            exist but a tile of them, and prompts and padding are not multiplied; log-probs and
            entropies are 0 there, and the output's logits are None. Of a model whose head is no
            plain linear layer by :func:`cfpo_kernels.token_logps`, from its own logits, which
            backward overwrites where no entropy is wanted.
    """
    replace_everywhere(openrlhf_loss, {"PolicyLoss": PolicyLoss})
    if fused_log_probs:
        openrlhf_actor.compute_entropy = _compute_entropy
        openrlhf_actor.log_probs_from_logits = _log_probs_from_logits
        openrlhf_actor.Actor.forward = _actor_forward
