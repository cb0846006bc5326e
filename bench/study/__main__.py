"""Trains small policies by CFPO, PPO and others, and says what came out.

    python -m bench.study --json out.json --plot out.png       # 45 minutes on 2 free cores
    python -m bench.study --quick                               # 6 runs
    python -m bench.study --from-json out.json --plot out.png

A study that was stopped goes on: finished runs are kept under build/study.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.machine import describe_machine, describe_versions
from bench.report import progress_bar
from bench.study import findings, grid, pictures
from bench.study.grid import Run
from bench.study.train import train

KEPT = Path("build") / "study" / "runs.jsonl"


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by key; a line that was cut off is made again."""
    runs = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs[entry["key"]] = entry["result"]
    return runs


def run_all(wanted: list[Run], path: Path, jobs: int) -> dict[str, dict[str, Any]]:
    done = kept(path)
    left = [run for run in wanted if run.key not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Spawned, so that each worker has its own torch, with one thread.
    with (
        path.open("a") as file,
        progress_bar(len(left)) as tell,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
    ):
        if path.stat().st_size and not path.read_text().endswith("\n"):
            file.write("\n")
        futures = {pool.submit(train, run): run for run in left}
        for future in as_completed(futures):
            run = futures[future]
            result = done[run.key] = future.result()
            file.write(json.dumps({"key": run.key, "result": result}) + "\n")
            file.flush()
            tell(f"{run.key}: {result['after']['right']:.2f} right")
    return {run.key: done[run.key] for run in wanted}


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="six runs")
    parser.add_argument("--seeds", type=int, default=len(grid.SEEDS), help="only the first so many")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where finished runs are kept")
    parser.add_argument("--json", type=Path, help="write the runs there")
    parser.add_argument("--plot", type=Path, help="write the pictures beside this name")
    parser.add_argument("--from-json", type=Path, help="draw and tell what was found before")
    given = parser.parse_args(None if arguments is None else list(arguments))
    if given.from_json:
        report = json.loads(given.from_json.read_text())
    else:
        wanted = grid.quick() if given.quick else grid.full()
        wanted = [run for run in wanted if run.seed < given.seeds]
        report = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "runs": run_all(wanted, given.kept, given.jobs),
        }
    if given.json:
        given.json.write_text(json.dumps(report) + "\n")
    for name, table in findings.markdown(report).items():
        if table.count("\n") > 1:
            print(f"\n{findings.SECTIONS[name].__doc__}\n\n{table}")
    if given.plot:
        for path in pictures.save(report, given.plot):
            print(f"{path}", file=sys.stderr)


if __name__ == "__main__":
    main()
