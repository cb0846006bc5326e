"""What a result was measured on and with: without it a figure means little."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("cfpo-kernels", "torch", "triton", "liger-kernel", "trl")


def describe_machine() -> dict:
    return {
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "caches": cpu_caches(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": describe_gpu(),
        "system": f"{platform.system()} {platform.release()}",
    }


def device_name(machine: dict, device: str) -> str:
    return machine["gpu"]["name"] if device == "cuda" else machine["cpu"]["model"]


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()  # Arm's cpuinfo has no model name


def cpu_caches() -> dict[str, str]:
    """Sizes as the kernel gives them, such as {"L2": "1024K", "L3": "32768K"}."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in _CACHE_FILES)
        caches[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return caches


_CACHE_FILES = ("level", "type", "size")


def describe_gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
    }


def describe_versions() -> dict[str, str | bool | None]:
    versions: dict[str, str | bool | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["git_commit"] = git("rev-parse", "HEAD")
    versions["git_modified"] = bool(git("status", "--porcelain", "--untracked-files=no"))
    return versions


def git(*arguments: str) -> str | None:
    return first_line("git", "-C", str(REPOSITORY), *arguments)


def first_line(*command: str) -> str | None:
    """First line of a command's output, None where it fails, is missing or says nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
