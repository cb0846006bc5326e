"""What can run the kernels: each test of tests/every_target runs on each of these.

A test that takes the fixture `target` runs once for each that this machine has; calls of
backend="auto" and "cpu" with CPU tensors go there. `--target NAME` chooses some. Under
TRITON_INTERPRET=1 there is but one, for Triton interprets or compiles, never both in a process.

A test is left out for a target by a mark with the reason; the names may be patterns:

    @pytest.mark.not_on("triton-*", reason="it has no levels")
    @pytest.mark.only_on("cuda-source", "cuda-ptx", reason="of the emulated device")
    @pytest.mark.nightly_on("*-ptx*", reason="20 s, and the source runs it on every commit")
"""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from emulation import CXX, H100, HOPPER, ONE_SM, EmulatedBackend
from on_device import OnDevice
from ptx_tools import nvcc

from cfpo_kernels import backends
from cfpo_kernels.backends import cpu, cuda, triton
from cfpo_kernels.backends.base import Backend

LEVELS: tuple[str, ...] = tuple(cpu.native.cpu_levels()) if cpu.native is not None else ()


def always(parameters: dict[str, Any]) -> bool:
    return True


@dataclass(kw_only=True)
class Target:
    """One of them, as tests see it."""

    name: str
    starts: Callable[[Target, pytest.FixtureRequest], AbstractContextManager[Any]]
    why_not: str = ""  # this run cannot have it
    # What it runs at all, and on every commit; the rest of that is the night's.
    longest: int = 2**31  # columns
    every_commit: Callable[[dict[str, Any]], bool] = always
    examples: int = 150  # of a test that draws its cases
    unsplit: int = 26  # rows that are too many to be shared by several blocks or programs

    # While it runs:
    backend: Backend | None = None  # None for the reference
    module: Any = None  # of an emulated GPU, which can be changed
    runner: Any = None  # of Triton's PTX

    @contextmanager
    def running(self, request: pytest.FixtureRequest) -> Iterator[Target]:
        with self.starts(self, request):
            yield self

    def set_device(self, sm_count: int, shared_per_block: int, shared_per_sm: int) -> None:
        """Of an emulated GPU; a real one is what it is."""
        if self.module is not None:
            self.module.set_device(sm_count, shared_per_block, shared_per_sm)

    def set_order(self, name: str) -> None:
        if self.module is not None:
            self.module.set_order(name)


# --- How each is started -----------------------------------------------------------------------


@contextmanager
def kernels_of_the_cpu(replaced_by: Backend) -> Iterator[None]:
    """Calls of backend="cpu" go there."""
    others = backends.kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "kernels", lambda x: replaced_by if x == "cpu" else others(x))
        yield


def cpu_level(level: str | None) -> Any:
    @contextmanager
    def start(target: Target, request: pytest.FixtureRequest) -> Iterator[None]:
        target.backend = cpu.CPU
        with pytest.MonkeyPatch.context() as patch:
            if level is not None:
                patch.setenv("CFPO_KERNELS_CPU_LEVEL", level)
            yield

    return start


@contextmanager
def plain_torch(target: Target, request: pytest.FixtureRequest) -> Iterator[None]:
    resolve = backends.resolve

    def to_reference(name: str, *of: Any, **how: Any) -> str:
        return backends.REFERENCE if name in ("auto", "cpu") else resolve(name, *of, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "resolve", to_reference)
        patch.setattr(oracle, "RELATIVE", oracle.REFERENCE_RELATIVE)
        yield


def emulated_cuda(code: str, row_kernel: str | None, *device: int) -> Any:
    @contextmanager
    def start(target: Target, request: pytest.FixtureRequest) -> Iterator[None]:
        target.module = request.getfixturevalue("emulated_cuda")
        if getattr(target.module, "code", None) != code:  # it forgets the PTX that it has parsed
            if code == "ptx":
                target.module.use_ptx(request.getfixturevalue("ptx").text_of)
            else:
                target.module.use_source()
            target.module.code = code
        target.backend = EmulatedBackend(target.module, row_kernel)
        target.module.set_device(*device)
        target.module.set_largest_cluster(8)
        target.set_order("forward")
        with kernels_of_the_cpu(target.backend):
            yield

    return start


def on_a_gpu(kernels: Backend) -> Any:
    @contextmanager
    def start(target: Target, request: pytest.FixtureRequest) -> Iterator[None]:
        target.backend = OnDevice(kernels)
        with kernels_of_the_cpu(target.backend):
            yield

    return start


@contextmanager
def interpreted_triton(target: Target, request: pytest.FixtureRequest) -> Iterator[None]:
    from triton_tools.checker import checked_launches
    from triton_tools.interpreter import mend

    mend()
    target.backend = triton.TRITON
    # Every launch of every test: nothing outside the arguments, no races, nothing written twice.
    with kernels_of_the_cpu(target.backend), checked_launches() as log:
        yield
    for launch in log.launches:
        for name in {view.name for view in launch.views} & {"loss_ptr", "logps_ptr", "dlogits_ptr"}:
            assert launch.writes(name).max() <= 1, (launch.kernel, name)


def ptx_of_triton(arch: str) -> Any:
    @contextmanager
    def start(target: Target, request: pytest.FixtureRequest) -> Iterator[None]:
        from ptx_tools.interpreter import ASYNC, ORDERS, How
        from ptx_tools.triton_launch import on_ptx

        target.backend = triton.TRITON
        library: Path = request.getfixturevalue("interpreter")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton, "_on", lambda _: contextlib.nullcontext())
            with kernels_of_the_cpu(target.backend), on_ptx(arch, library) as target.runner:
                # Any order has to do: each test has another, always the same.
                seed = zlib.crc32(request.node.nodeid.encode()) % 12
                target.runner.how = How(ASYNC[seed % 3], ORDERS[seed % 4], seed + 1)
                target.runner.exact_if_exact = seed % 2 == 0
                yield

    return start


