"""Which forms of instructions each kernel uses: tests/golden/ptx_forms.txt.

As a program it writes that file, whose changes are seen in review.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from repository import GOLDEN

from .build import build_library
from .interpreter import Module
from .nvcc import CLUSTERS, NVCC, OF_CLUSTERS, POLICIES, ROWS, Compiler

FILE = GOLDEN / "ptx_forms.txt"
RENEW = "PYTHONPATH=tests/support .venv/bin/python -m ptx_tools.forms"
DTYPES = {"b": "bfloat16", "f": "float32", "h": "float16"}

# For each architecture and form, "cluster(b)": a kernel with that type of elements.
Forms = dict[tuple[str, str], set[str]]


def version() -> str:
    assert NVCC is not None
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    return found[1] if found else "unknown"


def compiled(ptx: Compiler, interpreter: Path, dtypes: Iterable[str]) -> Forms:
    """Of the kernels of these types, whatever their stage: clusters' on 9.0a, others' on 8.0."""
    found: Forms = {}
    for letter in dtypes:
        names = [
            (f"{stage}_{DTYPES[letter]}", ROWS) for stage in (*POLICIES, "logps", "logps_backward")
        ] + [("multiply", ROWS)]
        names += [(f"{stage}_{DTYPES[letter]}", CLUSTERS) for stage in POLICIES]
        for name, arch in names:
            module = Module(interpreter, ptx.instance(name, arch).read_text())
            for kernel, forms in module.forms().items():
                template = re.search(r"cuda\d+([a-z_]+)_kernelI(?:NS_\d+)?(b|f)(loat16)?", kernel)
                assert template is not None, kernel
                own = template[2] if template[2] == "b" else "h" if template[3] else "f"
                if own == letter and (template[1] in OF_CLUSTERS) == (arch == CLUSTERS):
                    for form in forms:
                        found.setdefault((arch, form), set()).add(f"{template[1]}({letter})")
    return found


def render(forms: Forms) -> str:
    lines = [
        f"# nvcc {version()}. A form, and the kernels that use it with elements of bfloat16 (b),",
        f"# float32 (f), float16 (h). Written by {RENEW}",
    ]
    for arch in (ROWS, CLUSTERS):
        lines.append(f"[{arch}]")
        for (of_arch, form), users in sorted(forms.items()):
            kernels: dict[str, str] = {}
            for user in sorted(users):
                name, letter = user.rstrip(")").split("(")
                kernels[name] = kernels.get(name, "") + letter
            if of_arch == arch:
                lines.append(f"{form}: " + " ".join(f"{k}({x})" for k, x in kernels.items()))
    return "\n".join(lines) + "\n"


def read(text: str) -> Forms:
    found: Forms = {}
    arch = ""
    for line in text.splitlines():
        if line.startswith("["):
            arch = line.strip("[]")
        elif line and not line.startswith("#"):
            form, users = line.rsplit(": ", 1)
            found[arch, form] = {
                f"{name}({letter})"
                for name, letters in re.findall(r"(\w+)\((\w+)\)", users)
                for letter in letters
            }
    return found


def of_types(forms: Forms, letters: str) -> Forms:
    kept = {key: {user for user in users if user[-2] in letters} for key, users in forms.items()}
    return {key: users for key, users in kept.items() if users}


def differences(got: Forms, want: Forms) -> list[str]:
    return [
        f"{'new' if user in got.get(key, set()) else 'gone'}: sm_{key[0]} {key[1]} in {user}"
        for key in sorted(got.keys() | want.keys())
        for user in sorted(got.get(key, set()) ^ want.get(key, set()))
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        library = build_library(Path(folder))
        FILE.write_text(render(compiled(Compiler(Path(folder)), library, DTYPES)))
