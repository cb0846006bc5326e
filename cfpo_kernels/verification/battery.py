"""Runs the cases on one set of kernels for one dtype, and says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends.base import Backend, KernelRows
from .calls import Outputs, call
from .cases import KINDS, Case, Inputs, exact_results, make_inputs
from .compare import (
    Exact,
    gradient_faults,
    planted_faults,
    rounding_limit,
    same_bits,
    value_faults,
    zero_faults,
)

# float64 copies of a case's logits: no more rows than these are judged at once.
JUDGED_ROWS = 12
FEW_ROWS = 6  # even, so that they can be cut from two sequences
BATCH = 1 << 19  # the most elements of a gradient that are judged at once


@dataclass(frozen=True)
class Target:
    """A set of kernels on a device: what gets one verdict for each dtype.

    Attributes:
        name: as ``backends.kernels`` takes it.
        kernels: see ``backends.base.Backend``.
        device: where the tensors are.
        multiprocessors: decides how many rows keep the whole device busy.
        largest: the longest rows to try, for targets that are slow.
    """

    name: str
    kernels: Backend
    device: torch.device
    multiprocessors: int
    largest: int = 2**31

    def many_rows(self, n_cols: int, dtype: torch.dtype) -> int:
        """So many that no row is split, and that clusters of up to eight blocks, which have a slice
        of at most 64 KiB each, keep the device busy."""
        slices = max(1, math.ceil(n_cols * dtype.itemsize / 2**16))
        together = min(8, 2 ** math.ceil(math.log2(slices)))
        enough = max(self.multiprocessors // 2, math.ceil(self.multiprocessors / together)) + 3
        return max(len(KINDS), enough)

    def rows_of(self, case: Case, dtype: torch.dtype) -> int:
        many = self.many_rows(case.n_cols, dtype)
        return many + many % 2 if case.many else FEW_ROWS

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)

    def current(self) -> AbstractContextManager[object]:
        """Makes the device the current one."""
        if self.device.type == "cpu":
            return nullcontext()
        manager: AbstractContextManager[object] = torch.get_device_module(self.device).device(
            self.device
        )
        return manager


class Fault(Exception):
    """The kernels are wrong; the message names the case and what differed."""


Progress = Callable[[str, str], None]  # (case, "launch" or "wait")


def run(target: Target, dtype: torch.dtype, cases: list[Case], progress: Progress) -> int:
    """Runs the cases; returns how many. Raises ``Fault`` at the first that is wrong."""
    chosen = [case for case in cases if case.n_cols <= target.largest]
    checked = False
    problem: Problem | None = None
    for case in chosen:
        if problem is None or problem.case != case.problem():
            problem = Problem.of(case.problem(), dtype, target)
        inputs = problem.inputs.laid_out(case.layout)
        progress(str(case), "launch")
        with target.current():
            outputs = call(target.kernels, case, inputs)
        progress(str(case), "wait")
        target.synchronize()
        if faults := list(_faults(case, problem, inputs, outputs)):
            raise Fault(f"{case}: {faults[0]}")
        if not checked and case.call == "train" and case.n_cols >= 1000:
            _check_the_check(case, problem, outputs)
            checked = True
    if not checked:
        raise Fault("no case was long enough to try the comparison on")
    del problem
    for what, check in _PROPERTIES.items():
        progress(what, "launch")
        with target.current():
            faults = list(check(target, dtype))
        progress(what, "wait")
        target.synchronize()
        if faults:
            raise Fault(f"{what}: {faults[0]}")
    return len(chosen) + len(_PROPERTIES)


@dataclass(frozen=True)
class Problem:
    """Numbers that several cases share, and what is right for them."""

    case: Case
    inputs: Inputs
    exact: list[Exact]  # of the rows that are judged, some at a time

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, target: Target) -> Problem:
        inputs = make_inputs(case, dtype, target.device, target.rows_of(case, dtype))
        if case.call in ("multiply", "on-policy"):
            return cls(case, inputs, [])
        each = max(1, BATCH // case.n_cols)
        rows = _judged_rows(inputs).split(each)
        return cls(case, inputs, [exact_results(case, inputs, some) for some in rows])


# --- One case -------------------------------------------------------------------------------------


def _judged_rows(inputs: Inputs) -> Tensor:
    """Some rows of every kind, the last of the batch among them."""
    active = inputs.active.nonzero().squeeze(1)
    if active.numel() <= JUDGED_ROWS:
        return active
    return torch.cat([active[: JUDGED_ROWS - 3], active[-3:]])


def _faults(case: Case, problem: Problem, inputs: Inputs, outputs: Outputs) -> Iterator[str]:
    for name, guarded in outputs.arrays.items():
        if guarded.was_overrun():
            yield f"wrote outside {name}"
    if not outputs.untouched:
        yield "wrote to an input"
    if case.call == "multiply":
        yield from _multiply_faults(problem.inputs, outputs)
        return
    if case.call == "on-policy":
        yield from _on_policy_faults(inputs, outputs)
        return
    if case.layout != "whole" and case.inplace:
        yield from _neighbour_faults(inputs.rows.logits)
    masked = ~inputs.active
    n_cols = case.n_cols
    flat = None if outputs.dlogits is None else outputs.dlogits.reshape(-1, n_cols)
    if flat is not None:
        yield from zero_faults(flat, masked)
    values = {name: guarded.view for name, guarded in outputs.arrays.items()}
    for name in values.keys() - {"lse", "dlogits"}:
        if bool(values[name][masked].any()):
            yield f"{name} of a masked row is not 0"
    for exact in problem.exact:
        yield from value_faults(
            exact, loss=values.get("loss"), logps=values["logps"], entropy=values.get("entropy")
        )
        if flat is not None:
            yield from gradient_faults(flat, exact)


def _neighbour_faults(logits: Tensor) -> Iterator[str]:
    """What lies between rows was NaN before the call."""
    storage = torch.empty(0, dtype=logits.dtype, device=logits.device).set_(
        logits.untyped_storage()
    )
    own = torch.zeros_like(storage, dtype=torch.bool)
    own.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(True)
    if not bool(storage[~own].isnan().all()):
        yield "wrote between rows"


def _multiply_faults(inputs: Inputs, outputs: Outputs) -> Iterator[str]:
    """Within half a unit: of two numbers that are equally near, either will do."""
    assert outputs.dlogits is not None
    given = inputs.rows.logits
    got = outputs.dlogits.reshape(given.shape)
    kept = inputs.factors == 1
    yield from same_bits("a row times 1", given[kept], got[kept])
    want = given.double() * inputs.factors.double()[:, None]
    error = torch.where(got == want, 0.0, (got.double() - want).abs())
    wrong = ~((error <= rounding_limit(want, given.dtype)) | (got.isnan() & want.isnan()))
    if bool(wrong.any()):
        row = int(wrong.any(-1).nonzero()[0])
        yield f"row {row} times its factor is not what it should be"
    if not bool(want.isfinite().any()):
        yield "nothing was multiplied"


def _on_policy_faults(inputs: Inputs, outputs: Outputs) -> Iterator[str]:
    """Scored by these kernels and trained by them, r is exactly 1 and the loss is -A."""
    values = {name: guarded.view for name, guarded in outputs.arrays.items()}
    yield from same_bits(
        "scored and trained log-probs", values["logps"].float(), values["trained logps"]
    )
    want = torch.where(inputs.active, -inputs.terms.inputs.advantages, 0.0)
    if not torch.equal(values["loss"], want):
        yield "the loss of what was just scored is not -A"


def _check_the_check(case: Case, problem: Problem, outputs: Outputs) -> None:
    """A comparison that sees nothing proves nothing: faults planted in a right gradient."""
    assert outputs.dlogits is not None
    exact = exact_results(case, problem.inputs, _judged_rows(problem.inputs)[:4])
    flat = outputs.dlogits.reshape(-1, case.n_cols)
    for what, damaged in planted_faults(flat, exact):
        if not gradient_faults(damaged, exact):
            raise Fault(f"the comparison does not see a planted fault: {what}")


# --- Properties beyond single results -------------------------------------------------------------


def _train(target: Target, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    outputs = call(target.kernels, case, inputs)
    assert outputs.dlogits is not None
    return outputs.arrays["loss"].view, outputs.arrays["logps"].view, outputs.dlogits


def _long_case(target: Target) -> Case:
    return Case("properties", 100352 if target.largest >= 100352 else 4096)


def _repeat(target: Target, dtype: torch.dtype) -> Iterator[str]:
    case = _long_case(target)
    inputs = make_inputs(case, dtype, target.device, target.rows_of(case, dtype))
    first = _train(target, case, inputs)
    for _ in range(3):
        for name, x, y in zip(
            ("loss", "logps", "dlogits"), first, _train(target, case, inputs), strict=True
        ):
            yield from same_bits(f"{name} of the same inputs", x, y)


def _rows_alone(target: Target, dtype: torch.dtype) -> Iterator[str]:
    """A row does not depend on how many there are."""
    case = _long_case(target)
    inputs = make_inputs(case, dtype, target.device, target.rows_of(case, dtype))
    _, logps, dlogits = _train(target, case, inputs)
    few = FEW_ROWS - 1
    rows = KernelRows(
        inputs.rows.logits[:few],
        inputs.rows.token_ids[:few],
        inputs.rows.weights[:few],
        inputs.rows.temperature,
    )
    terms = inputs.terms._replace(inputs=inputs.terms.inputs.each(lambda x: x[:few]))
    alone = replace(inputs, rows=rows, terms=terms, kinds=inputs.kinds[:few])
    _, own_logps, own_dlogits = _train(target, replace(case, many=False), alone)
    yield from same_bits("logps of fewer rows", own_logps, logps[:few])
    yield from same_bits("the gradient of fewer rows", own_dlogits, dlogits[:few])


def _not_finite(target: Target, dtype: torch.dtype) -> Iterator[str]:
    """A NaN, an infinity or a row of banned tokens is NaN in its own row and in no other."""
    for n_cols in (1000, 50257):
        if n_cols > target.largest:
            continue
        case = Case("properties", n_cols)
        inputs = make_inputs(case, dtype, target.device, target.rows_of(case, dtype))
        logits = inputs.rows.logits
        logits[~inputs.active] = 0.0
        inputs.rows.weights.fill_(1.0)
        bad = {1: math.nan, 3: math.inf, 6: -math.inf}
        for row, value in bad.items():
            if value == -math.inf:
                logits[row] = value
            else:
                logits[row, n_cols - 1] = value
        loss, logps, dlogits = _train(target, case, inputs)
        wrong = torch.zeros_like(inputs.kinds, dtype=torch.bool)
        wrong[list(bad)] = True
        for name, found in (
            ("loss", loss.isnan()),
            ("logps", logps.isnan()),
            ("dlogits", dlogits.isnan().all(-1)),
        ):
            if not torch.equal(found, wrong):
                yield f"{name} is NaN in rows {found.nonzero().flatten().tolist()}, V = {n_cols}"
        if bool(dlogits[~wrong].isnan().any()):
            yield f"a NaN reached another row, V = {n_cols}"


_PROPERTIES: dict[str, Callable[[Target, torch.dtype], Iterator[str]]] = {
    "the same bits each time": _repeat,
    "a row alone has the bits that it has among others": _rows_alone,
    "rows that are not finite": _not_finite,
}
