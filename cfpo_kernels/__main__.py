"""``python -m cfpo_kernels verify``, ``info`` and ``memory``."""

from __future__ import annotations

import argparse
import json
import os
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
    memory = commands.add_parser(
        "memory",
        help="what a step of a loss takes, by the way it is computed",
        description="Peak bytes of forward and backward beyond hidden states and head, by formulas "
        "that are measured on a CPU. With --tp, on each process.",
    )
    for name, letter in (("tokens", "N"), ("vocab", "V"), ("hidden", "H")):
        memory.add_argument(f"--{name}", type=_positive, required=True, metavar=letter)
    memory.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    memory.add_argument("--tp", type=_positive, default=1, metavar="RANKS", help="default 1")
    memory.add_argument(
        "--chunk-tokens", type=_positive, metavar="n", help="rows of a tile; default: the device's"
    )
    memory.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is one"
    )
    memory.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    if options.command == "memory":
        return _memory(options)

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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _memory(options: argparse.Namespace) -> int:
    import torch

    from .linear import memory
    from .verification import report

    if options.tp > options.vocab:
        print(f"error: --tp {options.tp} is more than --vocab {options.vocab}", file=sys.stderr)
        return 2
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    step = memory.Step(
        options.tokens,
        options.vocab,
        options.hidden,
        memory.DTYPES[options.dtype],
        torch.device(device),
        options.chunk_tokens,
        options.tp,
    )
    ways = memory.ways(step)
    if options.json:
        settings = {"device": device, "chunk_tokens": step.rows, "tp": options.tp}
        print(json.dumps(settings | {"bytes": dict(ways)}, indent=1))
        return 0
    split = f", vocabulary over {options.tp} processes, on each" if options.tp > 1 else ""
    print(f"Peak beyond hidden states and head, tiles of {step.rows} rows on {device}{split}\n")
    rows: list[tuple[str, ...]] = [
        (name, f"{size:>15,}", f"{size / 2**30:8.2f}") for name, size in ways
    ]
    print(report.table(rows, ("way", f"{'bytes':>15}", f"{'GiB':>8}")))
    return 0


def _device_of(backend: str | None) -> str | None:
    """`--backend cpu` means the CPU also where there is a GPU."""
    return "cpu" if backend == "cpu" else None


def _program() -> int:
    """Ends without a traceback where nobody reads what is left, as in ``| head``."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is buffered goes nowhere: Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as of a program that SIGPIPE ended


if __name__ == "__main__":
    sys.exit(_program())
