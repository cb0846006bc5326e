"""The CPU kernels of this tree beside another commit's, interleaved in one run.

    python -m bench.against REVISION [--cases cpu-128256-bf16,...] [--json FILE]

Builds the other commit without CUDA in a temporary folder. Each of the two runs in a process of its
own, which is asked for one sample at a time, so that both meet the same moods of the machine.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from bench import report
from bench.cases import find_cases
from bench.machine import REPOSITORY, describe_machine, describe_versions, git
from bench.timing import Samples

DEFAULT_CASES = ",".join(
    [f"cpu-{v}-bf16" for v in (32000, 128256, 151936, 262144)]
    + [f"cpu-{v}-f32" for v in (32000, 128256, 151936, 262144)]
    + ["cpu-128256-fp16"]
)
WORKER = Path(__file__).with_name("against_worker.py")
FLOORS = ("copy", "rewrite")


class Worker:
    """A process that measures one version."""

    def __init__(self, package: Path, threads: int) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(package),
            "BENCH_REPOSITORY": str(REPOSITORY),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, *question: str) -> list:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended while it was asked for {question}")
        return list(json.loads(answer))


def build(revision: str, folder: Path) -> Path:
    """Installs the package of a commit below `folder`; returns where it is."""
    archive = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", revision], capture_output=True, check=True
    ).stdout
    source, site = folder / "source", folder / "site"
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(source, filter="data")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(site), str(source)]
    subprocess.run(command, check=True, env={**os.environ, "CFPO_KERNELS_CUDA": "OFF"})
    return site


def measure(workers: dict[str, Worker], case: str, levels: list[str], rounds: int) -> list[dict]:
    """A row for the floors and for each way at each level."""
    ways = {name: worker.ask("prepare", case) for name, worker in workers.items()}
    questions = [(floor, "") for floor in FLOORS]
    questions += [(way, level) for level in levels for way in ways["this"]]
    samples = {
        (version, *question): Samples()
        for question in questions
        for version in workers
        if question[0] in FLOORS or question[0] in ways[version]
    }
    for number in range(rounds + 1):
        for key, taken in samples.items():
            milliseconds, interrupted = workers[key[0]].ask("sample", *key[1:])
            if number > 0:  # the first is for warming up
                taken.take(milliseconds, interrupted)
    floor = {name: statistics.median(samples["this", name, ""].decisive) for name in FLOORS}
    rows = []
    for way, level in questions:
        row: dict = {"way": way, "level": level}
        for version in workers:
            if (version, way, level) in samples:
                taken = samples[version, way, level]
                row[version] = {
                    "median_ms": statistics.median(taken.decisive),
                    "uninterrupted": len(taken.uninterrupted),
                    "samples_ms": [round(x, 5) for x in taken],
                }
        median = row["this"]["median_ms"]
        row["ratio_to_copy"], row["ratio_to_rewrite"] = (median / floor[name] for name in FLOORS)
        if "other" in row:
            row["ratio_to_other"] = median / row["other"]["median_ms"]
        rows.append(row)
    return rows


HEADER = (
    "",
    "level",
    "other ms",
    "this ms",
    "this / other",
    "x copy",
    "x rewrite",
    "uninterrupted",
)


def cells(row: dict) -> tuple[str, ...]:
    this, other = row["this"], row.get("other")
    return (
        row["way"],
        row["level"],
        "" if other is None else f"{other['median_ms']:.3f}",
        f"{this['median_ms']:.3f}",
        "" if other is None else f"{row['ratio_to_other']:.3f}",
        f"{row['ratio_to_copy']:.2f}",
        f"{row['ratio_to_rewrite']:.2f}",
        f"{this['uninterrupted']} of {len(this['samples_ms'])}",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.against", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("revision", help="the other commit")
    add("--cases", default=DEFAULT_CASES, help=f"comma-separated (default: {DEFAULT_CASES})")
    add("--levels", help="instruction sets, comma-separated (default: the best, and avx2)")
    add("--rounds", type=int, default=25, help="samples of each (default: 25)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--json", type=Path, metavar="FILE", help="save every sample")
    options = parser.parse_args(arguments)
    from cfpo_kernels.backends import cpu

    here = cpu.native.cpu_levels()
    levels = options.levels.split(",") if options.levels else [here[0]]
    if not options.levels and "avx2" in here[1:]:
        levels.append("avx2")
    results: dict[str, list[dict]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        packages = {"other": build(options.revision, folder), "this": REPOSITORY}
        workers = {
            name: stack.enter_context(Worker(package, options.threads))
            for name, package in packages.items()
        }
        for case in find_cases(options.cases):
            results[case.name] = measure(workers, case.name, levels, options.rounds)
            title = f"{report_title(case.name)}, {options.threads} threads"
            report.print_table(title, [HEADER, *map(cells, results[case.name])])
            if options.json:
                save(options, results)


def report_title(name: str) -> str:
    (case,) = find_cases(name)
    return f"{case.name}: {case.rows} x {case.vocabulary} {case.dtype_name}"


def save(options: argparse.Namespace, results: dict[str, list[dict]]) -> None:
    saved = {
        "other": git("rev-parse", options.revision),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "threads": options.threads,
        "cases": results,
    }
    options.json.write_text(json.dumps(saved, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
