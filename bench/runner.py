"""Runs the cases: check, time, measure memory, and put the figures together."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bench import checks, peers
from bench.cases import Case
from bench.harness import Implementation, LossFunction, step
from bench.implementations import COMPILED, EAGER
from bench.memory import CpuMemoryProbe, cuda_extra_bytes
from bench.problem import Problem, make_problem
from bench.timing import Samples, interleaved_samples

COPY = "copy"
REWRITE = "rewrite"
SPEEDUP_OVER = (EAGER, COMPILED)


@dataclass(frozen=True)
class Settings:
    rounds: int
    threads: int
    memory: bool = True


@dataclass
class Run:
    """One case while it is measured."""

    case: Case
    settings: Settings
    tell: Callable[[str], None]  # called once for each of `steps_of`
    problem: Problem
    logits: Tensor  # refilled from the problem's master copy before each call
    functions: dict[str, LossFunction] = field(default_factory=dict)
    errors: dict[str, checks.Errors] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def restore(self) -> None:
        self.logits.copy_(self.problem.logits)

    def call(self, implementation: Implementation) -> tuple[Tensor, Tensor | None]:
        function = self.functions[implementation.name]
        return step(implementation, function, self.logits, self.problem)


def steps_of(implementations: list[Implementation], settings: Settings) -> int:
    return 1 + len(implementations) * (1 + settings.memory) + settings.rounds


def run_case(
    case: Case,
    implementations: list[Implementation],
    settings: Settings,
    tell: Callable[[str], None] = lambda description: None,
) -> dict:
    """Everything about one case, ready for JSON. Raises WrongResult if one of ours is wrong."""
    tell(f"{case.name}: inputs")
    problem = make_problem(case)
    run = Run(case, settings, tell, problem, torch.empty_like(problem.logits))
    check_all(run, implementations)
    checked = [entry for entry in implementations if entry.name in run.errors]
    samples = time_all(run, checked)
    extra = {entry.name: extra_bytes(run, entry) for entry in checked} if settings.memory else {}
    return {
        "name": case.name,
        "device": case.device,
        "rows": case.rows,
        "vocabulary": case.vocabulary,
        "dtype": case.dtype_name,
        "logits_bytes": case.logits_bytes,
        "copy": timing_figures(samples[COPY], counted_bytes=2 * case.logits_bytes),
        "rewrite": timing_figures(samples[REWRITE], counted_bytes=2 * case.logits_bytes),
        "controls": {
            name: timing_figures(samples[name], counted_bytes=2 * case.logits_bytes)
            for name in samples.keys() - {COPY, REWRITE} - run.errors.keys()
        },
        "results": [figures(run, entry, samples, extra.get(entry.name)) for entry in checked],
        "skipped": run.skipped,
    }


def check_all(run: Run, implementations: list[Implementation]) -> None:
    """Checks what is about to be timed, on the very same inputs.

    One of ours that is wrong or fails ends the run. A peer's is left out, and the report says why:
    another package's defect is no reason to learn nothing about ours.
    """
    exact: dict[str, checks.Exact] = {}
    for entry in implementations:
        run.tell(f"{run.case.name}: check {entry.name}")
        if entry.objective not in exact:
            exact[entry.objective] = checks.exact_results(run.problem, entry.objective)
        try:
            run.functions[entry.name] = entry.build()
            run.restore()
            loss, dlogits = run.call(entry)
            run.errors[entry.name] = checks.check(entry, loss, dlogits, exact[entry.objective])
        except checks.WrongResult as error:
            if entry.kind == "ours":
                raise
            run.skipped[entry.name] = str(error)
        except torch.OutOfMemoryError:  # the plain forms, where a GPU is small
            run.skipped[entry.name] = "out of memory"
        except Exception as error:
            if entry.kind == "ours":
                raise RuntimeError(f"{entry.name} failed on {run.case}") from error
            reason = str(error).strip().partition("\n")[0]
            run.skipped[entry.name] = f"{type(error).__name__}: {reason}"


def time_all(run: Run, implementations: list[Implementation]) -> dict[str, Samples]:
    # Written once already: the copy is a floor, and pays for no fresh pages.
    copied = run.problem.logits.clone()
    # Reads and writes the same memory, as what works in place does; a copy touches twice as much.
    bits = run.logits.view(torch.int16 if run.logits.element_size() == 2 else torch.int32)
    calls: dict[str, Callable[[], object]] = {
        COPY: lambda: copied.copy_(run.logits),
        REWRITE: lambda: bits.bitwise_xor_(1),
    }
    calls.update(peers.controls(run.logits))
    calls.update({entry.name: partial(run.call, entry) for entry in implementations})
    return interleaved_samples(
        calls,
        run.restore,
        run.settings.rounds,
        run.case.device,
        advance=lambda: run.tell(f"{run.case.name}: timing"),
    )


def extra_bytes(run: Run, implementation: Implementation) -> int | None:
    run.tell(f"{run.case.name}: memory {implementation.name}")
    run.restore()
    if run.case.device == "cuda":
        return cuda_extra_bytes(lambda: run.call(implementation))
    return CpuMemoryProbe(run.settings.threads).extra_bytes(run.case.name, implementation.name)


def figures(
    run: Run,
    implementation: Implementation,
    samples: dict[str, Samples],
    extra: int | None,
) -> dict:
    """What is reported of one implementation."""
    # The least that loss and gradient can move is one read and one write of the logits, that the
    # loss alone can move is one read. Everyone is credited with that, whatever they really move.
    sweeps = 2 if implementation.backward else 1
    own = timing_figures(samples[implementation.name], sweeps * run.case.logits_bytes)
    median = own["median_ms"]
    return {
        "name": implementation.name,
        "label": implementation.label,
        "kind": implementation.kind,
        "objective": implementation.objective,
        "backward": implementation.backward,
        **own,
        "ratio_to_copy": median / statistics.median(samples[COPY].decisive),
        "ratio_to_rewrite": median / statistics.median(samples[REWRITE].decisive),
        "speedup_over": {
            name: statistics.median(samples[name].decisive) / median
            # Forward alone is not the same work.
            if implementation.backward and name in samples
            else None
            for name in SPEEDUP_OVER
        },
        "extra_bytes": extra,
        "errors": checks.as_json(run.errors[implementation.name]),
    }


def timing_figures(samples: Samples, counted_bytes: int) -> dict:
    median = statistics.median(samples.decisive)
    return {
        "median_ms": median,
        "min_ms": min(samples),
        "max_ms": max(samples),
        "samples_ms": [round(sample, 5) for sample in samples],
        "uninterrupted": len(samples.uninterrupted),
        "counted_bytes": counted_bytes,
        "gb_per_s": counted_bytes / median / 1e6,
    }
