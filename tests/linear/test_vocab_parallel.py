"""A vocabulary over two and four processes, against one process and float64.

Each group of processes runs all scenarios once; the tests look at what they found.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heads import (
    HeadCase,
    is_noticed,
    linear,
    logits_of,
    logps64,
    make,
    relative,
    split,
    use_slices,
    whole,
)
from ranks import found_by_ranks
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import CFPO, PPOClip, VocabParallel, backends, token_logps
from cfpo_kernels.backends.cpu import CpuBackend
from cfpo_kernels.linear import fused
from cfpo_kernels.linear.batch import Batch
from cfpo_kernels.linear.head import Head
from cfpo_kernels.verification import choice
from cfpo_kernels.vocab_parallel import Shards

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")

V, N = 1003, 48
# Uneven; one process has a single column.
BORDERS = {2: (0, 600, V), 4: (0, 300, 301, 800, V)}
PADDING = 5  # columns that the last process has beyond the vocabulary
NAMES = ("hidden", "weight", "bias", "u", "lora")
OF_COLUMNS = ("weight", "bias", "lora")


def case_of(dtype: torch.dtype = torch.float32, **options: Any) -> HeadCase:
    """Tokens on both sides of every border, and elsewhere."""
    case = make(N, V, 32, dtype, bias=True, rank=4, chunk_tokens=16, **options)
    edges = sorted({x for borders in BORDERS.values() for x in borders})
    ids = [x for edge in edges for x in (edge - 1, edge) if 0 <= x < V]
    case.token_ids[: len(ids)] = torch.tensor(ids)
    g = torch.Generator().manual_seed(9)
    case.old_logps = (logps64(case) + 0.3 * torch.randn(N, generator=g)).float()
    return case


def everything() -> HeadCase:
    g = torch.Generator().manual_seed(1)
    case = case_of(temperature=0.7 + 0.6 * torch.rand(N, generator=g), mask_every=5)
    assert case.old_logps is not None
    case.options |= {
        "ref_logps": case.old_logps + 0.2 * torch.randn(N, generator=g),
        "token_weights": 0.5 + torch.rand(N, generator=g),
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
    }
    return case


def sequences(**options: Any) -> HeadCase:
    case = case_of(ratio_level="sequence", objective=PPOClip(0.05, 0.05), **options)
    case.options["cu_seqlens"] = torch.tensor([0, 3, 15, 16, 30, N])
    case.advantages = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0])
    return case


def without_a_target_in(first: int, last: int) -> HeadCase:
    case = case_of()
    case.options["mask"] = (case.token_ids < first) | (case.token_ids >= last)
    return case


def banned(first: int, last: int) -> HeadCase:
    """Columns whose logits are -inf: all that one process has."""
    case = without_a_target_in(first, last)
    assert case.bias is not None
    case.bias[first:last] = -torch.inf
    return case


def confident() -> HeadCase:
    """p of 0.9999, and a process that has only the target."""
    case = case_of(entropy_coef=0.01)
    assert case.bias is not None
    case.token_ids[:] = 300
    case.bias[300] = 24.0
    case.old_logps = None
    return case


def tilted(terms: cfpo_kernels.TokenTerms) -> Tensor:
    return -terms.log_ratio.exp() * terms.advantages + 0.1 * terms.log_ratio**2


CASES: dict[str, Callable[[], HeadCase]] = {
    "plain": case_of,
    "everything": everything,
    "everything-slices": lambda: changed(everything(), low_memory=True),
    "one-tile": lambda: changed(everything(), chunk_tokens=64),
    "softcap": lambda: case_of(softcap=4.0, logit_scale=1.3),
    "softcap-slices": lambda: case_of(softcap=4.0, low_memory=True, entropy_coef=0.1),
    "none": lambda: case_of(reduction="none"),
    "callable": lambda: case_of(objective=tilted),
    "sequences": sequences,
    "long-sequences": lambda: changed(sequences(), chunk_tokens=8),
    "on-policy": lambda: replace(case_of(), old_logps=None),
    "without-targets": lambda: without_a_target_in(0, 300),
    "banned": lambda: banned(0, 300),
    "banned-entropies": lambda: changed(banned(301, 800), entropy_coef=0.1, low_memory=True),
    "confident": confident,
    "all-masked": lambda: case_of(mask=torch.zeros(N)),
    "grad-scale": lambda: case_of(grad_scale=256.0),
    "far": lambda: moved(-200.0),
    "bf16": lambda: case_of(torch.bfloat16, logits_dtype=torch.float32),
    "bf16-slices": lambda: case_of(torch.bfloat16, logits_dtype=torch.float32, low_memory=True),
}
# An offset rounds the logits, and a gradient in bfloat16 is a rounded one.
TOLERANCES = {"far": 3e-5, "bf16": 6e-3, "bf16-slices": 6e-3}


def changed(case: HeadCase, **options: Any) -> HeadCase:
    case.options |= options
    return case


def moved(offset: float) -> HeadCase:
    case = case_of(entropy_coef=0.01)
    assert case.bias is not None
    case.bias += offset
    return case


class Process:
    """One of a group, with its part of the vocabulary."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.start, self.stop = list(pairwise(BORDERS[world]))[rank]
        self.padding = PADDING if rank == world - 1 else 0

    def split(self, how: str = "all_reduce") -> VocabParallel:
        return VocabParallel(dist.group.WORLD, self.start, V, how)

    def columns(self, x: Tensor) -> Tensor:
        part = x[self.start : self.stop]
        padding = part.new_full((self.padding, *part.shape[1:]), 50.0)
        return torch.cat([part, padding])

    def tokens(self, x: Tensor) -> Tensor:
        return x.chunk(self.world)[self.rank]

    def part(self, case: HeadCase, *, split_tokens: bool = False) -> HeadCase:
        """With this process's parameters, and all numbers of tokens."""
        parts = {name: self.columns(getattr(case, name)) for name in OF_COLUMNS}
        if split_tokens:
            parts |= {name: self.tokens(getattr(case, name)) for name in ("hidden", "u")}
        return replace(case, **parts)


