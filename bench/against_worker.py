"""One version's side of bench.against: answers questions on stdin, a line of JSON each.

`cfpo_kernels` is the version that PYTHONPATH names; the rest of the benchmark is this tree's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import torch

import cfpo_kernels

sys.path.append(os.environ["BENCH_REPOSITORY"])
from bench.cases import find_cases
from bench.harness import step
from bench.implementations import held_back
from bench.problem import make_problem
from bench.timing import cpu_seconds, interruptions

REUSED = "buffer reused"


class Case:
    """What is measured of one case."""

    def __init__(self, name: str) -> None:
        (case,) = find_cases(name)
        self.problem = make_problem(case, exact=False)
        self.logits = self.problem.logits.clone()
        self.copied = self.problem.logits.clone()
        bits = torch.int16 if case.dtype.itemsize == 2 else torch.int32
        self.bits = self.logits.view(bits)

    @property
    def ways(self) -> list[str]:
        can_reuse = hasattr(cfpo_kernels, "reuse_gradient_buffer")
        return ["in place", "not in place", *([REUSED] if can_reuse else [])]

    def call(self, way: str, level: str) -> Callable[[], object]:
        if way == "copy":
            return lambda: self.copied.copy_(self.logits)
        if way == "rewrite":
            return lambda: self.bits.bitwise_xor_(1)
        entry = held_back(way, way, "cpu", inplace=way == "in place", CFPO_KERNELS_CPU_LEVEL=level)
        return lambda: step(entry, entry.build(), self.logits, self.problem)

    def sample(self, way: str, level: str) -> tuple[float, bool]:
        if way == REUSED:  # given back afterwards: the other ways have to find fresh memory
            cfpo_kernels.reuse_gradient_buffer(True)
            self.call(way, level)()
        call = self.call(way, level)
        self.logits.copy_(self.problem.logits)
        before = interruptions()
        milliseconds = cpu_seconds(call) * 1e3
        interrupted = interruptions() != before
        if way == REUSED:
            cfpo_kernels.reuse_gradient_buffer(False)
        return milliseconds, interrupted


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    case: Case | None = None
    for line in sys.stdin:
        question, *of = json.loads(line)
        if question == "prepare":
            case = None  # its memory, before the next one's
            case = Case(*of)
            answer: object = case.ways
        else:
            assert case is not None
            answer = case.sample(*of)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
