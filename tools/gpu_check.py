"""Builds the package, runs its GPU tests and benchmarks, and leaves the results in a folder.

Run by ``make gpu-check`` with the Python that has torch, pytest and the build tools: it downloads
nothing and makes no environment. Results go to $OUT, or to bench/results/ when OUT is not set. A
kernel counts as verified on an architecture only when such results lie under bench/results/.

The build is for this machine's GPU alone (CFPO_KERNELS_CUDA_ARCHS overrides that). A kernel may
hang: every command has a time limit, and what was found is on disk after each. Where one call is
not given enough time for all steps, several do some each: make gpu-check ARGS="build test_cuda".
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMED_OUT = 124  # as by timeout(1)
LIMITS = {"bench-linear": 300}  # seconds, where a step needs no more


def gpu_is_visible():
    try:
        import torch
    except ImportError:
        cuda = False
    else:
        cuda = torch.cuda.is_available()
    if not cuda and shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if listing.returncode == 0 and listing.stdout.startswith("GPU "):
            raise SystemExit(
                "error: nvidia-smi lists a GPU, but torch in this Python cannot use it "
                f"({sys.executable}); choose another with make gpu-check PYTHON=..."
            )
    return cuda


def run(name, command, limit, env=None):
    """The command's exit status; TIMED_OUT if it had to be ended after `limit` seconds."""
    print(f"\n== {name}: {shlex.join(command)}", flush=True)
    environment = {**os.environ, **(env or {})}
    # A group of its own, so that nothing which the command started goes on using the GPU. Not a
    # session: whoever ends this program's session ends the command too.
    newer = sys.version_info >= (3, 11)
    group = {"process_group": 0} if newer else {"preexec_fn": os.setpgrp}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **group)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"== {name}: ended after {limit} seconds", flush=True)
        return TIMED_OUT
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def own_architecture():
    import torch

    major, minor = torch.cuda.get_device_capability()
    # From 9.0 on, the kernels use instructions that only the "a" variant offers.
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def commit():
    """The checkout's commit; a copy without its history takes it from the variable COMMIT."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return os.environ.get("COMMIT", "unknown")


def environment():
    import torch

    packages = {}
    for package in ("torch", "triton", "numpy", "pytest"):
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "sm_count": properties.multi_processor_count,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": packages,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def build():
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    env = {
        "CFPO_KERNELS_CUDA": "ON",
        "CFPO_KERNELS_CUDA_ARCHS": os.environ.get("CFPO_KERNELS_CUDA_ARCHS") or own_architecture(),
        "PIP_NO_INDEX": "1",
        # Only a link to this checkout is added; `pip uninstall cfpo-kernels` removes it.
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
    }
    return [*command, "--editable", "."], env


def gpu_tests():
    """By the name of the step: a file with GPU tests, and the target that it is for, if it has any.

    Other files may need packages that are not here.
    """
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: path.name):
        text = path.read_text()
        if re.search(r"pytest\.mark\.gpu\b", text):
            found[path.stem] = path, None
        for target in ("cuda-gpu", "triton-gpu"):  # of tests/support/targets.py
            particular = re.search(rf'only_on\([^)]*"{target}"', text)
            if path.parent.name == "every_target" or particular:
                found[f"{path.stem}-{target}"] = path, target
    return found


def tests_of(name, path, target, stem):
    # A process for each: after an illegal access nothing else works in a process, and a report is
    # written only at its end. Where a test hangs, its stack is printed.
    command = [sys.executable, "-m", "pytest", str(path), "-m", "gpu", "--maxfail=20"]
    command += ["-o", "faulthandler_timeout=120", f"--junitxml={stem}-{name}.xml"]
    return command + (["--target", target] if target else []), {}


def find_sanitizer():
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)


def sanitizer(tool):
    program = find_sanitizer()
    if program is None:
        return None, {}
    command = [program, "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"]
    if tool == "memcheck":
        # Libraries ask the driver for functions and attributes that it may not have.
        command += ["--report-api-errors", "no"]
    if tool == "racecheck":
        # Which of a pair came first: a read before a write is another barrier's than one behind it.
        command += ["--racecheck-report", "all"]
    # Memory straight from the driver: torch's pool would hide what lies beside a tensor.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [*command, sys.executable, str(ROOT / "tools" / "sanitizer_case.py")], env


def verify(stem):
    record = f"{stem}-verify.json"
    return [sys.executable, "-m", "cfpo_kernels", "verify", "--full", "--json", record], {}


def bench(stem):
    return [sys.executable, "-m", "bench", "--cases", "gpu", "--json", f"{stem}-bench.json"], {}


def bench_linear(stem):
    # On a GPU of 8,192 hidden states; what is not installed is left out.
    command = [sys.executable, "-m", "bench", "--cases", "linear", "--rounds", "5"]
    return [*command, "--json", f"{stem}-bench-linear.json"], {}


def all_steps(stem):
    """What to run, by name: the command, None where it is not installed, and its environment."""
    steps = {"build": build(), "verify": verify(stem)}
    steps |= {name: tests_of(name, *of, stem) for name, of in gpu_tests().items()}
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        steps[f"sanitizer-{tool}"] = sanitizer(tool)
    return steps | {"bench": bench(stem), "bench-linear": bench_linear(stem)}


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("steps", nargs="*", help="only those that begin so: build, test_cuda, ...")
    parser.add_argument("--limit", type=float, default=1200, help="seconds of one step")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    if not gpu_is_visible():
        print("no GPU: nothing was verified")
        return 0

    facts = environment()
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    record = Path(f"{'-'.join([f'{stem}-check', *options.steps])}.json")

    steps = all_steps(stem)
    for wanted in options.steps:
        if not any(name.startswith(wanted) for name in steps):
            raise SystemExit(f"error: no step begins with {wanted!r}; there are {', '.join(steps)}")
    results = {}
    for name, (command, env) in steps.items():
        if options.steps and not name.startswith(tuple(options.steps)):
            continue
        if command is None:
            print(f"\n== {name}: not installed", flush=True)
            results[name] = None
        else:
            results[name] = run(
                name, command, min(options.limit, LIMITS.get(name, options.limit)), env
            )
        record.write_text(json.dumps({**facts, "exit_status": results}, indent=2) + "\n")
        if name == "build" and results[name] != 0:
            break
    print(f"\n== exit status {results}, written to {record}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