def found(loss: Any, stats: Any, gradients: dict[str, Tensor]) -> dict[str, Any]:
    parts = [loss, stats.logps, stats.entropy, gradients["hidden"]]
    bits = b"".join(x.reshape(-1).view(torch.uint8).numpy().tobytes() for x in parts)
    return {
        "loss": loss,
        "stats": tuple(stats),
        "gradients": gradients,
        "sha256": hashlib.sha256(bits).hexdigest(),
    }


def of_linear(case: HeadCase, **how: Any) -> dict[str, Any]:
    result = linear(case, stats=True, upstream=2.0, **how)
    assert result.stats is not None
    return found(result.loss, result.stats, result.gradients)


def of_logits(process: Process, case: HeadCase, inplace: bool) -> dict[str, Any]:
    leaf = process.columns(logits_of(case.leaves(), {}).detach().T).T.contiguous()
    leaf.requires_grad_()
    options = {"objective": CFPO()} | case.options
    options.pop("chunk_tokens")
    loss, stats = cfpo_kernels.policy_loss(
        leaf,
        case.token_ids,
        case.advantages,
        case.old_logps,
        vocab_parallel=process.split(),
        inplace=inplace,
        return_stats=True,
        **options,
    )
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    first = leaf.grad.clone()
    if inplace:
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            raise AssertionError("a second backward would read gradients for logits")
    return {"loss": loss.detach(), "stats": tuple(stats), "gradient": first}


def scores_of_logits(process: Process, case: HeadCase) -> dict[str, Any]:
    whole_leaf = logits_of(case.leaves(), {}).detach()
    leaf = process.columns(whole_leaf.T).T.contiguous().requires_grad_()
    values = cfpo_kernels.token_logps(
        leaf,
        case.token_ids,
        temperature=0.7,
        return_entropy=True,
        return_lse=True,
        vocab_parallel=process.split(),
    )
    assert isinstance(values, tuple)
    (values[0] * case.advantages).sum().backward(retain_graph=True)
    values[1].sum().backward()
    loss = cfpo_kernels.cfpo_loss(
        leaf.detach(), case.token_ids, case.advantages, vocab_parallel=process.split()
    )
    return {"values": [x.detach() for x in values], "gradient": leaf.grad, "loss": loss}