# --- What each runs on every commit ------------------------------------------------------------


def dtypes_of(parameters: dict[str, Any]) -> list[torch.dtype]:
    values = [*parameters.values()]
    values += [x for nested in values if isinstance(nested, dict) for x in nested.values()]
    return [x for x in values if isinstance(x, torch.dtype)]


def of_bfloat16(parameters: dict[str, Any]) -> bool:
    """The kernels of one type are enough: the source runs all."""
    found = dtypes_of(parameters)
    return bool(found) and all(dtype == torch.bfloat16 for dtype in found)


def not_of_the_longest(parameters: dict[str, Any]) -> bool:
    """In float64 they take the oracle longer than everything else, and "cpu" runs them."""
    return (parameters.get("v") or 0) <= 60_000


def of_the_longest_bfloat16(parameters: dict[str, Any]) -> bool:
    others = [dtype for dtype in dtypes_of(parameters) if dtype != torch.bfloat16]
    return not_of_the_longest(parameters) or not others


def of_short_bfloat16(parameters: dict[str, Any]) -> bool:
    return of_bfloat16(parameters) and not_of_the_longest(parameters)


def not_of_float16(parameters: dict[str, Any]) -> bool:
    """Which is converted where bfloat16 is; test_triton_interpreted.py looks at each."""
    return torch.float16 not in dtypes_of(parameters)


def of_bfloat16_and_few_lengths(parameters: dict[str, Any]) -> bool:
    """Triton compiles anew for each layout, which takes longer than to run it."""
    return of_bfloat16(parameters) and parameters.get("v") in (1, 1000, 1001, 4099, 33000)


def never(parameters: dict[str, Any]) -> bool:
    return False


# --- All of them -------------------------------------------------------------------------------

NO_COMPILER = "" if shutil.which(CXX) else "needs a C++ compiler"
NO_GPU = "" if torch.cuda.is_available() else "no CUDA device"
NO_CUDA_KERNELS = NO_GPU or cuda.why_not(torch.device("cuda"))
INTERPRETED = "TRITON_INTERPRET is set" if triton.interpreted() else ""


def no_nvcc() -> str:
    return nvcc.MISSING if nvcc.NVCC is None else ""


TARGETS = {
    target.name: target
    for target in (
        # The best level of this machine, or that of $CFPO_KERNELS_CPU_LEVEL; then the others.
        Target(name="cpu", starts=cpu_level(None), why_not=INTERPRETED),
        *(
            Target(
                name=name,
                starts=start,
                why_not=INTERPRETED,
                every_commit=every_commit,
                examples=50,
            )
            for name, start, every_commit in (
                # "avx512" differs from "avx512_bf16" in bfloat16 alone.
                *(
                    (f"cpu-{level}", cpu_level(level), of_short_bfloat16)
                    if level == "avx512"
                    else (f"cpu-{level}", cpu_level(level), not_of_the_longest)
                    for level in LEVELS[1:]
                ),
                ("reference", plain_torch, not_of_the_longest),
            )
        ),
        *(
            Target(
                name=f"cuda-{code}{of}",
                starts=emulated_cuda(code, row_kernel, *device),
                longest=longest,
                why_not=INTERPRETED or NO_COMPILER or (no_nvcc() if code == "ptx" else ""),
                every_commit=every_commit if code == "source" else of_ptx,
                examples=50,
            )
            for code in ("source", "ptx")
            for of, row_kernel, device, longest, every_commit, of_ptx in (
                ("", None, ONE_SM, 2**31, of_the_longest_bfloat16, of_bfloat16),
                ("-split", None, H100, 2**31, of_the_longest_bfloat16, of_bfloat16),
                # 512 KiB are its longest rows.
                ("-cluster", "cluster", HOPPER, 130_000, of_bfloat16, of_bfloat16),
                # What it sums and writes with is the others'.
                (
                    "-transient",
                    "transient",
                    HOPPER,
                    400_000,
                    of_short_bfloat16,
                    never,  # test_cuda_transient.py runs some
                ),
            )
        ),
        Target(
            name="cuda-gpu",
            starts=on_a_gpu(cuda.CUDA),
            why_not=INTERPRETED or NO_CUDA_KERNELS,
            unsplit=600,
        ),
        Target(
            name="triton-interpreted",
            starts=interpreted_triton,
            why_not="" if INTERPRETED else "needs TRITON_INTERPRET=1",
            longest=130_000,
            every_commit=not_of_float16,
            examples=15,  # a second for what the kernels do in a millisecond
        ),
        *(
            Target(
                name=name,
                starts=ptx_of_triton(arch),
                why_not=INTERPRETED or NO_COMPILER,
                longest=60_000,
                every_commit=every_commit,
                examples=10,
            )
            for name, arch, every_commit in (
                ("triton-ptx", "sm_90", of_bfloat16_and_few_lengths),
                ("triton-ptx-sm80", "sm_80", never),
            )
        ),
        Target(
            name="triton-gpu",
            starts=on_a_gpu(triton.TRITON),
            why_not=INTERPRETED or NO_GPU,
            unsplit=600,
        ),
    )
}
GPUS = ("cuda-gpu", "triton-gpu")
# What marks may name: a level that is here the best is called "cpu".
NAMES = (*TARGETS, *(f"cpu-{level}" for level in (*LEVELS, "baseline")))
