"""What a loss needs that looks beyond one token, or is written in torch.

Such a loss is stage 1 in a kernel, torch over N numbers, and stage 3 in a kernel again: two reads
and one write of the logits, in place where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import TokenInputs
from .weights import sequence_totals


class TokenTerms(NamedTuple):
    """What a callable objective is given, of the shape of token_ids; numbers are 0 where masked.

    Attributes:
        logps: log p of the tokens, in nats; differentiable, as is what was made of them.
        old_logps: those of the old policy; logps, detached, where none were given.
        log_ratio: logps - old_logps, or, with ratio_level="sequence", that of the token's sequence.
        advantages: expanded where one a sequence was given.
        entropy: of the rows, in nats, differentiable; None unless the callable has an attribute
            ``needs_entropy = True``.
        ref_logps, token_weights: None where not given. The weights are applied to the result.
        mask: bool.
        cu_seqlens: as given.

    Example:
        >>> def tilted(terms):  # importance sampling, its weight at most 2 and detached
        ...     return -terms.log_ratio.exp().clamp(max=2).detach() * terms.advantages * terms.logps
        >>> logps = torch.tensor([-1.0, -2.0])
        >>> cfpo_kernels.policy_loss_from_logps(logps, torch.ones(2), objective=tilted)
        tensor(1.5000)
    """

    logps: Tensor
    old_logps: Tensor
    log_ratio: Tensor
    advantages: Tensor
    entropy: Tensor | None
    ref_logps: Tensor | None
    token_weights: Tensor | None
    mask: Tensor
    cu_seqlens: Tensor | None


class TorchObjective(NamedTuple):
    """A callable TokenTerms -> loss of each token, and what it is to be given of the call."""

    function: Callable[[TokenTerms], Tensor]
    shape: torch.Size  # of the caller's tokens
    cu_seqlens: Tensor | None

    @property
    def needs_entropy(self) -> bool:
        return bool(getattr(self.function, "needs_entropy", False))

    def __call__(
        self,
        logps: Tensor,
        log_ratio: Tensor,
        inputs: TokenInputs,
        entropy: Tensor | None,
        active: Tensor,
    ) -> Tensor:
        """(N,) from (N,)."""

        def shaped(x: Tensor | None) -> Any:
            return None if x is None else x.reshape(self.shape)

        terms = TokenTerms(
            shaped(logps),
            shaped(logps.detach() if inputs.old_logps is None else inputs.old_logps),
            shaped(log_ratio),
            shaped(inputs.advantages),
            shaped(entropy) if self.needs_entropy else None,
            shaped(inputs.ref_logps),
            shaped(inputs.token_weights),
            shaped(active),
            self.cu_seqlens,
        )
        loss = self.function(terms)
        name = getattr(self.function, "__name__", type(self.function).__name__)
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            got = f"a tensor of {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"objective {name} must return a floating-point tensor, got {got}")
        if loss.shape != self.shape:
            raise ValueError(
                f"objective {name} must return a loss a token, of shape {tuple(self.shape)}, "
                f"got {tuple(loss.shape)}"
            )
        if not torch.compiler.is_compiling():
            _refuse_other_gradients(name, loss, terms)
        return loss.reshape(-1).to(logps.dtype)


def _refuse_other_gradients(name: str, loss: Tensor, terms: TokenTerms) -> None:
    """Gradients reach logps and entropy only; another one would be lost without a word."""
    known = {id(x.grad_fn) for x in terms if isinstance(x, Tensor) and x.grad_fn is not None}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in known:
            continue
        known.add(id(node))
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            raise ValueError(
                f"objective {name} depends on a tensor of shape {tuple(leaf.shape)} that requires "
                "a gradient: only those of logps and entropy are taken, so detach it"
            )
        waiting += [following for following, _ in node.next_functions]


class _AllReduced(torch.autograd.Function):
    """The sum over processes, each of which uses it: so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, total = group, x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return _AllReduced.apply(dx, ctx.group), None


@dataclass(frozen=True)
class SequenceRatio:
    """The mean log-ratio of a token's sequence in the place of its own (GSPO, arXiv 2507.18071)."""

    index: Tensor  # (N,) int64, the sequence of each token; rises
    n_sequences: int
    longest: int  # at least the length of the longest sequence
    by_token: bool  # GSPO-token: a token's own log-prob is all that its loss is differentiated by
    group: Any = None  # the process group over which sequences are split

    def any(self, chosen: Tensor) -> Tensor:
        """Whether one of a token's sequence is chosen; (N,) bool from (N,)."""
        counts = sequence_totals(chosen.to(torch.int64), self.index, self.n_sequences, self.longest)
        return counts[self.index] > 0

    def of(self, take: Callable[[Tensor], Tensor], n_sequences: int | None) -> SequenceRatio:
        """That of some rows, which `take` takes of (N,) tensors in order; of whole sequences.

        n_sequences: how many these are, where they follow each other; None: it is counted, for
            which a GPU would be waited for.
        """
        index = take(self.index)
        if n_sequences is None:
            kept, index = torch.unique_consecutive(index, return_inverse=True)
            n_sequences = kept.shape[0]
        else:
            index = index - index[:1]
        return SequenceRatio(index, n_sequences, self.longest, self.by_token, self.group)

    def mean(self, log_ratio: Tensor, active: Tensor) -> Tensor:
        """(N,) from (N,); 0 where not active."""
        values = torch.where(active, log_ratio, torch.zeros_like(log_ratio)).double()
        where = (self.index, self.n_sequences, self.longest)
        sums = torch.stack(
            [sequence_totals(values, *where), sequence_totals(active.double(), *where)]
        )
        if self.group is not None:
            sums = _AllReduced.apply(sums, self.group)
        means = sums[0] / sums[1].clamp(min=1)
        return torch.where(active, means[self.index].to(log_ratio.dtype), 0)

    def __call__(self, log_ratio: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The log-ratio for the objective, and that for a KL estimate that is weighted by it.

        The latter's derivative is always the token's own: that of a shared factor would bring the
        sum of a sequence's KL estimates to each of its tokens.
        """
        shared = self.mean(log_ratio, active)
        own = torch.where(log_ratio.isfinite(), log_ratio, torch.zeros_like(log_ratio))
        of_token = shared.detach() + (own - own.detach())
        return (of_token if self.by_token else shared), of_token


class Beyond(NamedTuple):
    """What makes a loss one of two passes; neither: one pass does."""

    function: TorchObjective | None = None
    ratio: SequenceRatio | None = None

    def __bool__(self) -> bool:
        return self.function is not None or self.ratio is not None

    @property
    def needs_entropy(self) -> bool:
        return self.function is not None and self.function.needs_entropy
