"""What a person sees: a verification while it goes on, its outcome, and ``info``."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TextIO

import torch

from ..backends import available_backends, triton
from . import records, targets
from .records import RIGHT, VerifyRecord


def _rich_console(stream: TextIO) -> Any:
    """A rich console where rich is installed and somebody watches, or None."""
    if not stream.isatty() or importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    return Console(file=stream, highlight=False)


class Progress(AbstractContextManager["Progress"]):
    """Events of a verification, as they come: one line that changes on a terminal, else a line for
    each set of kernels and dtype."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.console = _rich_console(self.stream)
        self.status = self.console.status("starting") if self.console else None
        self.cases = 0

    def __enter__(self) -> Progress:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def line(self, text: str) -> None:
        if self.console:
            self.console.print(text, markup=False)
        else:
            print(text, file=self.stream, flush=True)

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "begin":
            self.cases = 0
            if not self.console:
                self.line(f"{event['kernels']}, {event['dtype']}: {event['cases']} cases ...")
        elif kind == "case" and event["phase"] == "launch":
            self.cases += 1
            if self.status:
                of = f"{event['kernels']}, {event['dtype']}"
                self.status.update(f"{of}: case {self.cases}: {event['case']}")
        elif kind == "verdict":
            reason = f": {event['reason']}" if event["reason"] else ""
            self.line(f"{event['kernels']}, {event['dtype']}: {event['verdict']}{reason}")
        elif kind == "timing_begins":
            text = f"timing {event['dtype']} ..."
            self.status.update(text) if self.status else self.line(text)


HEADER = ("kernels", "dtype", "verdict", "cases", "loss + gradient / copy, by V")


def verdict_rows(record: VerifyRecord) -> list[tuple[str, ...]]:
    """A row for each set of kernels and dtype."""
    rows: list[tuple[str, ...]] = []
    for found in record.verdicts:
        times = [
            f"{t.n_cols}: {t.ms / t.copy_ms:.2f}"
            for t in record.timings
            if (t.kernels, t.dtype) == (found.kernels, found.dtype) and t.copy_ms > 0
        ]
        verdict = found.verdict + (f": {found.reason}" if found.reason else "")
        rows.append((found.kernels, found.dtype, verdict, str(found.cases or ""), "  ".join(times)))
    return rows


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Columns of plain text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, tuple("-" * width for width in widths), *rows]
    ]
    return "\n".join(lines)


def print_record(record: VerifyRecord, stream: TextIO | None = None) -> None:
    """The outcome as a table."""
    stream = sys.stdout if stream is None else stream
    rows = verdict_rows(record)
    title = f"{record.identity.device}, capability {record.identity.capability}"
    title += f": {'full' if record.full else 'short'} battery, {record.seconds:.0f} s"
    console = _rich_console(stream)
    if console is None:
        print(f"{title}\n\n{table(rows, HEADER) if rows else 'nothing to check'}", file=stream)
        return
    from rich.table import Table

    drawn = Table(title=title)
    for name in HEADER:
        drawn.add_column(name)
    for row in rows:
        colour = "green" if row[2] == RIGHT else "yellow" if row[2].startswith("not") else "red"
        drawn.add_row(*row[:2], f"[{colour}]{row[2]}[/]", *row[3:])
    console.print(drawn)


def facts() -> dict[str, Any]:
    """What a bug report needs: versions, devices, backends and the records. No names of hosts or
    users."""
    versions = {
        "cfpo-kernels": records.version_of("cfpo-kernels"),
        "kernels' code": records.code_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": records.version_of("triton"),
        "CUDA of torch": str(torch.version.cuda or torch.version.hip or "none"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    devices = [torch.device("cpu")]
    for kind in triton.DEVICES:
        if triton.has_device(kind):
            count = torch.get_device_module(kind).device_count()
            devices += [torch.device(kind, index) for index in range(count)]
    variables = {name: os.environ[name] for name in sorted(os.environ) if "CFPO_KERNELS" in name}
    return {
        "versions": versions,
        "variables": variables,
        "backends": {
            name: {"available": bool(status), "detail": status.detail}
            for name, status in available_backends().items()
        },
        "devices": [_device_facts(device) for device in devices],
    }


def _device_facts(device: torch.device) -> dict[str, Any]:
    identity = records.identity_of(device)
    record = records.load(identity)
    return {
        "device": str(device),
        "name": identity.device,
        "capability": identity.capability,
        "driver": identity.driver,
        "auto": _auto(device, record),
        "record": None if record is None else record.as_json(),
    }


def _auto(device: torch.device, record: VerifyRecord | None) -> str:
    """What backend="auto" takes, by dtype."""
    from .choice import VERIFY, fastest

    if device.type == "cpu":
        wrong = record is not None and record.exit_status() == 1
        return "see the record" if wrong else "cpu"
    why = {name: targets.why_not(name, device) for name in targets.names_for(device)}
    if record is None:
        if all(why.values()):
            return "reference: no kernels can run on it"
        return f"not verified yet: the first use does it, or {VERIFY}"
    sizes = (32000, 151936)
    return "; ".join(
        f"{str(dtype).removeprefix('torch.')}: "
        + ", ".join(f"{fastest(record, dtype, size)} at V = {size}" for size in sizes)
        for dtype in targets.DTYPES
    )


def print_info(say: Callable[[str], object] = print) -> None:
    """``facts`` as text."""
    known = facts()
    for name, value in known["versions"].items():
        say(f"{name:18} {value}")
    for name, value in known["variables"].items():
        say(f"{name:18} {value}")
    for name, backend in known["backends"].items():
        state = "available" if backend["available"] else "not available"
        say(f"\n{name}: {state}\n  {backend['detail']}")
    for device in known["devices"]:
        say(f"\n{device['device']}: {device['name']}, capability {device['capability']}")
        say(f"  backend='auto': {device['auto']}")
        if device["record"] is not None:
            record = VerifyRecord.from_json(device["record"])
            say(f"  verified {record.date}")
            for line in table(verdict_rows(record), HEADER).splitlines():
                say(f"  {line}")
        elif device["device"] != "cpu":
            say("  no record")
    if len(known["devices"]) == 1:
        say("\nNo GPU: torch sees none, so nothing of the CUDA and Triton kernels can be verified.")
