"""What the compiler made of the CUDA kernels: registers, stack, instructions. Needs no GPU.

Run as a program it prints the table of docs/cuda.md:

    python tools/cuda_resources.py [MODULE]

MODULE is the native module or any file with machine code in it; by default the installed one.
cuobjdump comes from PATH or from the package `triton`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """One kernel on one architecture; bytes a thread."""

    arch: str
    function: str  # mangled
    registers: int
    stack: int
    local: int

    @property
    def kernel(self) -> str:
        return readable(self.function)


def readable(function: str) -> str:
    """row_kernel<bfloat16, policy, entropy> from the mangled name."""
    match = re.match(r"_ZN4cfpo4cuda\d+([a-z_]+)I(.*?)EEv", function)
    if match is None:
        plain = re.search(r"\d([a-z_]+_kernel)Ev$", function)
        return plain[1] if plain else function
    name, arguments = match[1], match[2] + "E"
    dtype = re.match(r"NS_\d+(bfloat16|float16)", arguments)
    words = [dtype[1] if dtype else "float32"]
    stages = {"PolicyStage": "policy", "LogpsBackward": "logps_backward"}
    words += [word for tag, word in {**stages, "LogpsStage": "logps"}.items() if tag in arguments]
    flags = [flag == "1" for flag in re.findall(r"Lb([01])E", arguments)]  # entropy, softcap
    words += ["entropy"] if any(flags[:1]) else []
    words += ["softcap"] if "6CappedI" in arguments or any(flags[1:]) else []
    return f"{name}<{', '.join(words)}>"


def find_cuobjdump() -> str | None:
    if path := shutil.which("cuobjdump"):
        return path
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def cuobjdump(*arguments: str) -> str:
    program = find_cuobjdump()
    if program is None:
        raise SystemExit("cuobjdump was not found: install the CUDA toolkit, or triton")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def usages(module: str) -> list[Usage]:
    """Every kernel on every architecture in the file."""
    found, arch = [], ""
    lines = cuobjdump("--dump-resource-usage", module).splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if match := re.match(r"arch = (\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\w+):", line.strip()):
            numbers = dict(re.findall(r"(\w+):(\d+)", after))
            registers, stack, local = (int(numbers[key]) for key in ("REG", "STACK", "LOCAL"))
            found.append(Usage(arch, match[1], registers, stack, local))
    return found


def instructions(module: str, usage: Usage) -> list[str]:
    """The kernel's machine instructions, without operands: "LDS.128", "MUFU.EX2", ..."""
    arch = ("-arch", usage.arch) if usage.arch else ()  # a cubin has one and does not say which
    text = cuobjdump("-sass", *arch, "-fun", usage.function, module)
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)


def table(module: str) -> str:
    """Registers of the kernels on each architecture, as Markdown."""
    rows: dict[str, dict[str, int]] = {}
    for usage in usages(module):
        if usage.kernel.startswith(("row_", "cluster_", "transient_", "split_", "multiply_")):
            rows.setdefault(usage.kernel, {})[usage.arch] = usage.registers
    archs = sorted({arch for row in rows.values() for arch in row}, key=arch_number)
    lines = ["| kernel | " + " | ".join(archs) + " |", "|---" * (len(archs) + 1) + "|"]
    for kernel in sorted(rows):
        cells = [str(rows[kernel].get(arch, "")) for arch in archs]
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arch_number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def installed_module() -> str:
    spec = importlib.util.find_spec("cfpo_kernels._C")
    if spec is None or spec.origin is None:
        raise SystemExit("cfpo_kernels is not installed; give the path of its native module")
    return spec.origin


if __name__ == "__main__":
    print(table(sys.argv[1] if len(sys.argv) > 1 else installed_module()))
