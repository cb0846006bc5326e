"""Everything that is compared: our backends, plain PyTorch, and the peers that are installed."""

import os
from collections.abc import Callable
from functools import partial
from typing import cast
from unittest import mock

import torch
from torch import Tensor

import cfpo_kernels
from bench import naive, peers
from bench.harness import (
    EXACT,
    LOW_PRECISION,
    PEER,
    TORCH_FLOAT32,
    Implementation,
    LossFunction,
)
from bench.problem import Problem
from cfpo_kernels.backends import cpu

# Backends that run on a device, the preferred one first.
KERNEL_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

EAGER = "eager-f32"
COMPILED = "compiled-f32"
REFERENCE = "reference"
LEVEL_PREFIX = "cpu-level-"


def implementations_for(device: str) -> list[Implementation]:
    """All that can run on `device`, ours first."""
    status = cfpo_kernels.available_backends()
    backends = [name for name in KERNEL_BACKENDS[device] if status[name].available]
    ours = [entry for name in backends for entry in kernels_of(name)]
    if "cpu" in backends:
        ours += [at_level(name) for name in cpu.native.cpu_levels()[1:]]
    if "cuda" in backends:
        ours += [of_cuda("portable"), of_cuda("auto-transient")]
    found_peers = peers.implementations() if device == "cuda" else []
    return [*ours, reference(), *baselines(), *found_peers]


def kernels_of(backend: str) -> list[Implementation]:
    """The four ways one backend is used."""

    def entry(
        name: str, label: str, function: Callable[..., Tensor], backward: bool
    ) -> Implementation:
        return Implementation(
            name=f"{backend}-{name}",
            label=f"{backend} kernel, {label}",
            kind="ours",
            build=lambda: partial(function, backend=backend),
            tolerance=EXACT,
            backward=backward,
        )

    return [
        entry("inplace", "in place", partial(our_loss, inplace=True), backward=True),
        entry("outofplace", "not in place", our_loss, backward=True),
        entry("token-logps", "token_logps + torch loss", our_token_logps_loss, backward=True),
        entry("forward", "forward only", our_loss, backward=False),
    ]


def at_level(level: str) -> Implementation:
    """The CPU kernels held to an instruction set below this machine's best."""
    name, label = f"{LEVEL_PREFIX}{level}", f"cpu kernel, in place, {level}"
    return held_back(name, label, "cpu", CFPO_KERNELS_CPU_LEVEL=level)


def of_cuda(row_kernel: str) -> Implementation:
    """Other CUDA kernels than those of "auto", whose controls they are."""
    name = row_kernel.removeprefix("auto-")
    label = f"cuda kernel, in place, {name}"
    return held_back(f"cuda-{name}", label, "cuda", CFPO_KERNELS_CUDA_KERNEL=row_kernel)


def held_back(
    name: str, label: str, backend: str, *, inplace: bool = True, **environment: str
) -> Implementation:
    def loss(logits: Tensor, problem: Problem) -> Tensor:
        with mock.patch.dict(os.environ, environment):
            return our_loss(logits, problem, backend=backend, inplace=inplace)

    return Implementation(name=name, label=label, kind="ours", build=lambda: loss, tolerance=EXACT)


def reference() -> Implementation:
    return Implementation(
        name=REFERENCE,
        label="reference backend (torch)",
        kind="ours",
        build=lambda: partial(our_loss, backend="reference"),
        tolerance=TORCH_FLOAT32,
    )


def our_loss(logits: Tensor, problem: Problem, *, backend: str, inplace: bool = False) -> Tensor:
    scale = problem.case.loss_scale
    loss = cfpo_kernels.cfpo_loss(
        logits,
        problem.token_ids,
        problem.advantages,
        problem.old_logps,
        epsilon=naive.EPSILON,
        inplace=inplace,
        grad_scale=None if scale == 1 else scale,
        backend=backend,
    )
    return cast(Tensor, loss)  # a pair only with return_stats=True


def our_token_logps_loss(logits: Tensor, problem: Problem, *, backend: str) -> Tensor:
    logps = cfpo_kernels.token_logps(logits, problem.token_ids, backend=backend)
    return naive.objective_term(cast(Tensor, logps), problem.old_logps, problem.advantages).mean()


def baselines() -> list[Implementation]:
    return [
        Implementation(
            EAGER, "eager PyTorch, float32", "baseline", lambda: naive.loss_float32, PEER
        ),
        Implementation(
            "eager-native",
            "eager PyTorch, logits' dtype",
            "baseline",
            lambda: naive.loss_native,
            LOW_PRECISION,
        ),
        Implementation(
            COMPILED,
            "torch.compile, float32",
            "baseline",
            compile_float32,
            PEER,
            compiles=True,
        ),
        Implementation(
            "chunked-f32", "eager PyTorch, row chunks", "baseline", lambda: naive.loss_chunked, PEER
        ),
    ]


def compile_float32() -> LossFunction:
    # A reset for each case: otherwise a second shape makes dynamo recompile with dynamic sizes,
    # and the later cases would time slower code than the first.
    torch._dynamo.reset()
    return torch.compile(naive.loss_float32, fullgraph=True, dynamic=False)
