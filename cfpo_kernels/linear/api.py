"""The public functions: check, choose the rows and the way, run, reduce."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends, validation
from ..api import BACKENDS, policy_loss, token_logps
from ..formula import is_idle
from ..inputs import LogRatioBounds
from ..objectives import CFPO
from ..reference import capped
from ..runners import runner
from ..shapes import SCORE
from ..stats import CFPOStats, collect_stats
from ..tiles import tiles
from ..transforms import refuse_transforms
from ..validation import AnyObjective, LossTerms, Rows, values
from ..validation.rows import check_hidden_rows
from ..validation.scalars import positive_int, positive_number
from ..vocab_parallel import Shards, VocabParallel, from_dtensors, shared_by_all
from .arguments import check_parameters, is_dtensor, precision
from .batch import Batch, Parameters
from .fused import fused_loss
from .plan import (
    LEAST_ROWS,
    MOST_ROWS,
    Chunk,
    Selection,
    by_sequence,
    default_chunk,
    in_order,
    select,
)
from .scores import scores_of
from .support import check_support, positions, support_logits

ACCUMULATE = ("float32", "weight")
# Sums in the weight's dtype round once a product: from here on that shows.
FEW_CHUNKS = 4


@torch.compiler.disable
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    *,
    objective: AnyObjective,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    log_ratio_bounds: LogRatioBounds | None = None,
    ratio_level: str = "token",
    sequence_group: Any = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_ratio_weighted: bool = False,
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    support: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
    chunk_tokens: int | None = None,
    active_tokens: int | None = None,
    accumulate: str = "float32",
    low_memory: bool = False,
    grad_scale: float | Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CFPOStats]:
    """:func:`linear_cfpo_loss` with any objective.

    Args:
        objective: see :func:`policy_loss`. A callable takes four matrix products where a named
            objective takes three, unless all rows fit one tile.
        others: see :func:`linear_cfpo_loss`.

    Returns, raises, memory: see :func:`linear_cfpo_loss`.

    Example:
        >>> hidden, weight = torch.randn(6, 16), torch.randn(1000, 16, requires_grad=True)
        >>> token_ids, advantages = torch.randint(0, 1000, (6,)), torch.randn(6)
        >>> objective = cfpo_kernels.PPOClip(0.2, 0.28)
        >>> loss, stats = cfpo_kernels.linear_policy_loss(
        ...     hidden, weight, token_ids, advantages, objective=objective, return_stats=True
        ... )
        >>> loss.backward()
        >>> stats.ratio_max
        tensor(1.)
    """
    chosen = validation.check_objective(objective)
    validation.check_flag("return_stats", return_stats)
    head = _Head(
        hidden,
        weight,
        bias,
        lora,
        logit_scale=logit_scale,
        softcap=softcap,
        logits_dtype=logits_dtype,
        vocab_parallel=vocab_parallel,
        chunk_tokens=chunk_tokens,
        accumulate=accumulate,
        backend=backend,
    )
    rows = head.rows(token_ids, mask, temperature)
    numbers: dict[str, Any] = {
        "advantages": advantages,
        "old_logps": old_logps,
        "reduction": reduction,
        "normalizer": normalizer,
        "cu_seqlens": cu_seqlens,
        "token_weights": token_weights,
        "ref_logps": ref_logps,
        "log_ratio_bounds": log_ratio_bounds,
        "ratio_level": ratio_level,
        "sequence_group": sequence_group,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "kl_ratio_weighted": kl_ratio_weighted,
        "entropy_coef": entropy_coef,
        "grad_scale": grad_scale,
    }
    if support is not None:
        _refuse_with_support(
            low_memory=validation.check_flag("low_memory", low_memory),
            accumulate=accumulate,
            active_tokens=_active_tokens(active_tokens),
        )
        return policy_loss(
            *head.logits_of(support, rows),
            objective=chosen,
            mask=mask,
            temperature=head.temperature(rows),
            backend=backend,
            return_stats=return_stats,
            **numbers,
        )
    late = validation.check_flag("low_memory", low_memory) or reduction == "none"
    with torch.no_grad():
        given = validation.check_loss_terms(rows, chosen, **numbers)
        terms = given if late else _by_tokens(rows, given)
        if head.shards is not None:
            head.shards.refuse_differences(rows, terms)
        selection = select(
            rows.active, _idle(rows, terms), return_stats, _active_tokens(active_tokens)
        )
    wanted = None if late else _chunks_of_whole_losses(selection, rows, terms, head.chunk)
    one_pass = wanted is not None and not terms.beyond and head.shards is None
    validation.check_formula(chosen, head.runs_triton and one_pass and not given.beyond)
    batch = head.batch(rows, selection, wanted)
    if wanted is not None:
        loss, logps, entropy = fused_loss(batch, terms, head.parameters, return_stats)
    else:
        needs_entropy = terms.settings.needs_entropy or terms.beyond.needs_entropy
        logps, entropy, _ = scores_of(
            batch,
            head.parameters,
            needs_entropy or return_stats,
            entropy_grad=needs_entropy,
            rounded=False,
        )
        loss = batch.tiles.token_losses(
            logps, entropy, terms.weights, terms.inputs, terms.settings, terms.beyond
        )
        loss = loss.reshape(rows.shape) if reduction == "none" else loss.sum()
    if selection.too_many is not None:
        loss = _refuse_too_many(loss, selection.too_many)
    if not return_stats:
        return loss
    with torch.no_grad():
        stats = collect_stats(
            logps,
            entropy,
            rows.active,
            given.inputs,
            given.settings,
            given.region,
            rows.shape,
            given.beyond,
        )
    return loss, stats


def linear_cfpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    log_ratio_bounds: LogRatioBounds | None = None,
    ratio_level: str = "token",
    sequence_group: Any = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_ratio_weighted: bool = False,
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    support: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
    chunk_tokens: int | None = None,
    active_tokens: int | None = None,
    accumulate: str = "float32",
    low_memory: bool = False,
    grad_scale: float | Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CFPOStats]:
    """:func:`cfpo_loss` of ``logits = hidden @ weight.T + bias``, which never exist whole.

    Tokens are multiplied ``chunk_tokens`` at a time, and the gradients of a chunk are taken before
    the next one: three matrix products a token (two with a frozen weight, one without a gradient).
    Masked tokens are not multiplied, nor are those whose loss is 0 whatever their logits are: with
    an advantage of 0, no KL term and no entropy bonus. Normalisers and statistics are those of
    the mask all the same.

    Args:
        hidden: (..., H) float32, bfloat16 or float16, what the head is applied to. Differentiable,
            like the head's parameters.
        weight: (V, H), the head, as in ``nn.Linear``, in the dtype of hidden (under autocast both
            are cast). A view of a larger one will do, such as ``weight[:vocab_size]``.
        bias: (V,), or None.
        lora: a pair (u, B) of an adapter on the head, ``u = scale * hidden @ A.T`` (..., r) and
            ``B`` (V, r), both differentiable: logits gain ``u @ B.T``, and no merged weight exists.
        logit_scale: positive number that multiplies the logits.
        softcap: positive number c: logits are ``c * tanh(logits / c)``, after logit_scale and
            before the temperature (Gemma). In float32.
        logits_dtype: float32 keeps the logits of a head of lower dtype in float32, and keeps
            autocast away from a float32 head. None: the dtype of the product. With a softcap None
            is float32, and the dtype of the product rounds the logits to it before the cap, which
            is in float32 then too: as a scorer has them that takes them from a head of that dtype.
        support: (..., k) int64 or int32, the token ids among which the sampler chose (top-k,
            top-p), -1 for padding: the softmax is over these alone, so that r is unbiased. The
            sampled token has to be among them. No product over the vocabulary is made at all, so
            low_memory, accumulate="weight" and active_tokens are refused.
        vocab_parallel: weight and bias are one process's part of the vocabulary, see
            :class:`VocabParallel`.
        chunk_tokens: rows of each product. The last one is filled up with zeros (and all to 16), so
            that a token's bits do not depend on the others: use one number for scoring and for
            training, and none much larger than the tokens that there are, for a tile has all of
            its rows. At most 2^24. None: from V, dtype and kind of device, 128 on a CPU.
        active_tokens: at least as many tokens as are unmasked, where the mask is on a GPU: only so
            many are multiplied, without waiting for the device. More unmasked tokens than that make
            the loss, or the log-probs, NaN. None: on a GPU all tokens are multiplied.
        accumulate: "float32", or "weight": sums over chunks in the weight's dtype, for at most
            four chunks.
        low_memory: the weight's gradient is made in backward, slice by slice of the vocabulary and
            in its final dtype, at the price of a fourth product.
        grad_scale: see :func:`cfpo_loss`. The incoming gradient has that scale already where the
            loss takes two passes (low_memory, reduction="none", a callable), and it is not needed.
        others: see :func:`cfpo_loss`, with (B, T, H) for (B, T, V) and packed (N, H) for (N, V).

    Returns, raises: see :func:`cfpo_loss`. Also
        TypeError, ValueError: a head that is quantised, sharded outside its forward, or empty.

    Memory: chunk_tokens x V logits; in float32 the gradient of the weight while there are several
    chunks; the gradients. With low_memory no float32 gradient of the weight, but one of hidden, and
    one tile of logits until backward. docs/linear.md has the formulas and what each option costs.

    Under torch.compile this breaks the graph.

    Source: as :func:`cfpo_loss`; docs/linear.md derives the schedules.

    Example:
        >>> hidden = torch.randn(6, 16, requires_grad=True)
        >>> head = torch.nn.Linear(16, 1000, bias=False)
        >>> token_ids, advantages = torch.randint(0, 1000, (6,)), torch.randn(6)
        >>> old_logps = cfpo_kernels.linear_token_logps(hidden, head.weight, token_ids).detach()
        >>> loss = cfpo_kernels.linear_cfpo_loss(
        ...     hidden, head.weight, token_ids, advantages, old_logps
        ... )
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 16])
    """
    return linear_policy_loss(
        hidden,
        weight,
        token_ids,
        advantages,
        old_logps,
        objective=CFPO(epsilon=epsilon, epsilon_high=epsilon_high),
        bias=bias,
        lora=lora,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        token_weights=token_weights,
        ref_logps=ref_logps,
        log_ratio_bounds=log_ratio_bounds,
        ratio_level=ratio_level,
        sequence_group=sequence_group,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_ratio_weighted=kl_ratio_weighted,
        entropy_coef=entropy_coef,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        logits_dtype=logits_dtype,
        support=support,
        vocab_parallel=vocab_parallel,
        chunk_tokens=chunk_tokens,
        active_tokens=active_tokens,
        accumulate=accumulate,
        low_memory=low_memory,
        grad_scale=grad_scale,
        backend=backend,
        return_stats=return_stats,
    )


@torch.compiler.disable
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    support: Tensor | None = None,
    return_entropy: bool = False,
    entropy_grad: bool = True,
    vocab_parallel: VocabParallel | None = None,
    chunk_tokens: int | None = None,
    active_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """log p of the tokens from hidden states: :func:`token_logps` of logits that never exist whole.

    Bitwise what :func:`linear_policy_loss` computes with the same head and ``chunk_tokens``,
    whichever tokens are left out there: r is exactly 1 for the policy that scored.

    Args:
        return_entropy: also return the rows' entropies.
        entropy_grad: they are differentiable. False, where they are for a log only: a frozen head
            then takes two products, as without entropies.
        others: see :func:`linear_cfpo_loss`.

    Returns:
        (...) float32, in nats, 0 where masked, differentiable; or a pair with the entropies.

    Raises: see :func:`linear_cfpo_loss`.

    Memory and products: without a gradient one product and a tile of logits. With a frozen head,
    and without a gradient of entropies, two products, and forward keeps a gradient of hidden.
    Otherwise backward multiplies all but the last tile again, four products, over the vocabulary in
    slices.

    Example:
        >>> hidden, weight = torch.zeros(2, 3, 16), torch.randn(1000, 16)
        >>> token_ids = torch.randint(0, 1000, (2, 3))
        >>> cfpo_kernels.linear_token_logps(hidden, weight, token_ids).exp()
        tensor([[0.0010, 0.0010, 0.0010],
                [0.0010, 0.0010, 0.0010]])
    """
    validation.check_flag("return_entropy", return_entropy)
    validation.check_flag("entropy_grad", entropy_grad)
    head = _Head(
        hidden,
        weight,
        bias,
        lora,
        logit_scale=logit_scale,
        softcap=softcap,
        logits_dtype=logits_dtype,
        vocab_parallel=vocab_parallel,
        chunk_tokens=chunk_tokens,
        accumulate="float32",
        backend=backend,
    )
    rows = head.rows(token_ids, mask, temperature)
    if support is not None:
        _refuse_with_support(active_tokens=_active_tokens(active_tokens))
        found = token_logps(
            *head.logits_of(support, rows),
            mask=mask,
            temperature=head.temperature(rows),
            return_entropy=return_entropy,
            backend=backend,
        )
        return (found[0], found[1].detach()) if return_entropy and not entropy_grad else found
    if head.shards is not None:
        head.shards.refuse_differences(rows)
    selection = select(rows.active, None, False, _active_tokens(active_tokens))
    batch = head.batch(rows, selection, None)
    logps, entropy, _ = scores_of(
        batch, head.parameters, return_entropy, entropy_grad=entropy_grad, rounded=True
    )
    if selection.too_many is not None:
        logps = _refuse_too_many(logps, selection.too_many)
    logps = logps.reshape(rows.shape)
    return (logps, entropy.reshape(rows.shape)) if return_entropy else logps


class _Head:
    """A call's checked head and hidden states, and how they are multiplied."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora: tuple[Tensor, Tensor] | None,
        *,
        logit_scale: object,
        softcap: object,
        logits_dtype: object,
        vocab_parallel: object,
        chunk_tokens: object,
        accumulate: object,
        backend: object,
    ) -> None:
        chosen = validation.check_choice("backend", backend, BACKENDS)
        self.scale = positive_number("logit_scale", logit_scale)
        self.softcap = _softcap(softcap, self.scale)
        self.accumulates = (
            validation.check_choice("accumulate", accumulate, ACCUMULATE) == "float32"
        )
        if is_dtensor(weight) and is_dtensor(hidden):
            hidden, weight, bias, lora, vocab_parallel = from_dtensors(hidden, weight, bias, lora)
        takes_float64 = chosen == backends.REFERENCE
        self.parameters, shape = check_parameters(hidden, weight, bias, lora, takes_float64)
        for parameter in self.parameters:
            if parameter is not None:
                refuse_transforms(parameter, "from whole logits, backend='reference' supports it")
        widest = self.n_cols = self.parameters.weight.shape[0]
        self.shards = None
        if vocab_parallel is not None:
            self.shards = Shards.of(vocab_parallel, self.n_cols, self.parameters.weight.device)
            assert isinstance(vocab_parallel, VocabParallel)  # Shards.of
            widest = self.shards.vocab_size  # the same on each process
            self.parameters, shape = _of_all(self.parameters, shape, vocab_parallel)
        self.hidden = self.parameters.hidden.reshape(*shape, hidden.shape[-1])
        self.dtypes = precision(self.parameters, logits_dtype, self.softcap != 0)
        device = self.hidden.device
        resolved = backends.resolve(chosen, device, self.dtypes.logits, self.n_cols)
        if self.shards is not None:
            resolved = self.shards.agree(chosen, resolved, device, self.dtypes.logits)
        self.tiles = tiles(resolved, self.hidden)
        self.runs_triton = runner(resolved).runs_triton
        self.chunk = default_chunk(widest, self.dtypes.logits, device)
        if chunk_tokens is not None:
            self.chunk = positive_int("chunk_tokens", chunk_tokens)
            if self.chunk > MOST_ROWS:
                raise ValueError(f"chunk_tokens must be at most {MOST_ROWS}, got {self.chunk}")

    def rows(self, token_ids: object, mask: object, temperature: object) -> Rows:
        rows = check_hidden_rows(
            self.hidden, token_ids, mask=mask, temperature=temperature, logit_scale=self.scale
        )
        if values.can_be_checked(rows.token_ids):
            n_cols = self.n_cols if self.shards is None else self.shards.vocab_size
            values.check_token_range(rows.token_ids, rows.active, n_cols, rows.shape)
        return rows

    def temperature(self, rows: Rows) -> Tensor:
        """As the functions that take logits accept it."""
        return rows.temperature.reshape(rows.shape if rows.temperature.numel() > 1 else ())

    def logits_of(self, support: object, rows: Rows) -> tuple[Tensor, Tensor]:
        """(..., k), and which of them each token is."""
        if self.shards is not None:
            raise ValueError(
                "support must be None with vocab_parallel: the tokens that were kept are few "
                "enough for each process, give it their rows of the whole head"
            )
        ids = check_support(support, rows, self.n_cols)
        logits = support_logits(
            self.parameters, rows, ids, self.dtypes.operands, self.dtypes.logits
        )
        logits = logits.to(self.dtypes.rounded).to(self.dtypes.logits)
        if self.softcap:
            logits = torch.where(ids < 0, logits, capped(logits, self.softcap))
        chosen = positions(ids, rows.token_ids).reshape(rows.shape)
        return logits.reshape(*rows.shape, logits.shape[-1]), chosen

    def batch(self, rows: Rows, selection: Selection, wanted: list[Chunk] | None) -> Batch:
        if wanted is None:
            wanted = in_order(selection.index, rows.active.shape[0], self.chunk)
        if not self.accumulates and len(wanted) > FEW_CHUNKS:
            raise ValueError(
                f"accumulate='weight' takes at most {FEW_CHUNKS} chunks, got {len(wanted)} of "
                f"{self.chunk} tokens: use accumulate='float32', or a larger chunk_tokens"
            )
        return Batch(
            rows=rows,
            dtype=self.dtypes.operands,
            tile_dtype=self.dtypes.logits,
            rounded=self.dtypes.rounded,
            softcap=self.softcap,
            chunk=max(self.chunk, LEAST_ROWS),
            wanted=wanted,
            scored=in_order(selection.scored, 0, self.chunk),
            has_masked=selection.has_masked,
            tiles=self.tiles,
            shards=self.shards,
            accumulates=self.accumulates,
        )


