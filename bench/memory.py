"""Peak extra memory of one call: what it needs beyond the tensors it is given."""

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from bench.cases import find_cases
from bench.harness import step
from bench.problem import make_problem

# Enough for thread teams, lazily loaded code and the allocator's arenas to exist, too little for a
# buffer that an implementation keeps per vocabulary or per row to go unseen.
WARM_UP_ROWS, WARM_UP_VOCABULARY = 16, 256


class CpuMemoryProbe:
    """Measures a fresh process per call, so that nothing kept from an earlier one hides a need."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        # Not fork: an OpenMP team does not survive it. The fork server has imported torch but never
        # computed, so its children start in milliseconds and clean.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["bench.implementations"])

    def extra_bytes(self, case_name: str, implementation_name: str) -> int | None:
        """Peak extra bytes, or None where the system does not tell."""
        if not can_measure_cpu():
            return None
        with ProcessPoolExecutor(1, mp_context=self.context) as process:
            return process.submit(
                measure_cpu_implementation, case_name, implementation_name, self.threads
            ).result()


def can_measure_cpu() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


def measure_cpu_implementation(case_name: str, implementation_name: str, threads: int) -> int:
    """Runs in a fresh process."""
    from bench.implementations import implementations_for

    torch.set_num_threads(threads)
    (case,) = find_cases(case_name)
    found = {entry.name: entry for entry in implementations_for(case.device)}
    implementation = found[implementation_name]
    function = implementation.build()

    # Compiled code is specialised to its shapes: only the real ones warm it up.
    small = replace(case, rows=WARM_UP_ROWS, vocabulary=WARM_UP_VOCABULARY)
    warm_up = make_problem(case if implementation.compiles else small, exact=False)
    for _ in range(2):
        step(implementation, function, warm_up.logits.clone(), warm_up)
    del warm_up

    problem = make_problem(case, exact=False)
    return cpu_extra_bytes(lambda: step(implementation, function, problem.logits, problem))


def cpu_extra_bytes(call: Callable[[], object]) -> int:
    """Growth of the resident set at its peak during `call`.

    Linux keeps the peak (VmHWM); writing 5 to clear_refs sets it back to the present. The kernel
    counts pages of each kind in batches of 32 for each core: on two cores the figure is mostly good
    to 0.1 MiB, and has been off by 0.3.
    """
    # Freed memory that the allocator still holds would be reused without growing the resident set.
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")
    before = process_status("VmRSS")
    result = call()
    peak = process_status("VmHWM")
    del result
    return max(0, peak - before)


def cuda_extra_bytes(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def trim_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def process_status(field: str) -> int:
    """Bytes of a kB field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)
