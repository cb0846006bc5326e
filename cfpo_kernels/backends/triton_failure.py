"""Why Triton could not build or launch a kernel, in one line.

Triton's own messages are long: excerpts of its source, ptxas's log, a command that repeats the
failure. Its exceptions are known by their names, so that nothing has to be imported. Where the
compiler aborts, nothing is raised: only a process of its own can tell of that.
"""

from __future__ import annotations

import os
import re
import subprocess

_LONGEST = 300


def why_failed(error: BaseException) -> str:
    """One line that says why a launch raised `error`."""
    line = " ".join(_reason(error).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfResources" in names:
        name, required, limit = (getattr(error, x, "?") for x in ("name", "required", "limit"))
        return f"does not fit the device: {required} of {name} needed, {limit} there"
    if "PTXASError" in names:
        # ptxas's own complaint, in the log that Triton quotes.
        said = re.search(r"^ptxas.*\b(?:fatal|error)\s*:.*$", text, re.M)
        return said[0] if said else text.partition("Repro command")[0]
    if "CompilationError" in names:
        return f"does not compile: {_at_fault(error)}"
    if text == "PassManager::run failed":
        return "does not compile for this device: one of Triton's passes fails"
    if isinstance(error, subprocess.CalledProcessError):
        program = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return f"{os.path.basename(program)} failed with status {error.returncode}"
    # From the driver, the search for a C compiler, options that a target refuses, ...
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _at_fault(error: BaseException) -> str:
    """The innermost message: each function that called the one at fault puts an error in front."""
    while error.__cause__ is not None:
        error = error.__cause__
    # The text of a CompilationError begins with an excerpt of its source.
    return getattr(error, "error_message", None) or str(error)
