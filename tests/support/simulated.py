"""A GPU that is not there: CPU tensors, kernels that run on the CPU, and faults planted in them.

The functions named like ``device_targets`` are what the child process of a verification calls in
place of the one for real devices; its environment says where the emulated kernels are.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpo_kernels.backends import KERNELS
from cfpo_kernels.backends.base import Backend
from cfpo_kernels.verification import records
from cfpo_kernels.verification.battery import Target

EMULATED = "CFPO_TESTS_EMULATED"  # the folder of the emulated module
NAME = "Simulated GPU"


def identity_of(device: torch.device) -> records.Identity:
    return records.Identity("0", "code", NAME, "9.0", "13000", torch.__version__, "none")


# --- Kernels with a fault ----------------------------------------------------------------------


@dataclass
class Planted:
    """The kernels of another backend, with one mistake in what they write."""

    right: Backend
    fault: str
    calls: int = 0

    def policy_loss(self, rows: Any, terms: Any, **outputs: Any) -> None:
        self.calls += 1
        stale = None if outputs["dlogits"] is None else outputs["dlogits"].clone()
        if self.fault == "skipped mask":
            rows = rows._replace(weights=torch.ones_like(rows.weights))
        self.right.policy_loss(rows, terms, **outputs)
        self.damage(rows, outputs, stale)

    def token_logps(self, rows: Any, **outputs: Any) -> None:
        self.right.token_logps(rows, **outputs)

    def token_logps_backward(self, rows: Any, **tensors: Any) -> None:
        self.right.token_logps_backward(rows, **tensors)

    def multiply_rows(self, x: Tensor, factors: Tensor) -> None:
        if self.fault != "factors forgotten":
            self.right.multiply_rows(x, factors)

    def damage(self, rows: Any, outputs: Any, stale: Tensor | None) -> None:
        dlogits = outputs["dlogits"]
        if dlogits is None:
            return
        n_cols = dlogits.shape[-1]
        active = (rows.weights != 0).nonzero().flatten()
        index = [x[active] for x in torch.unravel_index(torch.arange(rows.weights.numel()),
                                                        dlogits.shape[:-1])]  # fmt: skip
        ids = rows.token_ids[active]
        if self.fault == "zeros off target" and n_cols > 1:
            kept = dlogits[(*index, ids)].clone()
            dlogits[tuple(index)] = 0
            dlogits[(*index, ids)] = kept
        elif self.fault == "dropped tail" and n_cols > 3:
            dlogits[..., -3:] = 0
        elif self.fault == "stale sums" and len(active) > 1:
            outputs["logps"][active[-1]] = outputs["logps"][active[0]]
        elif self.fault == "one wrong element" and n_cols > 100:
            dlogits[tuple(x[-1] for x in index)][n_cols // 2] *= 1.5
        elif self.fault == "writes past the end" and dlogits.is_contiguous():
            after = dlogits.as_strided((1,), (1,), dlogits.storage_offset() + dlogits.numel())
            after.fill_(0)
        elif self.fault == "other bits each time":
            dlogits[tuple(x[0] for x in index)][0] += self.calls * 1e-3


FAULTS = (
    "zeros off target",
    "dropped tail",
    "skipped mask",
    "stale sums",
    "one wrong element",
    "writes past the end",
    "factors forgotten",
)


@dataclass
class Slow:
    """The kernels of another backend, and a pause."""

    right: Backend
    seconds: float

    def policy_loss(self, *arguments: Any, **outputs: Any) -> None:
        time.sleep(self.seconds)
        self.right.policy_loss(*arguments, **outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)


def emulated() -> Backend:
    from emulation import H100, EmulatedBackend, load_module

    module = load_module(Path(os.environ[EMULATED]))
    module.set_device(4, *H100[1:], True)
    return EmulatedBackend(module)


def a_gpu(device: torch.device, names: list[str]) -> list[Target]:
    """Right emulated kernels, wrong ones that are as fast, and right ones that take their time."""
    records.identity_of = identity_of
    kernels: dict[str, Backend] = {
        "cuda": emulated(),
        "cuda-transient": Planted(KERNELS["cpu"], "dropped tail"),
        "cuda-portable": Planted(KERNELS["cpu"], "one wrong element"),
        "triton": Slow(KERNELS["cpu"], 0.05),
        "triton-unrolled": Slow(KERNELS["cpu"], 0.1),
    }
    return [Target(name, kernels[name], torch.device("cpu"), 4, largest=1000) for name in names]


# --- Kernels, and devices, that misbehave otherwise ----------------------------------------------


@dataclass
class Misbehaving:
    """`how`: what happens instead of the first call."""

    how: str

    def __getattr__(self, name: str) -> Any:
        return self.misbehave

    def misbehave(self, *_: Any, **__: Any) -> None:
        if self.how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "exit":
            print("about to leave", flush=True)
            os._exit(3)
        elif self.how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        elif self.how == "poisoned":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        elif self.how == "does not compile":
            raise RuntimeError("PassManager::run failed")
        elif self.how == "slow":
            time.sleep(3600)


class Hanging(Target):
    """Launches at once, and never answers."""

    def synchronize(self) -> None:
        time.sleep(3600)


def misbehaving(device: torch.device, names: list[str]) -> list[Target]:
    """`names` say how; "right" and "hang" are targets too."""
    records.identity_of = identity_of
    print('{"event": "verdict", "kernels": "right", "verdict": "rubbish"}', flush=True)
    print("\x00\xff rubbish", file=sys.stderr, flush=True)
    cpu = torch.device("cpu")
    made = []
    for name in names:
        if name == "hang":
            made.append(Hanging(name, KERNELS["cpu"], cpu, 1, largest=1000))
        elif name == "right":
            made.append(Target(name, KERNELS["cpu"], cpu, 1, largest=1000))
        else:
            made.append(Target(name, Misbehaving(name), cpu, 1, largest=1000))
    return made


def cannot_open(device: torch.device, names: list[str]) -> list[Target]:
    raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")


def small_cpu(device: torch.device, names: list[str]) -> list[Target]:
    """The CPU's own kernels, on short rows only; wrong ones where the environment says so."""
    kernels: Backend = KERNELS["cpu"]
    if fault := os.environ.get("CFPO_TESTS_FAULT"):
        kernels = Planted(kernels, fault)
    return [Target(name, kernels, device, 1, largest=1000) for name in names]
