"""How fast kernels are that were found right: in turns with each other and with a copy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from ..backends.base import Backend, KernelRows
from .battery import Target
from .cases import Case, Inputs, make_inputs
from .records import Timing

# GPT-2 (odd), Llama 3, Qwen 2.5, Gemma: rows for which the battery has compiled Triton's kernels.
SIZES = (50257, 128256, 151936, 262144)
# Llama 2 as well, where there is time.
FULL_SIZES = (32000, *SIZES)
ROUNDS = 7
# Several times the last-level cache, where the device has so much memory to spare.
GPU_BYTES, CPU_BYTES = 2**29, 2**26


def measure(targets: list[Target], dtype: torch.dtype, sizes: tuple[int, ...]) -> Iterator[Timing]:
    """Times of every target for each size. All targets are on one device."""
    for n_cols in sizes:
        if any(n_cols > target.largest for target in targets):
            continue
        yield from _one_size(targets, dtype, n_cols)


def _one_size(targets: list[Target], dtype: torch.dtype, n_cols: int) -> Iterator[Timing]:
    first = targets[0]
    n_rows = max(8, _bytes(first.device) // (n_cols * dtype.itemsize))
    # A slow target is timed on few rows: it is not there to be fast.
    if first.largest < 2**31:
        n_rows = 8
    case = Case("timing", n_cols)
    seed = make_inputs(case, dtype, first.device, 8)
    inputs = _repeated(seed, n_rows)
    logits = inputs.rows.logits
    other = torch.empty_like(logits)
    loss = torch.empty(n_rows, dtype=torch.float32, device=first.device)
    logps = torch.empty_like(loss)

    def train(kernels: Backend) -> None:
        kernels.policy_loss(
            inputs.rows, inputs.terms, loss=loss, logps=logps, entropy=None, dlogits=logits
        )

    calls: dict[str, Callable[[], object]] = {
        target.name: partial(train, target.kernels) for target in targets
    }
    calls["copy"] = partial(other.copy_, logits)
    with first.current():
        ms = _medians(calls, first)
    for target in targets:
        yield Timing(
            target.name,
            str(dtype).removeprefix("torch."),
            n_rows,
            n_cols,
            ms[target.name],
            ms["copy"],
        )


def _bytes(device: torch.device) -> int:
    """Of the logits. A training job may hold the rest of the memory."""
    if device.type == "cpu":
        return CPU_BYTES
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return 2**27
    free, _ = module.mem_get_info(device)
    return int(min(GPU_BYTES, free // 6))


def _repeated(inputs: Inputs, n_rows: int) -> Inputs:
    """The same rows again and again, without those that are masked, contiguous."""
    keep = inputs.active.nonzero().squeeze(1)
    index = keep[torch.arange(n_rows, dtype=torch.int64, device=keep.device) % keep.numel()]

    given, terms = inputs.rows, inputs.terms
    picked = KernelRows(
        given.logits[index], given.token_ids[index], given.weights[index], given.temperature
    )
    return Inputs(
        picked,
        terms._replace(inputs=terms.inputs.each(lambda x: x[index].contiguous())),
        inputs.kinds[index],
        inputs.dlogps[index],
        None,
        inputs.factors[index],
    )


def _medians(calls: dict[str, Callable[[], object]], target: Target) -> dict[str, float]:
    """Milliseconds, the calls taken in turns: all of them meet the same moods of the machine."""
    clock = _event_ms if target.device.type in ("cuda", "xpu") else _host_ms
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(ROUNDS + 1):
        for name, call in calls.items():
            ms = clock(call, target)
            if i > 0:  # the first round compiles and warms up
                samples[name].append(ms)
    return {name: round(median(values), 4) for name, values in samples.items()}


def _event_ms(call: Callable[[], object], target: Target) -> float:
    module = torch.get_device_module(target.device)
    begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _host_ms(call: Callable[[], object], target: Target) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def nearest(sizes: list[int], n_cols: int) -> int:
    """The measured size that says most about rows of n_cols."""
    return min(sizes, key=lambda size: abs(math.log(size / n_cols)))
