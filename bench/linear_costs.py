"""What a head's products cost by their number of rows, and what ours cost beside each other.

    python -m bench.linear_costs [--rounds 7] [--threads 2]
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m bench.linear_costs

Tables of CPU seconds: the three plain products of 512 rows, so many rows at a time; a bfloat16
head on a CPU without instructions for it beside a float32 head, and beside plain PyTorch, which is
on such a CPU only where the variables say so; a batch of which 60% of the rows have no advantage
beside one in which all have; and both schedules by the rows of a tile.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from bench.linear import LinearCase, LinearProblem, make_problem, naive, ours, plain_products, step
from bench.machine import cpu_model
from bench.report import print_table
from cfpo_kernels.linear import products

ROWS = (8, 16, 32, 64, 128, 256, 512)
HEAD = (896, 37984)  # H, V
SMALL = (256, 16384)

Table = dict[str, float]


def cpu_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> Table:
    """The least of all threads' time; interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number > 0:  # the first is for warming up
                samples[name].append(time.process_time() - start)
    return {name: min(taken) for name, taken in samples.items()}


def by_rows(dtype_name: str, rounds: int, sizes: tuple[int, int] = HEAD, rows: int = 512) -> Table:
    """The three products of all rows, so many at a time."""
    calls = {}
    for n in (n for n in ROWS if n <= rows):
        calls[str(n)] = plain_products(problem(dtype_name, rows, sizes, n))
    return cpu_seconds(calls, rounds)


def upcast(rounds: int, sizes: tuple[int, int] = SMALL, rows: int = 256) -> Table:
    def without_instructions(p: LinearProblem) -> None:
        with mock.patch.object(products, "is_fast", lambda dtype, device: dtype == torch.float32):
            step(p, ours())

    return cpu_seconds(
        {
            "float32": partial(step, problem("f32", rows, sizes), ours()),
            "bfloat16, upcast": partial(without_instructions, problem("bf16", rows, sizes)),
            "bfloat16, eager": partial(step, problem("bf16", rows, sizes), naive),
        },
        rounds,
    )


def without_advantages(rounds: int, sizes: tuple[int, int] = SMALL, rows: int = 512) -> Table:
    some = problem("f32", rows, sizes)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    some.advantages[order[: round(0.6 * rows)]] = 0.0
    return cpu_seconds(
        {
            "all rows": partial(step, problem("f32", rows, sizes), ours()),
            "60% without an advantage": partial(step, some, ours()),
        },
        rounds,
    )


def schedules(rounds: int, sizes: tuple[int, int] = (512, 32768), rows: int = 512) -> Table:
    """R, and S, which keeps the last tile: more of it the larger a tile is."""
    calls: dict[str, Callable[[], object]] = {}
    for n in (n for n in (128, 256, 512) if n <= rows):
        for name, low_memory in (("R", False), ("S", True)):
            loss = ours(low_memory=low_memory)
            calls[f"{name}, {n}"] = partial(step, problem("f32", rows, sizes, n), loss)
    return cpu_seconds(calls, rounds)


def problem(dtype_name: str, rows: int, sizes: tuple[int, int], chunk: int = 128) -> LinearProblem:
    return make_problem(LinearCase("cpu", rows, *sizes, dtype_name, chunk))


def show(title: str, found: Table, base: str) -> None:
    cells = [(name, f"{s:.3f}", f"{s / found[base]:.2f}") for name, s in found.items()]
    print_table(title, [("", "CPU s", f"x {base}"), *cells])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.linear_costs", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{cpu_model()}, {options.threads} threads, torch {torch.__version__}")
    for name in ("f32", "bf16"):
        title = f"three products of 512 rows, {HEAD[0]} x {HEAD[1]}, {name}: rows of a product"
        show(title, by_rows(name, min(3, options.rounds)), "512")
    size = f"{SMALL[0]} x {SMALL[1]}"
    show(f"loss and gradients of 256 rows, {size}", upcast(options.rounds), "float32")
    title = f"loss and gradients of 512 rows, {size}, float32"
    show(title, without_advantages(options.rounds), "all rows")
    title = "loss and gradients of 512 rows, 512 x 32768, float32: schedule, rows of a tile"
    show(title, schedules(options.rounds), "R, 128")


if __name__ == "__main__":
    main()
