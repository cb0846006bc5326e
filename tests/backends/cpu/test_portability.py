"""The sources compile for machines that the tests do not run on, and with another compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

CSRC = ROOT / "csrc"
AARCH64, X86_64 = 0xB7, 0x3E  # e_machine of an ELF header

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("target", "machine", "source", "flags"),
    [
        ("aarch64-linux-gnu", AARCH64, "level_baseline", []),  # NEON
        ("x86_64-linux-gnu", X86_64, "level_baseline", []),
        ("x86_64-linux-gnu", X86_64, "level_avx2", AVX2),
        ("x86_64-linux-gnu", X86_64, "level_avx512", AVX512),
        ("x86_64-linux-gnu", X86_64, "level_avx512_bf16", [*AVX512, "-mavx512bf16"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_levels_compile_with_clang(
    tmp_path: Path, target: str, machine: int, source: str, flags: list[str]
) -> None:
    pytest.importorskip("ziglang", reason="ziglang brings a clang that cross-compiles")
    output = tmp_path / "level.o"
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17", "-O2"]
    command += ["-Wall", "-Wextra", "-Werror", *flags, f"-I{CSRC}"]
    command += ["-c", str(CSRC / "cpu" / f"{source}.cpp"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes()[18] == machine
