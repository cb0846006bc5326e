"""``python -m cfpo_kernels verify`` and ``python -m cfpo_kernels info``."""

from __future__ import annotations

import argparse
import json
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cfpo_kernels", description="Fused policy losses: checks and facts."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser(
        "verify",
        help="check the kernels on this machine and keep the record",
        description="Checks the kernels on a device against float64 in a child process, times "
        "those that are right beside a copy, and keeps a record, which backend='auto' follows. "
        "Exit status 0: all right, or nothing to check; 1: something is wrong; 2: something "
        "could not run.",
    )
    verify.add_argument("--device", help="such as cuda:1 or cpu; default: the current GPU, or cpu")
    verify.add_argument("--backend", help="cuda, triton or cpu; default: all for the device")
    verify.add_argument("--full", action="store_true", help="the long battery: minutes")
    verify.add_argument("--json", metavar="FILE", help="also write the record to FILE")
    verify.add_argument("--timeout", type=float, metavar="SECONDS", help="default 90; full 600")
    info = commands.add_parser("info", help="versions, devices, backends, records: for a report")
    info.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)

    from .verification import report, run

    if options.command == "info":
        if options.json:
            print(json.dumps(report.facts(), indent=1))
        else:
            report.print_info()
        return 0
    try:
        device = run.resolve_device(options.device or _device_of(options.backend))
        with report.Progress() as progress:
            record = run.check(
                device,
                backend=options.backend,
                full=options.full,
                json=options.json,
                timeout=options.timeout,
                on_event=progress,
                notice=progress.line,
            )
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.print_record(record)
    return record.exit_status()


def _device_of(backend: str | None) -> str | None:
    """`--backend cpu` means the CPU also where there is a GPU."""
    return "cpu" if backend == "cpu" else None


if __name__ == "__main__":
    sys.exit(main())
