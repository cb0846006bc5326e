"""What an odd vocabulary costs: time an element at V = 50257 beside V = 50304.

    python -m bench.odd

Rows of odd V start at any alignment. The two are measured in turn, in one process, because between
two cases of ``python -m bench`` the machine may have changed its speed.
"""

import argparse
import statistics
from functools import partial

import torch

from bench.cases import find_cases
from bench.harness import step
from bench.implementations import implementations_for
from bench.problem import make_problem
from bench.timing import Call, interleaved_samples

ODD, EVEN = "cpu-50257-bf16", "cpu-50304-bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="rounds (default: 40)")
    rounds = parser.parse_args().rounds
    inplace = next(entry for entry in implementations_for("cpu") if entry.name == "cpu-inplace")
    function = inplace.build()
    problems = {name: make_problem(find_cases(name)[0], exact=False) for name in (ODD, EVEN)}
    logits = {name: problem.logits.clone() for name, problem in problems.items()}

    def restore() -> None:
        for name, problem in problems.items():
            logits[name].copy_(problem.logits)

    calls: dict[str, Call] = {
        name: partial(step, inplace, function, logits[name], problem)
        for name, problem in problems.items()
    }
    samples = interleaved_samples(calls, restore, rounds, "cpu")
    each = {
        name: statistics.median(samples[name]) / logits[name].numel() * 1e9 for name in problems
    }
    for name, picoseconds in each.items():
        print(
            f"{name}: {picoseconds:.1f} ps an element (in place, {torch.get_num_threads()} threads)"
        )
    print(f"odd / even: {each[ODD] / each[EVEN]:.3f}")


if __name__ == "__main__":
    main()