# What means nothing where no product over the vocabulary is made.
_WITHOUT_PRODUCTS = {"low_memory": False, "accumulate": "float32", "active_tokens": None}


def _refuse_with_support(**given: object) -> None:
    for name, value in given.items():
        if value != _WITHOUT_PRODUCTS[name]:
            raise ValueError(
                f"{name} must be {_WITHOUT_PRODUCTS[name]!r} with support, got {value!r}: all "
                "tokens' few logits exist at once, and sums into the head are float32"
            )


def _softcap(value: object, scale: float) -> float:
    """Of the logits before they are scaled, as a float32 number; 0: none."""
    if value is None:
        return 0.0
    softcap = positive_number("softcap", value)
    if not 1e-30 <= softcap / scale <= 1e30:
        raise ValueError(
            f"softcap / logit_scale must be between 1e-30 and 1e30, got {softcap} / {scale}"
        )
    return torch.tensor(softcap / scale, dtype=torch.float32, device="cpu").item()


def _of_all(
    parameters: Parameters, shape: torch.Size, vocab_parallel: VocabParallel
) -> tuple[Parameters, torch.Size]:
    """With the rows of all tokens, and the gradient of all shards; and the tokens' shape."""
    hidden, u = (
        None if x is None else shared_by_all(x, vocab_parallel)
        for x in (parameters.hidden, parameters.u)
    )
    assert hidden is not None
    if hidden.shape != parameters.hidden.shape:
        times = hidden.shape[0] // parameters.hidden.shape[0]
        shape = torch.Size((times * shape[0], *shape[1:]))
    return parameters._replace(hidden=hidden, u=u), shape


