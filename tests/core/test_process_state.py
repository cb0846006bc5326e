"""What a process brings along: floating-point modes of its threads, and having been forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from limits import HANGS_AFTER
from oracle import make_case

import cfpo_kernels


def results(dtype: torch.dtype, v: int) -> list[torch.Tensor]:
    """What a call gives, as bits: gradients with subnormals in them, and multiplied ones."""
    case = make_case(64, v, dtype, spread=24.0)
    logits = case.logits.clone().requires_grad_()
    loss = cfpo_kernels.cfpo_loss(logits, case.token_ids, case.advantages, entropy_coef=0.01)
    (loss * 1e-3).backward()
    scored = case.logits.clone().requires_grad_()
    cfpo_kernels.token_logps(scored, case.token_ids).sum().backward()
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    return [loss.detach(), logits.grad.view(integer), scored.grad.view(integer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_flush_to_zero_changes_no_bit(dtype: torch.dtype, level: str, two_threads: None) -> None:
    want = results(dtype, 20001)  # the threads start with the default mode
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot set the mode here")
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for got, right in zip(results(dtype, 20001), want, strict=True):
                assert torch.equal(got, right)
        # A call leaves the caller's mode as it was.
        assert (torch.tensor([1e-40]) * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)


LATE = """
    import os, torch

    torch.set_num_threads(2)
    torch.exp(torch.randn(1 << 22)).sum()  # the parent's threads start
    logits, ids = torch.zeros(8, 50000), torch.zeros(8, dtype=torch.long)
    child = os.fork()
    if child == 0:
        from cfpo_kernels import token_logps

        os._exit(0 if token_logps(logits, ids).isfinite().all() else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whether a process was forked")
def test_fork_before_the_import_does_not_hang() -> None:
    command = [sys.executable, "-c", textwrap.dedent(LATE)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.communicate(timeout=HANGS_AFTER)[0] == "0\n"
    finally:
        if process.poll() is None:  # the child that hangs too
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
