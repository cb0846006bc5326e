"""The child process of a verification: what may go wrong in it, and what is made of that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import SUPPORT
from simulated import NAME

import cfpo_kernels
from cfpo_kernels import backends
from cfpo_kernels.__main__ import main
from cfpo_kernels.verification import child, choice, process, records, run
from cfpo_kernels.verification.process import Found, Request


def request(kernels: list[str], function: str = "misbehaving", **options: Any) -> Request:
    settings = {"seconds": 900.0, "timings": False, **options}
    return Request("cpu", kernels, ["float32"], False, provider=f"simulated:{function}", **settings)


def verdicts(found: Found) -> dict[str, tuple[str, str]]:
    return {v.kernels: (v.verdict, v.reason) for v in found.verdicts}


def test_what_crashes_is_named_and_the_rest_is_still_checked() -> None:
    events: list[dict[str, Any]] = []
    found = process.check(
        request(["segfault", "exit", "poisoned", "memory", "does not compile", "right"]),
        events.append,
    )
    known = verdicts(found)
    crash = known["segfault"]
    assert crash[0] == "crashed" and "SIGSEGV in: train, V = 64" in crash[1]
    assert known["exit"][0] == "crashed" and "status 3" in known["exit"][1]
    assert "about to leave" in known["exit"][1], "its last words"
    assert known["poisoned"][0] == "crashed" and "illegal memory access" in known["poisoned"][1]
    assert known["memory"] == ("not run", "not enough memory")
    assert known["does not compile"][0] == "not run"
    assert "cannot run here: does not compile for this device" in known["does not compile"][1]
    assert known["right"] == ("right", "")
    assert found.identity is not None and found.identity.device == NAME
    # What the child printed, a forged verdict among it, is nobody's.
    assert sum(event["event"] == "begin" for event in events) == 6
    record = records.VerifyRecord(found.identity, verdicts=found.verdicts)
    assert record.exit_status() == 1
    kept = {verdict.kernels for verdict in record.kept().verdicts}
    assert kept == {"segfault", "exit", "poisoned", "right"}


def test_what_hangs_is_ended_and_the_rest_is_still_checked() -> None:
    begin = time.monotonic()
    found = process.check(request(["hang", "right"], hangs_after=1.0))
    assert time.monotonic() - begin < 300
    known = verdicts(found)
    assert known["hang"][0] == "crashed" and "no answer from the device" in known["hang"][1]
    assert known["right"] == ("right", "")


def test_a_killed_process_condemns_nothing() -> None:
    known = verdicts(process.check(request(["killed", "right"])))
    assert known["killed"][0] == known["right"][0] == "not run"
    assert "most likely because memory ran out" in known["killed"][1]


@pytest.mark.nightly
def test_the_time_limit_condemns_nothing() -> None:
    known = verdicts(process.check(request(["slow", "right"], seconds=20.0)))
    assert known["slow"][0] == known["right"][0] == "not run"
    assert "not done in 20 s: train, V = 64" in known["slow"][1]
    assert "no time was left" in known["right"][1]


def test_a_device_that_cannot_be_opened() -> None:
    known = verdicts(process.check(request(["cuda", "triton"], "cannot_open")))
    busy = ("not run", "the device is busy: another process holds it")
    assert known == {"cuda": busy, "triton": busy}


def test_a_provider_that_cannot_be_imported() -> None:
    known = verdicts(process.check(request(["cuda"], "nobody")))
    assert known["cuda"][0] == "not run" and "nobody" in known["cuda"][1]


@pytest.mark.parametrize(
    ("error", "verdict", "reason"),
    [
        (torch.OutOfMemoryError("x"), "not run", "not enough memory"),
        (RuntimeError("CUDA error: out of memory"), "not run", "not enough memory"),
        (RuntimeError("CUDA error: misaligned address"), "crashed", "misaligned address"),
        (RuntimeError("launching row_kernel on device 0 failed: cudaErrorInsufficientDriver: "
                      "CUDA driver version is insufficient"), "not run", "driver is too old"),
        (RuntimeError("launching x on device 0 failed: cudaErrorNoKernelImageForDevice: no kernel "
                      "image"), "not run", "cudaErrorNoKernelImageForDevice"),
        (OSError(28, "No space left on device"), "not run", "No space left"),
    ],
)  # fmt: skip
def test_what_an_error_says(error: BaseException, verdict: str, reason: str) -> None:
    got = child.why_failed(error)
    assert got[0] == verdict and reason in got[1]


# Where Python is not a program ------------------------------------------------------------------


def test_an_embedded_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    own = process.python_program()
    assert own == sys.executable
    for other in ("/usr/bin/blender", "", None, "/usr/sbin/uwsgi"):
        monkeypatch.setattr(sys, "executable", other)
        found = process.python_program()
        assert found is not None
        said = subprocess.run([found, "-c", "import sys; print(sys.version_info[:2])"],
                              capture_output=True, text=True)  # fmt: skip
        assert said.stdout.strip() == str(tuple(sys.version_info[:2]))
    monkeypatch.setattr(process.shutil, "which", lambda *_, **__: None)
    known = verdicts(process.check(request(["cuda"])))
    assert known["cuda"] == ("not run", "no Python program was found beside this interpreter")


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "python_program", lambda: "/nowhere/python")
    known = verdicts(process.check(request(["cuda", "triton"])))
    assert all(known[name][0] == "not run" for name in ("cuda", "triton"))
    assert "no process could be started" in known["cuda"][1]


# The command line, on the CPU's own kernels -----------------------------------------------------


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`python -m cfpo_kernels ...` with the battery on short rows: status, output, errors."""
    monkeypatch.setenv("CFPO_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("CFPO_KERNELS_VERIFY_TIMEOUT", "900")
    monkeypatch.setattr(sys, "path", [str(SUPPORT), *sys.path])
    monkeypatch.setattr(run, "PROVIDER", "simulated:small_cpu")
    choice.forget()

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main([*arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    yield call
    choice.forget()


def test_the_command_line(command: Any, tmp_path: Path) -> None:
    status, out, err = command("verify", "--backend", "cpu", "--json", str(tmp_path / "r.json"))
    assert status == 0, out + err
    assert "cpu, bfloat16: right" in err, "lines where nobody watches a terminal"
    assert "float16   right" in out and "record written to" in err
    (stored,) = tmp_path.glob("*-*.json")
    record = records.read(stored)
    assert record is not None and record == records.read(tmp_path / "r.json")
    assert {v.verdict for v in record.verdicts} == {"right"} and len(record.verdicts) == 3
    assert record.identity == records.identity_of(torch.device("cpu"))
    text = stored.read_text()
    for private in (os.uname().nodename, str(tmp_path), str(Path.home()) + "/"):
        assert private not in text, "users send it"
    status, out, _ = command("info")
    assert status == 0
    for words in ("torch", "cpu: available", "verified 20", "float16   right"):
        assert words in out, words
    if not torch.cuda.is_available():
        assert "No GPU: torch sees none" in out
    status, out, _ = command("info", "--json")
    facts = json.loads(out)
    assert facts["devices"][0]["record"] == json.loads(text)


def test_the_command_line_with_a_planted_fault(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFPO_TESTS_FAULT", "stale sums")
    status, out, _ = command("verify", "--backend", "cpu")
    assert status == 1
    assert "wrong: train, V = 64, CFPO: logp in row" in out
    # "auto" obeys: the CPU's kernels are not used although they are there.
    x = torch.randn(3, 50, requires_grad=True)
    with pytest.warns(UserWarning, match=r"plain torch.*cpu is wrong \(train, V = 64"):
        cfpo_kernels.cfpo_loss(x, torch.tensor([1, 2, 3]), torch.ones(3)).backward()
    assert backends.resolve("auto", x.device, x.dtype, 50) == "reference"
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_the_command_line_refuses(command: Any) -> None:
    if not torch.cuda.is_available():
        status, _, err = command("verify", "--device", "cuda:0")
        assert status == 2 and "torch sees no such device" in err
    status, _, err = command("verify", "--backend", "cuda", "--device", "cpu")
    assert status == 2 and "backend='cuda' has no kernels for cpu" in err


def test_it_is_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "cfpo_kernels", "verify", "--help"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "Exit status 0: all right" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"device": 3}, TypeError, "device must be a torch.device or str, got int"),
        ({"device": "gpu"}, ValueError, "device must be a torch device, got 'gpu'"),
        ({"device": "meta"}, ValueError, "got meta"),
        ({"backend": "numpy"}, ValueError, "backend must be one of cuda, triton, cpu, got 'numpy'"),
        ({"full": 1}, TypeError, "full must be True or False, got int"),
        ({"timeout": -1}, ValueError, "timeout must be a positive number of seconds, got -1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cfpo_kernels.verify(**arguments)


def test_the_time_limit_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (run.time_limit(False), run.time_limit(True)) == (90.0, 600.0)
    monkeypatch.setenv("CFPO_KERNELS_VERIFY_TIMEOUT", "12.5")
    assert run.time_limit(False) == 12.5 and run.time_limit(True, 3) == 3.0
    monkeypatch.setenv("CFPO_KERNELS_VERIFY_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="CFPO_KERNELS_VERIFY_TIMEOUT must be a positive number"):
        run.time_limit(False)


@pytest.mark.nightly
def test_the_cpu_verifies_itself_in_a_minute(tmp_path: Path, monkeypatch: Any) -> None:
    """The whole short battery, as a user runs it."""
    monkeypatch.setenv("CFPO_KERNELS_CACHE", str(tmp_path))
    record = cfpo_kernels.verify(backend="cpu", device="cpu", timeout=900)
    assert record.exit_status() == 0 and len(record.timings) == 12
