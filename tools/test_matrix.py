"""Tests the package with other versions of Python, torch, numpy and Triton.

python tools/test_matrix.py                # all environments whose Python is here
python tools/test_matrix.py --only NAME    # one, or several
python tools/test_matrix.py --list         # what they are, and which Python runs each
python tools/test_matrix.py --table        # the results as Markdown
python tools/test_matrix.py --write        # puts that into docs/versions.md

Each environment is made in build/matrix/NAME from the package index, which gives torch with CUDA's
libraries: 5 GB, deleted afterwards without --keep. It builds and tests a copy of the checkout,
whose own module and environment stay as they are. docs/versions.json has the results; each
environment's is kept as soon as it is there. --prepare only makes environments, beside the tests of
others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from marked import with_part

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
RESULTS = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"

OLDEST_TRITON = (3, 6)  # as in pyproject.toml
OLDEST_TRITON_TEXT = ".".join(map(str, OLDEST_TRITON))


class Environment(NamedTuple):
    python: str
    torch: str
    numpy: str | None  # what pip is asked for; None: there is none
    triton: str | None = None  # None: the one that torch brings

    @property
    def name(self) -> str:
        other = f"-triton{self.triton}" if self.triton else ""
        return f"py{self.python}-torch{self.torch}{other}{'' if self.numpy else '-no-numpy'}"

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def python_inside(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"


ENVIRONMENTS = (
    Environment("3.10", "2.6.0", "numpy<2"),
    Environment("3.10", "2.7.1", "numpy==2.2.*"),
    Environment("3.12", "2.15.0", "numpy"),
    Environment("3.13", "2.14.1", "numpy==2.4.*"),
    Environment("3.12", "2.9.1", None),
    Environment("3.11", "2.8.0", "numpy==2.3.*"),
    Environment("3.13", "2.11.0", "numpy==2.3.*", "3.6.0"),
    Environment("3.10", "2.10.0", "numpy==2.2.*"),
    Environment("3.13", "2.12.1", "numpy"),
    Environment("3.12", "2.15.0", None),
    Environment("3.14", "2.14.1", "numpy"),
)

# Every part of the package on the CPU: a few minutes. --all takes the two folders whole.
SOME_TESTS = (
    *(
        f"tests/core/test_{name}.py"
        for name in (
            "objective",
            "named_objectives",
            "reference",
            "errors",
            "from_logps",
            "transforms",
            "argument_kinds",
            "stage_two",
        )
    ),
    *(f"tests/every_target/test_{name}.py" for name in ("golden", "loss", "autograd")),
)
ALL_TESTS = ("tests/core", "tests/every_target")
TRITON_TESTS = ("tests/every_target/test_golden.py",)

# Seconds after which a step is ended.
INSTALL, BUILD, PROGRAM, TESTS, EVERY_TEST = 3600, 1200, 300, 1800, 7200

VERSIONS = """
import json, platform
from importlib import metadata
found = {"python": platform.python_version()}
for name in ("torch", "numpy", "triton"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
IMPORT = "import cfpo_kernels; print(cfpo_kernels.available_backends())"


class Failure(Exception):
    """A step that went wrong; the text says how."""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(command: list[str], limit: int, cwd: Path, **variables: str) -> tuple[int | None, str]:
    """Exit status (None: ended after `limit` seconds) and output, with what `command` started."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def must(what: str, command: list[str], limit: int, cwd: Path, **variables: str) -> str:
    """The output of a command; Failure if it does not succeed."""
    status, output = run(command, limit, cwd, **variables)
    if status is None:
        raise Failure(f"{what}: ended after {limit} s")
    if status:
        print(output[-3000:], file=sys.stderr)
        raise Failure(f"{what}: {last_line(output)}")
    return output


# --- The environment ---------------------------------------------------------------------------


def find_python(version: str) -> str | None:
    """An interpreter of that version: this one, one on PATH, or one of pyenv's."""
    candidates = [sys.executable]
    if found := shutil.which(f"python{version}"):
        candidates.append(found)
    if pyenv := os.environ.get("PYENV_ROOT"):
        found_there = Path(pyenv).glob(f"versions/{version}.*/bin/python")
        candidates += sorted(map(str, found_there), key=lambda path: (len(path), path))
    ask = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        # One of pyenv's shims may name a version that is not chosen, and fails.
        done = subprocess.run([candidate, "-c", ask], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def copy_checkout(to: Path) -> None:
    """What git knows or would add, as it is on disk."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    shutil.rmtree(to, ignore_errors=True)
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def pins(*names: str) -> list[str]:
    """Lines of requirements/test.txt, with their markers."""
    lines = (ROOT / "requirements" / "test.txt").read_text().splitlines()
    found = [line.partition(" #")[0] for line in lines if re.match("|".join(names), line)]
    return [line for line in found if re.split("[=<>]", line)[0] in names]


def install(environment: Environment, python: str) -> None:
    """Makes the environment, or completes one that is there."""
    inside = environment.python_inside
    if not Path(inside).exists():
        must("venv", [python, "-m", "venv", str(environment.folder)], PROGRAM, ROOT)
    pip = [inside, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    say("  torch" + (f", {environment.numpy}" if environment.numpy else ", no numpy"))
    numpy = [environment.numpy] if environment.numpy else []
    must("installing torch", [*pip, f"torch=={environment.torch}", *numpy], INSTALL, ROOT)
    if environment.triton:
        triton = f"triton=={environment.triton}"
        must("installing triton", [*pip, "--no-deps", triton], INSTALL, ROOT)
    tools = ["-r", "requirements/build.txt", *pins("pytest", "hypothesis", "pytest-benchmark")]
    must("installing tools", [*pip, *tools], INSTALL, ROOT)


def build(environment: Environment) -> None:
    copy_checkout(environment.checkout)
    command = [environment.python_inside, "-m", "pip", "install", "--quiet", "--no-compile"]
    command += ["--no-build-isolation", "--no-deps", "--editable", "."]
    must("building", command, BUILD, environment.checkout, CFPO_KERNELS_CUDA="OFF")


# --- The tests ---------------------------------------------------------------------------------


def summary(report: Path) -> tuple[dict[str, int], str | None]:
    """How many tests passed, failed and were skipped, and what failed first."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    first = None
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = case.find("failure")
        wrong = case.find("error") if wrong is None else wrong
        if wrong is not None:
            counts["failed"] += 1
            message = (wrong.get("message") or "").strip().splitlines()
            first = first or f"{case.get('name')}: {message[0][:200] if message else 'failed'}"
        else:
            counts["passed" if case.find("skipped") is None else "skipped"] += 1
    return counts, first


def tests(
    environment: Environment, part: str, options: list[str], limit: int, **variables: str
) -> dict[str, Any]:
    """Runs them; the log stays in build/matrix."""
    report = environment.folder / f"{part}.xml"
    report.unlink(missing_ok=True)
    command = [environment.python_inside, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", f"--junitxml={report}", *options]
    start = time.monotonic()
    status, output = run(command, limit, environment.checkout, **variables)
    (FOLDER / f"{environment.name}-{part}.log").write_text(output)
    seconds = round(time.monotonic() - start)
    if status is None:
        return {"failed first": f"ended after {limit} s", "seconds": seconds}
    counts, first = summary(report) if report.exists() else ({}, None)
    if status and not first:
        first = f"pytest: exit status {status}, {last_line(output)}"
    return {**counts, "seconds": seconds, **({"failed first": first} if first else {})}


def first_loss() -> str:
    """The program on the first page of the docs."""
    page = (ROOT / "docs" / "index.md").read_text()
    found = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def no_triton(versions: dict[str, str | None]) -> str | None:
    """Why Triton's kernels are not interpreted there, if so."""
    if versions["triton"] is None:
        return "no Triton"
    if tuple(map(int, versions["triton"].split(".")[:2])) < OLDEST_TRITON:
        return f"Triton is older than {OLDEST_TRITON_TEXT}"
    return None if versions["numpy"] else "Triton's interpreter needs numpy"


def commit() -> str:
    """That of the checkout, with "-dirty" where files differ from it; "" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def examine(environment: Environment, python: str, everything: bool) -> Iterator[dict[str, Any]]:
    """The result as far as it is known, after each step."""
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "commit": commit()}
    program = [environment.python_inside, "-c"]
    try:
        install(environment, python)
        result |= json.loads(must("versions", [*program, VERSIONS], PROGRAM, environment.folder))
        say("  building")
        build(environment)
        must("import", [*program, IMPORT], PROGRAM, environment.folder)
        must("the first loss", [*program, first_loss()], PROGRAM, environment.folder)
    except Failure as failure:
        yield {**result, "failed first": str(failure)}
        return
    result["first loss"] = "passed"
    yield result
    say("  tests on the CPU")
    chosen = [*(ALL_TESTS if everything else SOME_TESTS), "--target", "cpu"]
    chosen += ["--target", "reference"]
    limit = EVERY_TEST if everything else TESTS
    result["cpu"] = {"which": "all" if everything else "some"}
    result["cpu"] |= tests(environment, "cpu", chosen, limit)
    yield result
    if why := no_triton(result):
        result["interpreted triton"] = {"not run": why}
    else:
        say("  tests of interpreted Triton")
        chosen = [*TRITON_TESTS, "--target", "triton-interpreted"]
        found = tests(environment, "triton", chosen, TESTS, TRITON_INTERPRET="1")
        result["interpreted triton"] = found
    yield result


# --- The results -------------------------------------------------------------------------------


def read_results() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep_result(name: str, result: dict[str, Any]) -> None:
    results = {**read_results(), name: result}
    order = {environment.name: i for i, environment in enumerate(ENVIRONMENTS)}
    sort = sorted(results, key=lambda name: (order.get(name, len(order)), name))
    RESULTS.write_text(json.dumps({name: results[name] for name in sort}, indent=2) + "\n")


def in_words(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    if "not run" in found:
        return f"not run: {found['not run']}"
    if "failed first" in found and not found.get("failed"):
        return "**failed**"
    text = f"{found['passed']:,} passed"
    if found["failed"]:
        text += f", **{found['failed']:,} failed**"
    return text + (f", {found['skipped']:,} skipped" if found["skipped"] else "")


def failed_first(result: dict[str, Any]) -> Iterable[str]:
    for part in (result, result.get("cpu", {}), result.get("interpreted triton", {})):
        if "failed first" in part:
            yield part["failed first"]


def table(results: dict[str, dict[str, Any]]) -> str:
    """In Markdown: a row for each environment, also for those that did not run."""
    lines = [
        "| Python | torch | numpy | Triton | tests on the CPU | Triton, interpreted | date |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for environment in ENVIRONMENTS:
        result = results.get(environment.name, {"not run": "not yet"})
        if "torch" not in result:
            why = result.get("not run") or result["failed first"]
            asked = (environment.python, environment.torch, environment.numpy or "none")
            triton = environment.triton or "torch's"
            word = "not run" if "not run" in result else "**failed**"
            cells = [*asked, triton, f"{word}: {why}", "", result.get("date", "")]
        else:
            cells = [result["python"], result["torch"], result["numpy"] or "none"]
            cells += [result["triton"] or "none"]
            if "cpu" in result:
                cells += [in_words(result["cpu"]), in_words(result.get("interpreted triton"))]
            else:
                cells += ["**failed** before", ""]
            cells.append(" ".join(filter(None, (result["date"], result.get("commit")))))
            notes += [f"- {environment.name}: `{text}`" for text in failed_first(result)]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    return text + ("\nWhat failed first:\n\n" + "\n".join(notes) + "\n" if notes else "")


# --- The command -------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this one; may be repeated")
    parser.add_argument("--all", action="store_true", help="tests/core, tests/every_target whole")
    parser.add_argument("--keep", action="store_true", help="do not delete the environments")
    parser.add_argument("--prepare", action="store_true", help="make them, test nothing, and keep")
    parser.add_argument("--list", action="store_true", help="print the environments")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    parser.add_argument("--write", action="store_true", help="put the table into docs/versions.md")
    options = parser.parse_args(arguments)
    known = {environment.name for environment in ENVIRONMENTS}
    if unknown := set(options.only or ()) - known:
        parser.error(f"no environment is called {', '.join(sorted(unknown))}: see --list")
    return options


def test(environment: Environment, python: str, options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    try:
        if options.prepare:
            install(environment, python)
        else:
            for result in examine(environment, python, options.all):
                keep_result(environment.name, result)
    finally:
        if not (options.keep or options.prepare):
            shutil.rmtree(environment.folder, ignore_errors=True)
    return result


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    chosen = [x for x in ENVIRONMENTS if not options.only or x.name in options.only]
    if options.list:
        for environment in chosen:
            print(environment.name, find_python(environment.python) or "(no such Python here)")
        return 0
    if options.table or options.write:
        made = table(read_results())
        if options.write:
            PAGE.write_text(with_part(PAGE.read_text(), "versions", made))
        else:
            print(made, end="")
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    bad = False
    for environment in chosen:
        say(environment.name)
        python = find_python(environment.python)
        if python is None:
            why = f"no Python {environment.python} here"
            say(f"  not run: {why}")
            # What another machine found stays.
            if environment.name not in read_results():
                keep_result(environment.name, {"not run": why})
            continue
        try:
            result = test(environment, python, options)
        except Failure as failure:  # of --prepare
            result = {"failed first": str(failure)}
        for text in failed_first(result):
            bad = True
            say(f"  failed: {text}")
        if not options.prepare:
            cpu, interpreted = result.get("cpu"), result.get("interpreted triton")
            say(f"  CPU: {in_words(cpu)}; interpreted Triton: {in_words(interpreted)}")
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
