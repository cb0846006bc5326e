"""Command line of the benchmark: `python -m bench --help`."""

import argparse
import sys
from pathlib import Path

import torch

from bench import implementations, linear, report
from bench.cases import CASE_SETS, Case, find_cases
from bench.checks import WrongResult
from bench.harness import Implementation
from bench.runner import Settings, run_case, steps_of

EXAMPLES = """\
examples:
  python -m bench                                     all CPU cases
  python -m bench --cases cpu-128256-bf16             one case
  python -m bench --cases gpu --json h100.json        all GPU cases, every sample kept
  python -m bench --cases linear                      the loss from hidden states, on a GPU if any
  python -m bench --from-json h100.json --plot h100.png
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 1 when one of our kernels is wrong, 2 when the arguments are."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        for path in filter(None, (options.json, options.plot)):
            if not path.absolute().parent.is_dir():  # better said now than after the measuring
                raise ValueError(f"there is no folder for {path}")
        if options.list:
            print_lists()
            return 0
        result = report.load(options.from_json) if options.from_json else measure(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except WrongResult as error:
        print(f"error: {error}. Nothing is reported of this case.", file=sys.stderr)
        return 1
    if result.get("kind") == "linear":
        linear.print_report(result)
    else:
        report.print_report(result)
    if options.json:
        report.save(result, options.json)
    if options.plot:
        from bench import plot

        plot.save(result, options.plot)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time and memory of the CFPO loss beside a copy of the logits and its peers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", default="cpu", help="sets and single cases, comma-separated (default: cpu)")
    add("--list", action="store_true", help="list the cases and implementations, and stop")
    add("--implementations", help="only these, comma-separated (default: all that can run)")
    add("--without", help="not those whose names begin so, comma-separated")
    add("--rounds", type=int, default=25, help="rounds; slow ones run every 5th (default: 25)")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--no-memory", action="store_true", help="do not measure memory")
    add("--json", type=Path, metavar="FILE", help="save the report")
    add("--plot", type=Path, metavar="FILE", help="save a picture of the report")
    add("--from-json", type=Path, metavar="FILE", help="show or plot a saved report, no measuring")
    return parser


def measure_linear(options: argparse.Namespace) -> dict:
    cases = linear.cases_of(options.cases)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    each = 1 + 2 * len(linear.implementations()) + options.rounds
    with report.progress_bar(len(cases) * each) as tell:
        found: list[dict] = []
        for case in cases:
            found.append(
                linear.run_case(case, options.rounds, threads, not options.no_memory, tell)
            )
            if options.json:  # the next one may fail
                report.save(linear.make_report(found, options.rounds, threads), options.json)
    return linear.make_report(found, options.rounds, threads)


def measure(options: argparse.Namespace) -> dict:
    if options.cases.startswith("linear"):
        return measure_linear(options)
    cases = find_cases(options.cases)
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if any(case.device == "cuda" for case in cases) and not torch.cuda.is_available():
        raise ValueError("a gpu case was asked for, but torch finds no CUDA device")
    settings = Settings(options.rounds, torch.get_num_threads(), not options.no_memory)

    chosen = {case: choose(case, options.implementations, options.without) for case in cases}
    steps = sum(steps_of(entries, settings) for entries in chosen.values())
    with report.progress_bar(steps) as tell:
        results: list[dict] = []
        for case, entries in chosen.items():
            results.append(run_case(case, entries, settings, tell))
            if options.json:  # the next one may fail
                report.save(report.make_report(results, settings), options.json)
    return report.make_report(results, settings)


def choose(case: Case, names: str | None, without: str | None) -> list[Implementation]:
    found = {entry.name: entry for entry in implementations.implementations_for(case.device)}
    if without is not None:
        prefixes = tuple(prefix.strip() for prefix in without.split(","))
        found = {name: entry for name, entry in found.items() if not name.startswith(prefixes)}
    if names is None:
        return list(found.values())
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in found]:
        raise ValueError(
            f"cannot run {', '.join(unknown)} for {case.name}: available are {', '.join(found)}"
        )
    return [found[name] for name in wanted]


def print_lists() -> None:
    for name, cases in CASE_SETS.items():
        print(f"--cases {name}")
        for case in cases:
            print(f"  {case.name:20} {case.rows:5} rows, {report.human_bytes(case.logits_bytes)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"--implementations, on this machine's {device}")
    for entry in implementations.implementations_for(device):
        print(f"  {entry.name:20} {entry.label}")


if __name__ == "__main__":
    sys.exit(main())