def _by_tokens(rows: Rows, terms: LossTerms) -> LossTerms:
    """Terms whose losses have the same sum and gradient, of single tokens, if there are such.

    On-policy all ratios are 1, of sequences and of tokens. Where a token's loss moves its own log p
    only, that is the loss of tokens. Where it moves those of its sequence, each of them gets the
    mean of the sequence's derivatives, which differ by the token weights alone.
    """
    ratio, inputs, shape = terms.beyond.ratio, terms.inputs, terms.settings.shape
    if ratio is None or terms.beyond.function is not None or inputs.old_logps is not None:
        return terms
    by_logp = shape.kind == "window" and shape.value == SCORE
    if not (ratio.by_token or by_logp):
        if inputs.low is not None or inputs.high is not None:  # by token, and may leave 1 out
            return terms
        if inputs.token_weights is not None:
            weights = ratio.mean(inputs.token_weights, rows.active)
            inputs = inputs._replace(token_weights=weights)
    return replace(terms, inputs=inputs, beyond=terms.beyond._replace(ratio=None))


def _idle(rows: Rows, terms: LossTerms) -> Tensor | None:
    """The rows whose loss does not depend on the logits."""
    if terms.beyond.function is not None:
        return None
    idle = is_idle(terms.inputs, terms.settings)
    if idle is None or terms.beyond.ratio is None:
        return idle
    if terms.beyond.ratio.group is not None:
        return None  # other processes have the rest of the sequences
    return ~terms.beyond.ratio.any(rows.active & ~idle)


