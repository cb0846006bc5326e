"""What Triton raises becomes one line. The errors are the compiler's own where no GPU is needed."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton_tools.offline import fake, offline

from cfpo_kernels.backends.triton_failure import why_failed

compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "0", reason="TRITON_INTERPRET is set"
)


@triton.jit
def not_a_power_of_two(BLOCK: tl.constexpr):
    return tl.arange(0, BLOCK + 1)


@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr, BUG: tl.constexpr = "none"):
    lanes = tl.arange(0, BLOCK)
    if BUG == "callee":
        lanes = not_a_power_of_two(BLOCK)
    tl.static_assert(BUG != "assertion", "said by the kernel")
    tl.store(x_ptr + lanes, tl.load(x_ptr + lanes) + 1)


def reason(error: BaseException) -> str:
    line = why_failed(error)
    assert line.strip() and "\n" not in line and len(line) <= 300
    return line


def reason_on(arch: str, **options: object) -> str:
    with offline(arch), pytest.raises(Exception) as caught:
        kernel[(1,)](fake((128,), torch.float32), BLOCK=128, **options)
    return reason(caught.value)


@compiled
def test_what_the_compiler_raises() -> None:
    assert reason_on("sm_90", BUG="callee").startswith("does not compile: arange's range must be")
    assert reason_on("sm_90", BUG="assertion") == "does not compile: said by the kernel"
    assert reason_on("sm_80", num_ctas=2).startswith("ValueError: num_ctas > 1 requires")


@compiled
def test_what_ptxas_raises() -> None:
    line = reason_on("sm_30")
    assert line.startswith("ptxas fatal") and "'sm_30' is not defined" in line


PLANTED = {
    "does not fit the device: 300000 of shared memory needed, 101376 there": OutOfResources(
        300000, 101376, "shared memory"
    ),
    "PTXAS error: `ptxas` raised SIGSEGV `ptxas` stderr:": PTXASError(
        "`ptxas` raised SIGSEGV\n`ptxas` stderr:\n\nRepro command: ptxas -v /tmp/x.ptx"
    ),
    "does not compile: no such thing": CompilationError("def f(): pass", None, "no such thing"),
    "does not compile for this device: one of Triton's passes fails": RuntimeError(
        "PassManager::run failed"
    ),
    "RuntimeError: Triton Error [CUDA]: device kernel image is invalid": RuntimeError(
        "Triton Error [CUDA]: device kernel image is invalid\nand more"
    ),
    "gcc failed with status 1": subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]),
    "KeyError": KeyError(),
}


@pytest.mark.parametrize("line", PLANTED)
def test_what_only_a_device_raises(line: str) -> None:
    assert reason(PLANTED[line]) == line


def test_long_messages_are_cut() -> None:
    assert reason(RuntimeError("x" * 1000)).endswith("xxx...")
