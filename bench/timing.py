"""Interleaved timing: every implementation meets the same moods of the machine."""

import gc
import math
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

# A sample slower than this is not taken in every round, down to every fifth.
SLOW_SECONDS = 0.05
LEAST_FREQUENT = 5
LAUNCH_CYCLES = 4_000_000  # of a GPU: some 2 ms

Call = Callable[[], object]

# So many samples that nobody interrupted decide alone; with fewer all count.
ENOUGH_UNINTERRUPTED = 5


class Samples(list[float]):
    """Milliseconds, and which of them were taken while another process had one of our cores."""

    def __init__(self) -> None:
        super().__init__()
        self.interrupted: list[bool] = []

    def take(self, milliseconds: float, interrupted: bool) -> None:
        self.append(milliseconds)
        self.interrupted.append(interrupted)

    @property
    def uninterrupted(self) -> list[float]:
        return [x for x, disturbed in zip(self, self.interrupted, strict=True) if not disturbed]

    @property
    def decisive(self) -> list[float]:
        """What a median is taken of: a shared machine's other work is no property of ours."""
        steady = self.uninterrupted
        return steady if len(steady) >= ENOUGH_UNINTERRUPTED else list(self)


def interruptions() -> int:
    """How often this process's threads had to leave a core so far, as far as the system tells.

    Counts ticks that a host took from a virtual machine too. Nothing tells of the other thread of a
    core, or of caches and memory that are shared.
    """
    stolen = 0
    with suppress(OSError, IndexError, ValueError):  # not Linux
        stolen = int(Path("/proc/stat").read_text().split(maxsplit=9)[8])
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw + stolen


def interleaved_samples(
    calls: dict[str, Call],
    restore: Call,
    rounds: int,
    device: str,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Milliseconds of each call, round robin over `rounds`; `restore` runs before each, untimed.

    Since every sample follows a restore, all of them find the caches in the same state. Slow calls
    sit rounds out, but are never bunched together. Compilation is over: each call has run before.
    """
    stopwatch = cuda_seconds if device == "cuda" else cpu_seconds
    samples = {name: Samples() for name in calls}
    strides = {}
    for name, call in calls.items():  # one more run to warm up, which also says who is slow
        restore()
        strides[name] = stride_for(stopwatch(call))
    gc.collect()
    gc.disable()  # a collection inside a sample would count as its time
    try:
        for round_index in range(rounds):
            for name, call in calls.items():
                if round_index % min(strides[name], rounds) == 0:
                    restore()
                    before = interruptions()
                    milliseconds = stopwatch(call) * 1e3
                    # A GPU goes on while a thread of ours waits.
                    interrupted = device != "cuda" and interruptions() != before
                    samples[name].take(milliseconds, interrupted)
            advance()
    finally:
        gc.enable()
    return samples


def stride_for(seconds: float) -> int:
    return max(1, min(LEAST_FREQUENT, math.ceil(seconds / SLOW_SECONDS)))


def cpu_seconds(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result  # giving V-sized memory back is outside the sample, for everyone alike
    return elapsed


def cuda_seconds(call: Call) -> float:
    # The device is kept busy while Python launches `call`, so that launch overhead hides as it does
    # in a training step. The restore that was just queued may be over too soon for that.
    torch.cuda._sleep(LAUNCH_CYCLES)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    del result
    return start.elapsed_time(stop) / 1e3