def of_dtensors(process: Process, case: HeadCase, dim: int | None) -> dict[str, Any]:
    """`dim`: along which hidden states are split over the processes; None: whole on each."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (process.world,))
    leaves = {}
    for name, x in case.leaves().items():
        place = Replicate() if dim is None else Shard(dim)
        place = Shard(0) if name in OF_COLUMNS else place
        leaves[name] = distribute_tensor(x.detach(), mesh, [place]).requires_grad_()
    result = linear(case, leaves=leaves, stats=True, upstream=2.0)
    assert result.stats is not None
    placements = {name: x.placements for name, x in result.gradients.items()}
    assert placements == {name: x.placements for name, x in leaves.items()}
    whole_again = {name: x.full_tensor() for name, x in result.gradients.items()}
    return found(result.loss, result.stats, whole_again)


def in_sequences() -> HeadCase:
    """(B, T, H), of which each process has some tokens of every sequence."""
    case = split(everything(), 4, N // 4)
    case.advantages = case.advantages.reshape(4, N // 4)
    return case


DTENSORS: dict[str, tuple[Callable[[], HeadCase], int | None]] = {
    "dtensors-whole": (everything, None),
    "dtensors-tokens": (everything, 0),
    "dtensors-sequences": (in_sequences, 1),
}


def gradient_that_is_taken_for_whole(patch: pytest.MonkeyPatch) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    original = DTensor.to_local

    def to_local(self: Any, *, grad_placements: Any = None) -> Tensor:
        if grad_placements is not None:
            grad_placements = [Replicate()]
        return original(self, grad_placements=grad_placements)

    patch.setattr(DTensor, "to_local", to_local)


def gradient_that_is_summed_twice(patch: pytest.MonkeyPatch) -> None:
    even = VocabParallel.even
    patch.setattr(VocabParallel, "even", lambda *arguments: even(*arguments[:3], "all_reduce"))


DTENSOR_MISTAKES = {
    "dtensors-not-partial": gradient_that_is_taken_for_whole,
    "dtensors-twice": gradient_that_is_summed_twice,
}


def near_the_bounds(case: HeadCase, logps: Tensor) -> HeadCase:
    """Ratios within one unit in the last place of PPO's bounds, on either side."""
    bound = torch.where(torch.arange(N) % 2 == 0, 0.8, 1.2).log()
    old = logps - bound
    step = torch.arange(N) % 3
    old = torch.where(step == 1, torch.nextafter(old, old + 1), old)
    old = torch.where(step == 2, torch.nextafter(old, old - 1), old)
    return replace(changed(case, objective=PPOClip(0.2, 0.2)), old_logps=old)


def scored(process: Process, case: HeadCase) -> Tensor:
    part = process.part(case)
    logps = cfpo_kernels.linear_token_logps(
        part.hidden,
        part.weight,
        part.token_ids,
        bias=part.bias,
        lora=(part.u, part.lora),  # type: ignore[arg-type]
        vocab_parallel=process.split(),
        chunk_tokens=case.options["chunk_tokens"],
    )
    assert isinstance(logps, Tensor)
    return logps.detach()


def own_part_unrounded(self: Shards, *arguments: Any) -> Callable[[], Any]:
    """The mistake: others get float32, and a process keeps more of its own numbers."""
    original, own = torch.stack, dist.get_rank()

    def of_float32(parts: Any, *dims: int) -> Tensor:
        sent = [x if rank == own else x.float().double() for rank, x in enumerate(parts)]
        return original(sent, *dims)

    merged = score(self, *arguments)

    def mixed() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "stack", of_float32)
            return merged()

    return mixed


score = Shards.score


