"""The program of the child process: ``python -m cfpo_kernels.verification.child REQUEST RESULTS``.

A crash, a hang or a poisoned context stays here. What was found so far is always in RESULTS, a line
of JSON each; whatever else is printed, by whomever, goes elsewhere and does not matter.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..backends import triton_failure
from . import battery, cases, records, timing
from .records import CRASHED, NOT_RUN, RIGHT, WRONG, Verdict

# Of a context that nothing can be launched in any more.
POISON = (
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "illegal instruction",
    "device-side assert",
    "illegal address",
    "invalid program counter",
    "hardware stack error",
    "launch timed out",
)
BUSY = ("devices are busy or unavailable", "exclusive")
POISONED_EXIT = 70
# What timing one dtype wants of the time that is left.
TIMING_SECONDS = 6.0


def why_failed(error: BaseException) -> tuple[str, str]:
    """The verdict for kernels that raised this, and the reason in one line."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if isinstance(error, battery.Fault):
        return WRONG, text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in lower:
        return NOT_RUN, "not enough memory"
    if any(words in lower for words in POISON):
        return CRASHED, text[:300]
    if any(words in lower for words in BUSY):
        return NOT_RUN, "the device is busy: another process holds it"
    if "insufficientdriver" in lower or "driver version is insufficient" in lower:
        return NOT_RUN, "the driver is too old for these kernels"
    return NOT_RUN, f"cannot run here: {triton_failure.why_failed(error)}"


class Results:
    """Events, each on disk before the next thing is tried."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # for the process's life

    def write(self, event: str, **values: Any) -> None:
        self.file.write(json.dumps({"event": event, **values}) + "\n")
        self.file.flush()


def check(
    target: battery.Target, dtype: torch.dtype, chosen: list[cases.Case], results: Results
) -> Verdict:
    """One set of kernels, one dtype."""
    name = str(dtype).removeprefix("torch.")
    results.write("begin", kernels=target.name, dtype=name, cases=len(chosen))

    def progress(case: str, phase: str) -> None:
        results.write("case", kernels=target.name, dtype=name, case=case, phase=phase)

    try:
        count = battery.run(target, dtype, chosen, progress)
        verdict = Verdict(target.name, name, RIGHT, cases=count)
    except Exception as error:  # whatever it is, it is this target's
        verdict = Verdict(target.name, name, *why_failed(error))
    results.write("verdict", **asdict(verdict))
    return verdict


def run(request: dict[str, Any], results: Results) -> None:
    begin = time.monotonic()
    device = torch.device(request["device"])
    module, _, function = request["provider"].partition(":")
    provide = getattr(importlib.import_module(module), function)
    try:
        targets = provide(device, request["kernels"])
        torch.empty(1, dtype=torch.float32, device=targets[0].device)
        results.write("identity", **asdict(records.identity_of(device)))
    except Exception as error:
        results.write("cannot", reason=why_failed(error)[1])
        return
    chosen = cases.long() if request["full"] else cases.short()
    done = {tuple(pair) for pair in request["done"]}
    right = {tuple(pair) for pair in request["right"]}
    for dtype_name in request["dtypes"]:
        dtype = getattr(torch, dtype_name)
        for target in targets:
            if (target.name, dtype_name) in done:
                continue
            verdict = check(target, dtype, chosen, results)
            if verdict.verdict == RIGHT:
                right.add((target.name, dtype_name))
            if verdict.verdict == CRASHED:
                os._exit(POISONED_EXIT)  # nothing else can be learnt in this context
        fast = [target for target in targets if (target.name, dtype_name) in right]
        left = request["seconds"] - (time.monotonic() - begin)
        if fast and request["timings"] and left > TIMING_SECONDS:
            results.write("timing_begins", dtype=dtype_name)
            try:
                sizes = timing.FULL_SIZES if request["full"] else timing.SIZES
                for found in timing.measure(fast, dtype, sizes):
                    results.write("timing", **asdict(found))
            except Exception as error:  # right is right, fast or not
                results.write("no_timing", dtype=dtype_name, reason=why_failed(error)[1])
    results.write("end")


def main() -> None:
    request_path, results_path = sys.argv[1:]
    run(json.loads(Path(request_path).read_text()), Results(results_path))


if __name__ == "__main__":
    main()
