"""The child process of a verification: started, watched, ended, and its end understood."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .records import CRASHED, NOT_RUN, RIGHT, Identity, Timing, Verdict

# A device that works on some rows for so long will not come back.
HANGS_AFTER = 40.0
POLL = 0.05

Pair = tuple[str, str]  # kernels, dtype
OnEvent = Callable[[dict[str, Any]], None]


@dataclass
class Request:
    """What is to be checked; see child.py."""

    device: str
    kernels: list[str]
    dtypes: list[str]
    full: bool
    seconds: float
    provider: str
    timings: bool = True
    hangs_after: float = HANGS_AFTER

    def pairs(self) -> list[Pair]:
        return [(kernels, dtype) for dtype in self.dtypes for kernels in self.kernels]


@dataclass
class Found:
    """What came of it. Every pair of the request has a verdict."""

    identity: Identity | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    def pairs(self, *verdicts: str) -> list[Pair]:
        chosen = [v for v in self.verdicts if not verdicts or v.verdict in verdicts]
        return [(verdict.kernels, verdict.dtype) for verdict in chosen]


def python_program() -> str | None:
    """A Python that can be started. Where Python is embedded, sys.executable is another program."""

    def is_python(path: str | None) -> bool:
        name = os.path.basename(path or "")
        return bool(re.fullmatch(r"(python|pypy)[\d.]*t?d?(\.exe)?", name, re.IGNORECASE))

    if is_python(sys.executable) and os.access(sys.executable, os.X_OK):
        return sys.executable
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        for name in (version, "python3", "python"):
            found = shutil.which(name, path=os.path.join(prefix, "bin"))
            if found:
                return found
    return shutil.which(version)


def environment() -> dict[str, str]:
    """The child finds the packages that this process finds, and asks for no verification."""
    paths = [path or os.getcwd() for path in sys.path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "CFPO_KERNELS_VERIFY": "never",
        "PYTHONSAFEPATH": "1",
    }


def check(request: Request, on_event: OnEvent = lambda event: None) -> Found:
    """Checks all pairs, in one process as long as none dies, in a new one for what is left."""
    found = Found()
    deadline = time.monotonic() + request.seconds
    program = python_program()
    if program is None:
        not_run(request, found, "no Python program was found beside this interpreter")
        return found
    while _left(request, found):
        if time.monotonic() >= deadline:
            not_run(request, found, f"no time was left of {request.seconds:.0f} s")
            break
        before = len(found.verdicts)
        with tempfile.TemporaryDirectory(prefix="cfpo-kernels-") as folder:
            reason = _one_child(program, request, found, deadline, Path(folder), on_event)
        if reason or len(found.verdicts) == before:
            not_run(request, found, reason or "the process ended before it began")
    return found


def _left(request: Request, found: Found) -> list[Pair]:
    known = set(found.pairs())
    return [pair for pair in request.pairs() if pair not in known]


def not_run(request: Request, found: Found, reason: str) -> None:
    found.verdicts += [Verdict(*pair, NOT_RUN, reason) for pair in _left(request, found)]


@dataclass
class _Watch:
    """What the child was doing when it was last heard of."""

    pair: Pair | None = None
    case: str = ""
    waits: bool = False
    since: float = field(default_factory=time.monotonic)
    cannot: str = ""
    ended: bool = False

    def see(self, event: dict[str, Any], found: Found) -> None:
        self.since = time.monotonic()
        kind = event.pop("event", "")
        if kind == "identity":
            found.identity = Identity(**event)
        elif kind == "begin":
            self.pair, self.case, self.waits = (event["kernels"], event["dtype"]), "", False
        elif kind == "case":
            self.case, self.waits = event["case"], event["phase"] == "wait"
        elif kind == "verdict":
            found.verdicts.append(Verdict(**event))
            self.pair, self.waits = None, False
        elif kind == "timing":
            found.timings.append(Timing(**event))
        elif kind == "cannot":
            self.cannot = event["reason"]
        elif kind == "end":
            self.ended = True


def _one_child(
    program: str,
    request: Request,
    found: Found,
    deadline: float,
    folder: Path,
    on_event: OnEvent,
) -> str:
    """Runs one process. Returns why no other is worth starting, or ""."""
    left = {
        **vars(request),
        "seconds": deadline - time.monotonic(),
        "done": found.pairs(),
        "right": found.pairs(RIGHT),
    }
    asked, results, log = folder / "request.json", folder / "results", folder / "log"
    asked.write_text(json.dumps(left))
    results.touch()
    watch = _Watch()
    command = [program, "-m", "cfpo_kernels.verification.child", str(asked), str(results)]
    with log.open("wb") as output, results.open(encoding="utf-8", errors="replace") as events:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                start_new_session=True,  # so that all it started can be ended with it
            )
        except OSError as error:
            return f"no process could be started: {error}"
        try:
            status = None
            while status is None:
                status = process.poll()  # before the last look at what it wrote
                for event in _lines(events):
                    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                        watch.see(dict(event), found)
                        on_event(event)
                now = time.monotonic()
                hangs = watch.waits and now - watch.since > request.hangs_after
                if status is None and (hangs or now > deadline):
                    break
                if status is None:
                    time.sleep(POLL)
        finally:
            _end(process)
    last = _last_line(log)
    if status is None:
        return _ended_by_us(watch, request, found)
    if watch.cannot:
        return watch.cannot
    if watch.ended and status == 0:
        return ""
    if watch.pair is None:
        request.timings = False  # or the next one would die there too
    return _died(status, watch, found, last)


def _ended_by_us(watch: _Watch, request: Request, found: Found) -> str:
    if watch.pair is not None and watch.waits:
        hung = time.monotonic() - watch.since
        if hung > min(request.hangs_after, 10.0):
            reason = f"no answer from the device in {hung:.0f} s: {watch.case}"
            found.verdicts.append(Verdict(*watch.pair, CRASHED, reason))
            return ""
    if watch.pair is not None:
        reason = f"not done in {request.seconds:.0f} s: {watch.case}"
        found.verdicts.append(Verdict(*watch.pair, NOT_RUN, reason))
    return ""


def _died(status: int, watch: _Watch, found: Found, last: str) -> str:
    """A process that ended by itself before its work did."""
    if status == -signal.SIGKILL:
        reason = "the process was killed, most likely because memory ran out"
        if watch.pair is not None:
            found.verdicts.append(Verdict(*watch.pair, NOT_RUN, reason))
        return reason
    if watch.pair is None:
        # While timing: what is known stands.
        return "" if found.verdicts else f"the process ended with status {status}: {last}"
    how = f"status {status}"
    if status < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-status).name
    reason = f"the process ended with {how} in: {watch.case or 'its first case'}"
    found.verdicts.append(Verdict(*watch.pair, CRASHED, f"{reason} ({last})" if last else reason))
    return ""


def _lines(file: Any) -> Iterator[dict[str, Any]]:
    """Whole lines that are events; a torn or foreign one is nobody's."""
    while True:
        at = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(at)
            return
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_bytes()[-4000:].decode(errors="replace").splitlines()
        for line in reversed(lines):
            if line.strip():
                return "".join(c for c in line.strip() if c.isprintable())[:200]
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
