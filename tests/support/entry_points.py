"""Every public function that takes tensors, called once for each way through it.

For what has to hold for all of them, whatever they compute: a default dtype, a device without
memory, tensors of inference mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from chosen_objectives import CHOSEN
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import bounds, preference, sequences

B, T, V, H, R, K = 2, 3, 40, 8, 2, 4
N = B * T


class Entry(NamedTuple):
    """
    Attributes:
        call: of the tensors by name; returns tensors, of which some are differentiable.
        arguments: their names in ``tensors()``.
        leaves: those that are differentiated.
        around: forward and backward.
    """

    call: Callable[..., Any]
    arguments: tuple[str, ...]
    leaves: tuple[str, ...] = ()
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def tensors(device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The same numbers at each call, whatever the default dtype and device are."""
    g = torch.Generator("cpu").manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float32, device="cpu")

    def ints(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=g, dtype=torch.int64, device="cpu")

    def of(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu")

    ids = ints(V, B, T)
    others = torch.arange(K - 1, dtype=torch.int64, device="cpu").expand(B, T, K - 1)
    support = torch.cat([ids[..., None], (ids[..., None] + 1 + others) % V], -1)
    made = {
        "logits": normal(B, T, V),
        "packed": normal(N, V),
        "hidden": normal(B, T, H),
        "weight": normal(V, H),
        "bias": normal(V),
        "u": normal(B, T, R),
        "lora": normal(V, R),
        "logps": -normal(B, T).abs() - 1,
        "packed_logps": -normal(N).abs() - 1,
        "entropy": normal(B, T).abs(),
        "token_ids": ids,
        "packed_ids": ids.reshape(-1).to(torch.int32),
        "support": support,
        "advantages": normal(B, T),
        "by_sequence": normal(B),
        "packed_advantages": normal(N),
        "old_logps": -normal(B, T).abs() - 1,
        "ref_logps": -normal(B, T).abs() - 1,
        "mask": of(1, 1, 0, 1, 1, 1).reshape(B, T),
        "token_weights": normal(B, T).abs(),
        "low": -normal(B, T).abs(),
        "high": normal(B, T).abs(),
        "temperature": 0.5 + normal(B, T).abs(),
        "cu_seqlens": of(0, 2, 6, dtype=torch.int64),
        "group_ids": of(4, 4, 4, 9, 9, 9, dtype=torch.int64).reshape(B, T),
        "chosen": normal(B),
        "rejected": normal(B),
        "distances": normal(B).abs(),
        "far": normal(B).abs(),
        "number": of(2.0)[0],
        "small": of(0.1)[0],
        "count": of(5, dtype=torch.int64)[0],
    }
    return {name: x.to(device) for name, x in made.items()}


def _loss(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Of arguments by the name of what they are here."""
    renamed = {
        "packed": "logits",
        "packed_ids": "token_ids",
        "packed_advantages": "advantages",
        "by_sequence": "advantages",
        "packed_logps": "logps",
        "number": "grad_scale",
        "count": "normalizer",
    }

    def call(**given: Tensor) -> Any:
        named: dict[str, Any] = {renamed.get(name, name): x for name, x in given.items()}
        if "u" in named:
            named["lora"] = (named.pop("u"), named.pop("lora"))
        if "low" in named:
            named["log_ratio_bounds"] = (named.pop("low"), named.pop("high"))
        return function(**named, **settings)

    return call


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    with torch.device("cpu"):  # its messages are tensors
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _in_parts(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """With a vocabulary that is split over a group of one process."""

    def call(**given: Tensor) -> Any:
        parts = cfpo_kernels.VocabParallel(dist.group.WORLD, start=0, vocab_size=V)
        return _loss(function, vocab_parallel=parts, **settings)(**given)

    return call


def _reinforce(terms: Any) -> Tensor:
    return -terms.log_ratio.exp() * terms.advantages + 0.1 * terms.entropy


_reinforce.needs_entropy = True  # type: ignore[attr-defined]

_PLAIN = ("token_ids", "advantages", "old_logps")
_ALL = (*_PLAIN, "mask", "token_weights", "ref_logps", "low", "high")
_MANY = {"kl_coef": 0.1, "entropy_coef": 0.01, "return_stats": True}
_PACKED = ("packed_ids", "packed_advantages", "cu_seqlens")
_HEAD = ("hidden", "weight")
_WHOLE_HEAD = (*_HEAD, "bias", "u", "lora")


def _linear_module(**given: Tensor) -> Any:
    """Its tensors come by position."""
    names = (*_HEAD, *_PLAIN)
    others = {name: x for name, x in given.items() if name not in names}
    return cfpo_kernels.LinearCFPOLoss(kl_coef=0.0)(*(given[name] for name in names), **others)


def _entries() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    cfpo, linear = cfpo_kernels.cfpo_loss, cfpo_kernels.linear_cfpo_loss
    logps, linear_logps = cfpo_kernels.token_logps, cfpo_kernels.linear_token_logps
    from_logps = cfpo_kernels.cfpo_loss_from_logps

    def add(
        name: str,
        call: Callable[..., Any],
        arguments: Any,
        leaves: Any = (),
        around: Any = nullcontext,
    ) -> None:
        found[name] = Entry(call, (*leaves, *arguments), tuple(leaves), around)

    both = ("temperature", "number", "count")
    for backend in ("auto", "reference"):
        on = {"backend": backend}
        add(f"loss-{backend}", _loss(cfpo, **on), _PLAIN, ("logits",))
        add(f"loss-all-{backend}", _loss(cfpo, **_MANY, **on), (*_ALL, *both), ("logits",))
        add(
            f"loss-packed-{backend}",
            _loss(cfpo, reduction="seq-mean-token-mean", **on),
            _PACKED,
            ("packed",),
        )
        add(
            f"loss-sequence-{backend}",
            _loss(cfpo, ratio_level="sequence", return_stats=True, **on),
            ("token_ids", "by_sequence", "old_logps", "mask"),
            ("logits",),
        )
        add(
            f"callable-{backend}",
            _loss(cfpo_kernels.policy_loss, objective=_reinforce, reduction="none", **on),
            (*_PLAIN, "mask"),
            ("logits",),
        )
        add(
            f"logps-{backend}",
            _loss(logps, return_entropy=True, return_lse=True, **on),
            ("token_ids", "mask", "temperature"),
            ("logits",),
        )
        add(f"linear-{backend}", _loss(linear, **_MANY, **on), (*_ALL, *both), _WHOLE_HEAD)
    for objective in {objective.name: objective for objective in CHOSEN}.values():
        call = _loss(cfpo_kernels.policy_loss, objective=objective, return_stats=True)
        edges = ("low", "high") if objective.needs_bounds else ()
        add(type(objective).__name__, call, (*_PLAIN, *edges), ("logits",))
    module = cfpo_kernels.CFPOLoss(epsilon=0.1, entropy_coef=0.01)
    add("CFPOLoss", _loss(module), (*_PLAIN, "mask", "ref_logps"), ("logits",))
    add("LinearCFPOLoss", _loss(_linear_module), (*_PLAIN, "bias", "mask"), _HEAD)
    add("loss-in-place", _loss(cfpo, inplace=True), (*_PLAIN, "mask"), ("logits",))
    add("logps-in-place", _loss(logps, inplace=True), ("token_ids", "temperature"), ("logits",))
    for name, how in (
        ("slices", {"low_memory": True, "chunk_tokens": 4}),
        ("none", {"reduction": "none"}),
        ("sequence", {"ratio_level": "sequence"}),
        ("room", {"active_tokens": N}),
        ("capped", {"softcap": 5.0, "logit_scale": 2.0}),
    ):
        add(f"linear-{name}", _loss(linear, **how), (*_PLAIN, "mask"), _HEAD)
    add("linear-support", _loss(linear), (*_PLAIN, "support", "mask"), _WHOLE_HEAD)
    add("linear-logps", _loss(linear_logps), ("token_ids", "mask", "temperature"), _HEAD)
    add("linear-logps-frozen", _loss(linear_logps), ("token_ids", "weight", "mask"), ("hidden",))
    add(
        "linear-entropy",
        _loss(linear_logps, return_entropy=True, chunk_tokens=4),
        ("token_ids", "weight", "mask"),
        ("hidden",),
    )
    if dist.is_available():
        for name, function, leaves in (
            ("loss", cfpo, ("logits",)),
            ("logps", logps, ("logits",)),
            ("linear", linear, _HEAD),
            ("linear-logps", linear_logps, _HEAD),
        ):
            given = ("token_ids",) if "logps" in name else _PLAIN
            call = _in_parts(function)
            add(f"parts-{name}", call, (*given, "mask"), leaves, one_process)
    add("from-logps", _loss(from_logps, **_MANY), (*_ALL[1:], "count"), ("logps", "entropy"))
    add(
        "from-logps-packed",
        _loss(from_logps, ratio_level="sequence", reduction="seq-mean-token-sum"),
        _PACKED[1:],
        ("packed_logps",),
    )
    pair = ("chosen", "rejected")
    add("dpo", lambda chosen, rejected, small: preference.dpo_loss(chosen, rejected, beta=small),
        ("small",), pair)  # fmt: skip
    add("ipo", lambda chosen, rejected: preference.ipo_loss(chosen, rejected), (), pair)
    add("chi-po", lambda chosen, rejected, small, number: preference.chi_po_loss(
        chosen, rejected, beta=small, r_max=number), ("small", "number"), pair)  # fmt: skip
    add("fpo", lambda chosen, rejected, distances, far: preference.fpo_loss(
        chosen, rejected, distances, far), ("distances", "far"), pair)  # fmt: skip
    for sums in (sequences.sequence_sum, sequences.sequence_mean, sequences.suffix_sum,
                 sequences.prefix_min):  # fmt: skip
        add(sums.__name__, lambda logps, mask, of=sums: of(logps, mask), ("mask",), ("logps",))
        packed = lambda packed_logps, cu_seqlens, of=sums: of(  # noqa: E731
            packed_logps, cu_seqlens=cu_seqlens
        )
        add(f"{sums.__name__}-packed", packed, ("cu_seqlens",), ("packed_logps",))
    add("order-free", lambda logps: sequences.order_free_sum(logps), (), ("logps",))
    add("sequence-logps", lambda logits, token_ids, mask: sequences.sequence_logps(
        logits, token_ids, mask), ("token_ids", "mask"), ("logits",))  # fmt: skip
    add("groups", lambda logps, group_ids: sequences.group_advantages(logps, group_ids),
        ("logps", "group_ids"))  # fmt: skip
    add("group-sizes", lambda group_ids, small: sequences.group_advantages(
        group_ids, group_size=3, min_std=small), ("group_ids", "small"))  # fmt: skip
    for mode in ("token_truncate", "sequence_mask", "geometric_truncate"):
        add(f"rollout-{mode}", lambda logps, old_logps, mask, small, number, mode=mode: (
            cfpo_kernels.rollout_weights(logps, old_logps, mask, mode=mode, low=small, high=number)
        ), ("logps", "old_logps", "mask", "small", "number"))  # fmt: skip
    for solve in (bounds.kl, bounds.total_variation, bounds.chi_squared, bounds.band):
        add(solve.__name__, lambda logps, small, of=solve: of(logps, small), ("logps", "small"))
    add("dac", lambda logps, small: bounds.dac(logps, small, 0.2), ("logps", "small"))
    add("kl3", lambda small: bounds.kl3(small), ("small",))
    add("bapo", lambda logps, advantages, mask, small: bounds.bapo(logps, advantages, mask,
        target=small), ("logps", "advantages", "mask", "small"))  # fmt: skip
    return found


ENTRIES = _entries()


def outcome(entry: Entry, given: dict[str, Tensor]) -> list[Tensor]:
    """What the call returns, and the gradients of all of it; the leaves are made here."""
    named = {name: given[name] for name in entry.arguments}
    leaves = {name: named[name].detach().clone().requires_grad_() for name in entry.leaves}
    with entry.around():
        found = entry.call(**named | leaves)
        returned = list(flat(found))
        total = [x.float().sum() for x in returned if x.requires_grad]
        if total:
            sum(total[1:], total[0]).backward()
    gradients = [leaf.grad for leaf in leaves.values()]
    return [x.detach() for x in (*returned, *gradients) if x is not None]


def flat(found: Any) -> Any:
    """The tensors of what a function returned."""
    if isinstance(found, Tensor):
        yield found
        return
    for x in found:
        yield from flat(x)
