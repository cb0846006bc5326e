"""Builds the package, runs its GPU tests and benchmarks, and leaves the results in a folder.

Run by ``make gpu-check`` with the Python that has torch, pytest and the build tools: it downloads
nothing and makes no environment. Results go to $OUT, or to bench/results/ when OUT is not set. A
kernel counts as verified on an architecture only when such results lie under bench/results/.

The build is for this machine's GPU alone (CFPO_KERNELS_CUDA_ARCHS overrides that).
"""

import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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


def run(name, command, env=None):
    print(f"\n== {name}: {shlex.join(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}).returncode


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
    return run("build", [*command, "--editable", "."], env)


def main():
    if not gpu_is_visible():
        print("no GPU: nothing was verified")
        return 0

    facts = environment()
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    results = {"build": build()}
    if results["build"] == 0:
        # By name: the other files may need packages that are not here.
        files = sorted(str(path) for path in (ROOT / "tests").glob("test_gpu*.py"))
        pytest = [sys.executable, "-m", "pytest", *files]
        junit = f"--junitxml={folder / f'{stem}-tests.xml'}"
        results["tests"] = run("tests", [*pytest, "-m", "gpu", junit])
        if sanitizer := shutil.which("compute-sanitizer"):
            case = [sys.executable, str(ROOT / "tools" / "sanitizer_case.py")]
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
                check = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
                results[tool] = run(tool, [*check, *case])
        figures = str(folder / f"{stem}-bench.json")
        bench = [sys.executable, "-m", "bench", "--cases", "gpu", "--json", figures]
        results["bench"] = run("bench", bench)

    record = folder / f"{stem}-check.json"
    record.write_text(json.dumps({**facts, "exit_status": results}, indent=2) + "\n")
    print(f"\n== exit status {results}, written to {record}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
