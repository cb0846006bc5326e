"""``cfpo_kernels.verify``: checks the kernels on a device of this machine, and keeps the record."""

from __future__ import annotations

import datetime
import json as json_format
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..backends import triton
from ..backends.status import BackendUnavailableError
from . import process, records, targets
from .records import NOT_RUN, Verdict, VerifyRecord

QUICK_SECONDS, FULL_SECONDS = 90.0, 600.0
BACKENDS = ("cuda", "triton", "cpu")
# Who makes the targets in the child process; tests have devices of their own.
PROVIDER = "cfpo_kernels.verification.targets:device_targets"

OnEvent = Callable[[dict[str, Any]], None]


def verify(
    *,
    device: torch.device | str | None = None,
    backend: str | None = None,
    full: bool = False,
    json: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
) -> VerifyRecord:
    """Checks the kernels on a device against float64, times those that are right, keeps the record.

    Everything happens in a child process, which a time limit ends: a crash, a hang or a poisoned
    context stays there. ``backend="auto"`` takes what the record says is right and fastest.

    Args:
        device: what the kernels run on. None: the current GPU, or the CPU where there is none.
        backend: "cuda", "triton" or "cpu"; None: all that the device can run.
        full: the long battery, for a report: minutes instead of seconds.
        json: also write the record to this file.
        timeout: seconds after which it ends with what it has. None: the variable
            CFPO_KERNELS_VERIFY_TIMEOUT, or 90, or 600 with ``full``.

    Returns:
        The record. ``record.exit_status()`` is 0 where all is right or nothing was to be checked, 1
        where something is wrong or crashed, 2 where something could not run.

    Raises:
        ValueError, TypeError: an argument has a wrong value or type.
        BackendUnavailableError: the backend takes no tensors on that device.

    Memory: some 100 MB on the device, and up to 1 GB of what is free while it measures.

    Example:
        >>> record = verify(device="cpu", timeout=500)
        >>> record.exit_status(), record.verdict("cpu", "bfloat16")
        (0, 'right')
    """
    return check(resolve_device(device), backend=backend, full=full, json=json, timeout=timeout)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device with its index."""
    if device is None:
        kind = next((gpu for gpu in triton.DEVICES if triton.has_device(gpu)), "cpu")
        chosen = torch.device(kind)
    elif isinstance(device, (str, torch.device)):
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device must be a torch device, got {device!r}") from error
    else:
        raise TypeError(f"device must be a torch.device or str, got {type(device).__name__}")
    if not targets.names_for(chosen):
        raise ValueError(
            f"device must be a CPU or a GPU that kernels exist for ({', '.join(triton.DEVICES)}), "
            f"got {chosen}"
        )
    if chosen.type == "cpu":
        return torch.device("cpu")
    if not triton.has_device(chosen.type):
        raise ValueError(f"device is {chosen}, but torch sees no such device")
    module = torch.get_device_module(chosen)
    index = module.current_device() if chosen.index is None else chosen.index
    if not 0 <= index < module.device_count():
        raise ValueError(
            f"device is {chosen}, but torch sees {module.device_count()} of type {chosen.type}"
        )
    return torch.device(chosen.type, index)


def time_limit(full: bool, timeout: float | None = None) -> float:
    """Seconds that a verification may take."""
    value: object = timeout
    name = "timeout"
    if timeout is None:
        name = "CFPO_KERNELS_VERIFY_TIMEOUT"
        value = os.environ.get(name) or (FULL_SECONDS if full else QUICK_SECONDS)
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")
    return seconds


def check(
    device: torch.device,
    *,
    backend: str | None = None,
    full: bool = False,
    json: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    on_event: OnEvent = lambda event: None,
    notice: Callable[[str], None] = lambda line: None,
) -> VerifyRecord:
    """See :func:`verify`; `on_event` is told what goes on, `notice` what a person should know."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not isinstance(full, bool):
        raise TypeError(f"full must be True or False, got {type(full).__name__}")
    seconds = time_limit(full, timeout)
    known = targets.names_for(device, full)
    names = [name for name in known if backend in (None, targets.backend_of(name))]
    if not names:
        raise BackendUnavailableError(f"backend={backend!r} has no kernels for {device}")
    begin = time.monotonic()
    record = VerifyRecord(records.identity_of(device), full)
    for name in [*names]:
        if why := targets.why_not(name, device):
            names.remove(name)
            if backend is not None:
                record.verdicts.append(Verdict(name, "all", NOT_RUN, why))
    if names:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in targets.DTYPES]
        request = process.Request(str(device), names, dtypes, full, seconds, PROVIDER)
        found = process.check(request, on_event)
        if found.identity not in (None, record.identity):
            notice(
                "the child process found another device or build; what it says is not used: "
                f"{found.identity}"
            )
            found = process.Found()
            process.not_run(request, found, "the child process found another device or build")
        record.verdicts += found.verdicts
        record.timings += found.timings
    now = datetime.datetime.now(datetime.timezone.utc)
    record.date = now.isoformat(timespec="seconds")
    record.seconds = round(time.monotonic() - begin, 1)
    if record.kept().verdicts:
        try:
            notice(f"record written to {records.store(record)}")
        except OSError as error:
            notice(f"the record could not be written, and is known to this process only: {error}")
    if json is not None:
        Path(json).write_text(json_format.dumps(record.as_json(), indent=1) + "\n")
    return record
