"""The report: a table for the terminal and a JSON file that holds every sample."""

import json
import os
import sys
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import count
from pathlib import Path

import cfpo_kernels
from bench.implementations import COMPILED, EAGER, KERNEL_BACKENDS
from bench.machine import describe_machine, describe_versions, device_name
from bench.runner import Settings
from bench.timing import ENOUGH_UNINTERRUPTED

SCHEMA = 1

NOTES = [
    "Times are medians of interleaved samples of one training step's loss and backward() on logits "
    "that are no leaf; 'forward only' runs under no_grad. No row is masked.",
    "Before every sample the logits are restored from a master copy, outside the timed region.",
    "GB/s counts what a perfect implementation moves: one read and one write of the logits "
    "(forward only: one read), whatever an implementation really moves.",
    "copy is dst.copy_(logits) into memory already touched, in the same rounds; rewrite reads and "
    "writes the logits' own memory, which is the floor of what works in place.",
    "Medians are of samples during which no other process had one of our cores, where there are "
    f"{ENOUGH_UNINTERRUPTED} of those; ~ stands where there are not, and all samples count.",
    "On the CPU, PyTorch takes fresh pages from the system for each V-sized result; these page "
    "faults are part of the time of everything that is not in place, as they are for its users.",
    "Extra memory is the peak during one call beyond the logits themselves; dlogits count, where "
    "they are a new tensor. CPU: resident set in a fresh process; GPU: the caching allocator.",
    "Loss and dlogits were checked against float64 autograd before anything was timed.",
]


def make_report(cases: list[dict], settings: Settings) -> dict:
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "backends": {
            name: {"available": status.available, "detail": status.detail}
            for name, status in cfpo_kernels.available_backends().items()
        },
        "settings": {
            "rounds": settings.rounds,
            "threads": settings.threads,
            "environment": relevant_environment(),
        },
        "cases": cases,
        "notes": NOTES,
    }


def relevant_environment() -> dict[str, str]:
    """Variables that change what runs: forced instruction sets, thread placement, ... No paths."""
    prefixes = ("CFPO_KERNELS_", "OMP_", "GOMP_", "KMP_", "TORCH", "TRITON_", "CUDA_")
    return {
        key: value
        for key, value in os.environ.items()
        if key.startswith(prefixes) and "/" not in value
    }


def save(report: dict, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> dict:
    """A saved report. Raises ValueError for anything else."""
    report = json.loads(path.read_text())
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no benchmark report of schema {SCHEMA}")
    return report


HEADER = (
    *("implementation", "ms", "min to max", "GB/s", "x copy", "x rewrite"),
    *("vs eager", "vs compile", "extra"),
)


def print_report(report: dict) -> None:
    print(describe(report))
    for name in missing_backends(report):
        print(f"left out: backend {name}: {report['backends'][name]['detail']}")
    for case in report["cases"]:
        print_table(case_title(case), [HEADER, *table_rows(case)])
        for name, reason in case["skipped"].items():
            print(f"  left out: {name}: {reason}")
    print()
    for note in report["notes"]:
        print(f"- {note}")


def describe(report: dict) -> str:
    versions, settings = report["versions"], report["settings"]
    devices = {case["device"]: None for case in report["cases"]}
    names = " and ".join(device_name(report["machine"], device) for device in devices)
    commit = (versions["git_commit"] or "unknown")[:10] + (
        ", modified" if versions["git_modified"] else ""
    )
    return (
        f"{names}; {settings['threads']} CPU threads; torch {versions['torch']}, "
        f"cfpo-kernels {versions['cfpo-kernels']} (commit {commit}); {report['date']}"
    )


def missing_backends(report: dict) -> list[str]:
    """Our kernels that could have run on the measured devices, were they available."""
    devices = {case["device"] for case in report["cases"]}
    wanted = [name for device in sorted(devices) for name in KERNEL_BACKENDS[device]]
    return [name for name in wanted if not report["backends"][name]["available"]]


def case_title(case: dict) -> str:
    return (
        f"{case['name']}: {case['rows']} x {case['vocabulary']} {case['dtype']}, "
        f"logits {human_bytes(case['logits_bytes'])}"
    )


def table_rows(case: dict) -> list[tuple[str, ...]]:
    copy, rewrite = case["copy"], case.get("rewrite")  # reports of old have no rewrite
    blank = ("", "", "")
    rows: list[tuple[str, ...]] = [("copy", *timing_cells(copy), "1.00", "", *blank)]
    if rewrite is not None:
        ratio = f"{rewrite['median_ms'] / copy['median_ms']:.2f}"
        rows.append(("rewrite in place", *timing_cells(rewrite), ratio, "1.00", *blank))
    for name, control in case.get("controls", {}).items():
        ratio = f"{control['median_ms'] / copy['median_ms']:.2f}"
        rows.append((name, *timing_cells(control), ratio, "", *blank))
    for result in case["results"]:
        speedups = (result["speedup_over"][name] for name in (EAGER, COMPILED))
        rows.append(
            (
                result["label"],
                *timing_cells(result),
                f"{result['ratio_to_copy']:.2f}",
                "" if rewrite is None else f"{result['ratio_to_rewrite']:.2f}",
                *("" if value is None else f"{value:.1f}x" for value in speedups),
                "" if result["extra_bytes"] is None else human_bytes(result["extra_bytes"]),
            )
        )
    return rows


def timing_cells(figures: dict) -> tuple[str, str, str]:
    few = figures.get("uninterrupted", ENOUGH_UNINTERRUPTED) < ENOUGH_UNINTERRUPTED
    return (
        ("~" if few else "") + f"{figures['median_ms']:.3f}",
        f"{figures['min_ms']:.3f} to {figures['max_ms']:.3f}",
        f"{figures['gb_per_s']:.1f}",
    )


def human_bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit != "MiB" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def print_table(title: str, rows: list[tuple[str, ...]]) -> None:
    """A rich table; columns of plain text where rich is not installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(f"\n{title}")
        for first, *rest in rows:
            numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
            print("  ".join((first.ljust(widths[0]), *numbers)).rstrip())
        return
    table = Table(title=title, box=box.SIMPLE, title_justify="left", title_style="bold")
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a log file has no width to fit into
        console.width = 160
    console.print(table)


@contextmanager
def progress_bar(total: int):
    """Yields tell(description), which moves the bar by one; lines without rich or a terminal."""
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

        console = Console(stderr=True)
    except ImportError:
        console = None
    if console is None or not console.is_terminal:
        numbers = count(1)
        yield lambda text: print(f"{next(numbers)}/{total}  {text}", file=sys.stderr, flush=True)
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def tell(description: str) -> None:
            progress.update(task, advance=1, description=f"{description:40}")

        yield tell