def refusals(process: Process) -> dict[str, str]:
    """What each process says, without waiting for the others."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    case = make(8, 64, 16)
    mesh = init_device_mesh("cpu", (process.world,))
    sharded, replicated = (
        distribute_tensor(case.weight, mesh, [place]) for place in (Shard(0), Replicate())
    )
    of_columns = distribute_tensor(case.weight, mesh, [Shard(1)])
    hidden = distribute_tensor(case.hidden, mesh, [Replicate()])
    few = distribute_tensor(case.weight[:1].clone(), mesh, [Shard(0)])
    part = case.weight.chunk(process.world)[process.rank]
    beyond, twice, right = (
        {"vocab_parallel": VocabParallel(dist.group.WORLD, start, 64)}
        for start in (64, 0, process.rank * len(part))
    )
    said = {}
    for name, weight, states, more in (
        ("outside", sharded, case.hidden, {}),
        ("replicated", replicated, hidden, {}),
        ("columns", of_columns, hidden, {}),
        ("few", few, hidden, {}),
        ("bias", sharded, hidden, {"bias": torch.zeros(64)}),
        ("hidden", case.weight, hidden, {}),
        ("support", part, case.hidden, {"support": case.token_ids[:, None]} | right),
        ("beyond", part, case.hidden, beyond),
        ("twice", case.weight, case.hidden, twice),
    ):
        try:
            cfpo_kernels.linear_token_logps(states, weight, case.token_ids, **more)
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


class Noting(CpuBackend):
    """Stands in for kernels of a GPU."""

    def __init__(self, name: str, used: list[str]) -> None:
        self.name, self.used = name, used

    def token_logps(self, rows: Any, **outputs: Any) -> None:
        self.used.append(self.name)
        super().token_logps(rows, **outputs)


def kernels_of_ranks(process: Process) -> dict[str, Any]:
    """What runs where the first rank has, or had rather, other kernels than the others."""
    case, used = everything(), []
    first, others = "cuda", "triton"
    mine = first if process.rank == 0 else others
    found: dict[str, Any] = {}
    for name, alternatives in (
        ("faster", {first, others, "reference"}),
        ("lacking", {mine, "reference"}),
    ):
        where = VocabParallel(dist.new_group(), process.start, V)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for kernels in (first, others):
                patch.setitem(backends.KERNELS, kernels, Noting(kernels, used))
            patch.setattr(choice, "kernels_for", lambda *_: mine)
            patch.setattr(choice, "alternatives", lambda *_, known=alternatives: known)
            for _ in range(2):
                linear(process.part(case), stats=True, vocab_parallel=where)
                leaf = process.columns(logits_of(case.leaves(), {}).detach().T).T.contiguous()
                token_logps(leaf, case.token_ids, vocab_parallel=where)
        found[name] = sorted(set(used)), [str(w.message) for w in said if "would run" in str(w)]
        used.clear()
    try:
        backend = "cpu" if process.rank == 0 else "reference"
        where = VocabParallel(dist.new_group(), process.start, V)
        linear(process.part(case), backend=backend, vocab_parallel=where)
    except ValueError as error:
        found["named"] = str(error)
    return found


def compared(process: Process) -> dict[str, str]:
    """What is said, where a number is another one on the last rank, or in a masked row."""
    said, last = {}, process.rank == process.world - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFPO_KERNELS_DEBUG", "1")
        for name in ("nothing", "masked", "advantages", "token_ids", "mask", "kl_coef"):
            case = everything()
            mask = case.options["mask"] = case.options.get("mask", case.token_ids >= 0).clone()
            mask[3] = False
            if last and name == "masked":
                case.advantages[3] = 9.0
            elif last and name in ("advantages", "token_ids"):
                getattr(case, name)[6] = 1
            elif last and name == "mask":
                mask[6] = False
            elif last and name == "kl_coef":
                case.options["kl_coef"] = 0.7
            try:
                linear(process.part(case), vocab_parallel=process.split())
                said[name] = ""
            except ValueError as error:
                said[name] = str(error)
    return said


def collectives_of(call: Callable[[], object]) -> int:
    """How often a call gathers what all processes have."""
    original, n = dist.all_gather, 0

    def counted(*arguments: Any, **how: Any) -> Any:
        nonlocal n
        n += 1
        return original(*arguments, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", counted)
        call()
    return n


def even_split(process: Process) -> dict[str, Any]:
    """A VocabParallel that is made anew for each call; the last process's rows end in padding."""
    case, group = case_of(), dist.group.WORLD
    each = -(-V // process.world) + 3
    weight = torch.nn.functional.pad(case.weight, (0, 0, 0, each * process.world - V), value=50.0)
    part = weight[process.rank * each : (process.rank + 1) * each]

    def logps(where: VocabParallel, rows: Tensor = part) -> Tensor:
        hidden, ids = case.hidden[:16], case.token_ids[:16]
        scores = cfpo_kernels.linear_token_logps(hidden, rows, ids, vocab_parallel=where)
        assert isinstance(scores, Tensor)
        return scores

    def anew() -> VocabParallel:
        return VocabParallel.even(group, each, V)

    asked = logps(VocabParallel(group, process.rank * each, V))  # and which kernels all run
    found = {
        "even": collectives_of(lambda: logps(anew())),
        "asking": collectives_of(lambda: logps(VocabParallel(group, process.rank * each, V))),
        "same": torch.equal(logps(anew()), asked),
    }
    try:
        logps(anew(), part[:5])
    except ValueError as error:
        found["said"] = str(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFPO_KERNELS_DEBUG", "1")
        try:
            logps(VocabParallel.even(group, each + process.rank, V), weight[: each + process.rank])
        except ValueError as error:
            found["debugging"] = str(error)
    return found


def run(rank: int, world: int) -> dict[str, Any]:
    process, results = Process(rank, world), {}
    with pytest.MonkeyPatch.context() as patch:
        use_slices(patch, 64)
        for name, make_case in CASES.items():
            results[name] = of_linear(process.part(make_case()), vocab_parallel=process.split())
        results["late"] = of_linear(
            process.part(case_of(reduction="none")),
            frozen=OF_COLUMNS,
            vocab_parallel=process.split(),
        )
        results["local"] = of_linear(
            process.part(everything()), vocab_parallel=process.split("none")
        )
        results["scattered"] = of_linear(
            process.part(everything(), split_tokens=True),
            vocab_parallel=process.split("reduce_scatter"),
        )
        for inplace in (False, True):
            results[f"logits-{inplace}"] = of_logits(process, everything(), inplace)
        results["scores"] = scores_of_logits(process, case_of())
        for name, (case, dim) in DTENSORS.items():
            results[name] = of_dtensors(process, case(), dim)
        for name, mistake in DTENSOR_MISTAKES.items():
            with pytest.MonkeyPatch.context() as planted_here:
                mistake(planted_here)
                results[name] = of_dtensors(process, everything(), None)
        close = near_the_bounds(case_of(), scored(process, case_of()))
        results["close"] = of_linear(process.part(close), vocab_parallel=process.split())
        patch.setattr(Shards, "score", own_part_unrounded)
        results["close-mutant"] = of_linear(process.part(close), vocab_parallel=process.split())
        patch.undo()
        results["old"] = scored(process, case_of())
        again = replace(case_of(), old_logps=results["old"])
        again.advantages[::2] = 0.0
        results["again"] = of_linear(process.part(again), vocab_parallel=process.split())
        results["refused"] = refusals(process)
        results["even"] = even_split(process)
        results["kernels"] = kernels_of_ranks(process)
        results["compared"] = compared(process)
    return results


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each process of a group found."""
    return found_by_ranks(run, request.param, n=request.param)


def joined(group: list[Any], name: str, x: str) -> Tensor:
    """The gradient of a parameter that is split over the columns; that of the padding is 0."""
    parts = [results[name]["gradients"][x] for results in group]
    assert not parts[-1][-PADDING:].any()
    return torch.cat([*parts[:-1], parts[-1][:-PADDING]])


def compare(group: list[Any], name: str, case: HeadCase, tolerance: float = 3e-6) -> None:
    want = whole(case, upstream=2.0)
    assert want.stats is not None
    for results in group:
        got = results[name]
        torch.testing.assert_close(got["loss"], want.loss.float(), rtol=1e-5, atol=tolerance)
        torch.testing.assert_close(
            got["stats"],
            tuple(x.float() for x in want.stats),
            rtol=1e-5,
            atol=2e-5,
            equal_nan=True,
        )
        for x in ("hidden", "u"):
            assert relative(got["gradients"][x], want.gradients[x]) < tolerance, (name, x)
    for x in OF_COLUMNS:
        assert relative(joined(group, name, x), want.gradients[x]) < tolerance, (name, x)


def same_bits(group: list[Any], name: str) -> bool:
    return len({results[name]["sha256"] for results in group}) == 1


@pytest.mark.parametrize("name", CASES)
def test_processes_agree_and_are_right(group: list[Any], name: str) -> None:
    case = CASES[name]()
    compare(group, name, case, TOLERANCES.get(name, 3e-6))
    assert same_bits(group, name)


def test_a_frozen_head(group: list[Any]) -> None:
    want = whole(case_of(reduction="none"), upstream=2.0).gradients
    for results in group:
        assert results["late"]["gradients"].keys() == {"hidden", "u"}
        for x, gradient in results["late"]["gradients"].items():
            assert relative(gradient, want[x]) < 3e-6
    assert same_bits(group, "late")


def test_a_process_alone_is_nearly_the_same(group: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_slices(patch, 64)
        alone = linear(everything(), stats=True, upstream=2.0)
    got = group[0]["everything"]
    assert alone.loss.item() == pytest.approx(got["loss"].item(), rel=1e-5)
    assert relative(got["gradients"]["hidden"], alone.gradients["hidden"]) < 3e-6


def test_gradients_of_hidden_states_that_the_caller_adds_up(group: list[Any]) -> None:
    """And the control: one process's part is not the whole."""
    want = whole(everything(), upstream=2.0).gradients
    for x in ("hidden", "u"):
        parts = [results["local"]["gradients"][x] for results in group]
        assert relative(sum(parts), want[x]) < 3e-6  # type: ignore[arg-type]
        assert all(relative(part, want[x]) > 0.1 for part in parts)


def test_hidden_states_that_are_split_by_tokens(group: list[Any]) -> None:
    want = whole(everything(), upstream=2.0)
    for x in ("hidden", "u"):
        got = torch.cat([results["scattered"]["gradients"][x] for results in group])
        assert relative(got, want.gradients[x]) < 3e-6
    for x in OF_COLUMNS:
        assert relative(joined(group, "scattered", x), want.gradients[x]) < 3e-6
    assert group[0]["scattered"]["loss"].item() == pytest.approx(want.loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", DTENSORS)
def test_dtensors(group: list[Any], name: str) -> None:
    check_dtensors(group, name, DTENSORS[name][0]())
    assert same_bits(group, name)


@pytest.mark.parametrize("name", DTENSOR_MISTAKES)
def test_mistakes_with_dtensors_are_noticed(group: list[Any], name: str) -> None:
    is_noticed(lambda: check_dtensors(group, name, everything()))


def check_dtensors(group: list[Any], name: str, case: HeadCase) -> None:
    want = whole(case, upstream=2.0)
    for results in group:
        got = results[name]
        assert got["loss"].item() == pytest.approx(want.loss.item(), rel=1e-5)
        for x in NAMES:
            assert relative(got["gradients"][x], want.gradients[x]) < 3e-6, x


@pytest.mark.parametrize("inplace", [False, True])
def test_shards_of_logits(group: list[Any], inplace: bool) -> None:
    case = everything()
    leaf = logits_of(case.leaves(), {}).detach().double().requires_grad_()
    options = {name: x for name, x in case.options.items() if name != "chunk_tokens"}
    loss, stats = cfpo_kernels.cfpo_loss(
        leaf,
        case.token_ids,
        case.advantages,
        case.old_logps,
        backend="reference",
        return_stats=True,
        **options,
    )
    loss.backward()
    parts = [results[f"logits-{inplace}"]["gradient"] for results in group]
    assert not parts[-1][:, -PADDING:].any()
    got = torch.cat([*parts[:-1], parts[-1][:, :-PADDING]], 1)
    mask = case.options["mask"]
    assert not got[~mask].any()
    assert leaf.grad is not None
    assert relative(got, leaf.grad) < 3e-6
    for results in group:
        found_here = results[f"logits-{inplace}"]
        assert found_here["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert torch.equal(found_here["loss"], group[0][f"logits-{inplace}"]["loss"])
        assert (found_here["stats"][0] - stats.logps).abs().max() < 2e-6


def test_log_probs_entropies_and_sums_of_shards(group: list[Any]) -> None:
    case = case_of()
    leaf = logits_of(case.leaves(), {}).detach().double().requires_grad_()
    want = cfpo_kernels.token_logps(
        leaf,
        case.token_ids,
        temperature=0.7,
        return_entropy=True,
        return_lse=True,
        backend="reference",
    )
    assert isinstance(want, tuple)
    ((want[0] * case.advantages).sum() + want[1].sum()).backward()
    for results in group:
        for got, exact in zip(results["scores"]["values"], want, strict=True):
            assert (got - exact).abs().max() < 3e-6
        for got, first in zip(
            results["scores"]["values"], group[0]["scores"]["values"], strict=True
        ):
            assert torch.equal(got, first)
    parts = [results["scores"]["gradient"] for results in group]
    got = torch.cat([*parts[:-1], parts[-1][:, :-PADDING]], 1)
    assert leaf.grad is not None
    assert relative(got, leaf.grad) < 3e-6


def test_clips_at_their_bounds_are_decided_alike(group: list[Any]) -> None:
    assert same_bits(group, "close")
    stats = cfpo_kernels.CFPOStats(*group[0]["close"]["stats"])
    assert 0 < stats.outside_fraction < 1
    assert not same_bits(group, "close-mutant")


def test_the_ratio_of_the_policy_that_scored_is_1(group: list[Any]) -> None:
    for results in group:
        stats = cfpo_kernels.CFPOStats(*results["again"]["stats"])
        assert stats.ratio_max == 1 and stats.ratio_mean == 1


REFUSED = {
    "outside": "ValueError: weight must be.*a DTensor: it is sharded.*inside the head's forward",
    "replicated": r"ValueError: weight must be split over the vocabulary, Shard\(0\), got",
    "columns": r"ValueError: weight must be split over the vocabulary, Shard\(0\), got",
    "few": r"ValueError: weight must have rows on each of \d processes, got 1 in all",
    "bias": "ValueError: bias must be a DTensor on the weight's mesh",
    "hidden": "ValueError: hidden must be a local tensor where the hidden states or the weight is",
    "support": "ValueError: support must be None with vocab_parallel",
    "beyond": r"ValueError: vocab_parallel: the columns of all.*got \[64, 64\), \[64, 64\)",
    "twice": r"ValueError: vocab_parallel: the columns of all.*got \[0, 64\), \[0, 64\)",
}


def test_what_is_refused_is_refused_on_each_process(group: list[Any]) -> None:
    for results in group:
        assert results["refused"].keys() == REFUSED.keys()
        for name, said in REFUSED.items():
            with pytest.raises(AssertionError, match=said):
                raise AssertionError(results["refused"][name])


def test_an_even_split_is_known_without_asking(group: list[Any]) -> None:
    for results in group:
        found = results["even"]
        assert found["even"] == 1, "one tile is exchanged, and nothing else"
        assert found["asking"] == 2, "the control"
        assert found["same"]
        assert "was told n_rows=" in found["said"]
        assert "must be the vocabulary" in found["debugging"]


def test_all_processes_run_the_same_kernels(group: list[Any]) -> None:
    world = len(group)
    # As most have chosen; and what each has, where the choice is another's only.
    for name, agreed in (("faster", "cuda" if world == 2 else "triton"), ("lacking", None)):
        for results in group:
            used, said = results["kernels"][name]
            assert used == ([agreed] if agreed else [])
            assert said and f"all run {agreed or 'reference'}" in said[0]
            assert "cuda on rank 0, triton on rank 1" in said[0]
    for results in group:
        assert "got cpu on rank 0, reference on rank 1" in results["kernels"]["named"]


def test_numbers_that_differ_are_named_when_debugging(group: list[Any]) -> None:
    for results in group:
        said = results["compared"]
        assert said["nothing"] == said["masked"] == ""
        for name in ("advantages", "token_ids", "mask", "kl_coef"):
            shown = "the objective or a coefficient" if name == "kl_coef" else name
            assert f"{shown} on ranks {len(group) - 1}" in said[name], said[name]
            assert name == "mask" or ";" not in said[name].split("are ")[1]


Event = tuple[str, int]


def events_of(run_case: Callable[[VocabParallel], object]) -> list[Event]:
    """Products, and what is sent and waited for, of a group of this process alone, in order."""
    events: list[Event] = []

    def note(what: str) -> Event:
        events.append((what, sum(name == what for name, _ in events)))
        return events[-1]

    gather, project = dist.all_gather, Head.project

    def noted_gather(*arguments: Any, async_op: bool = False, **how: Any) -> Any:
        work = gather(*arguments, async_op=async_op, **how)
        if not async_op:
            return work
        _, i = note("sent")

        def wait() -> None:
            events.append(("waited for", i))
            work.wait()

        return SimpleNamespace(wait=wait)

    def noted_project(*arguments: Any) -> None:
        note("product")
        project(*arguments)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            patch.setattr(dist, "all_gather", noted_gather)
            patch.setattr(Head, "project", noted_project)
            run_case(VocabParallel(dist.group.WORLD, 0, V))
        finally:
            dist.destroy_process_group()
    return events


def check_overlap(run_case: Callable[[VocabParallel], object]) -> None:
    """What a tile sends is under way while the next one is multiplied, and waited for after it."""
    events = events_of(run_case)
    tiles = sum(what == "sent" for what, _ in events)
    assert tiles == 3
    for i in range(tiles):
        product, sent, waited = (
            events.index((what, i)) for what in ("product", "sent", "waited for")
        )
        following = events.index(("product", i + 1)) if i + 1 < tiles else waited
        assert product < sent < following <= waited


def trained(where: VocabParallel) -> None:
    linear(case_of(), vocab_parallel=where)


def only_scored(where: VocabParallel) -> None:
    case = case_of()
    given = case.hidden, case.weight, case.token_ids
    cfpo_kernels.linear_token_logps(*given, vocab_parallel=where, chunk_tokens=16)


@pytest.mark.parametrize("run_case", [trained, only_scored])
def test_shards_are_exchanged_while_the_next_tile_is_multiplied(
    run_case: Callable[[VocabParallel], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_overlap(run_case)

    def at_once(self: Shards, *arguments: Any) -> Callable[[], Any]:
        scores = score(self, *arguments)()
        return lambda: scores

    monkeypatch.setattr(Shards, "score", at_once)
    is_noticed(lambda: check_overlap(run_case))


def test_one_tile_in_the_place_of_two_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a tile is finished before the next one is multiplied."""
    new_tile = Batch.new_tile

    def run_one_by_one(self: Any) -> None:
        tile = new_tile(self.batch, self.head.n_cols)
        for chunk in self.batch.wanted:
            self.finish(self.project(tile, chunk))

    monkeypatch.setattr(fused._Fused, "run", run_one_by_one)
    is_noticed(lambda: check_overlap(trained))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((None, 0.0, 4), TypeError, "start must be an integer"),
        ((None, 0, True), TypeError, "vocab_size must be an integer"),
        ((None, -1, 4), ValueError, "needs start >= 0"),
        ((None, 0, 0), ValueError, "vocab_size >= 1"),
        ((None, 0, 4, "sum"), ValueError, "reduce_hidden_grad must be one of"),
    ],
    ids=str,
)
def test_settings(arguments: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        VocabParallel(*arguments)