def _chunks_of_whole_losses(
    selection: Selection, rows: Rows, terms: LossTerms, chunk: int
) -> list[Chunk] | None:
    """Chunks whose losses are known when their rows are; None: there are none."""
    ratio = terms.beyond.ratio
    if terms.beyond.function is not None or (ratio is not None and ratio.group is not None):
        return None
    n_rows = rows.active.shape[0]
    if ratio is None:
        return in_order(selection.index, n_rows, chunk)
    if values.can_be_looked_at(rows.active):
        index = selection.index
        if index is None:
            index = torch.arange(n_rows, dtype=torch.int64, device="cpu")
        return by_sequence(index, ratio.index[index], chunk)
    # Lengths are on the device: those of padded sequences are known.
    padded = selection.index is None and len(rows.shape) > 1
    if not padded or ratio.longest > chunk:
        return None
    return in_order(None, n_rows, chunk // ratio.longest * ratio.longest)


def _active_tokens(value: object | None) -> int | None:
    return None if value is None else positive_int("active_tokens", value)


def _refuse_too_many(result: Tensor, too_many: Tensor) -> Tensor:
    if values.can_be_checked(too_many) and too_many:
        raise ValueError("active_tokens must be at least the number of unmasked tokens")
    return torch.where(too_many, torch.nan, result)
