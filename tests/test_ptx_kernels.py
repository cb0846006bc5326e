"""Whole kernels as nvcc compiles them, run by the interpreter of tests/cpp/ptx.

The suites of test_cuda_kernels.py and test_cuda_cluster.py run on PTX as well; here are the many
small cases of emulated_check.cpp, and what is particular to PTX.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx_tools import nvcc
from ptx_tools.build import Done, run_check

if nvcc.NVCC is None:
    pytest.skip(nvcc.MISSING, allow_module_level=True)

NIGHTLY = pytest.mark.nightly
CASES = {"rows": 228, "clusters": 1359}


def assert_passed(done: Done, kernels: str) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{CASES[kernels]} cases, 0 failed\n"


@pytest.mark.parametrize(
    ("kernels", "arch"),
    [
        ("rows", nvcc.ROWS),
        ("clusters", nvcc.CLUSTERS),
        *(
            pytest.param(kernels, arch, marks=NIGHTLY)
            for kernels, arch in (
                *(("rows", arch) for arch in ("86", "89", "90a", "100f", "120f")),
                *(("clusters", arch) for arch in ("100f", "120f")),
            )
        ),
    ],
)
def test_many_small_cases(kernels: str, arch: str, ptx_check: Path, ptx: nvcc.Compiler) -> None:
    """With proxy fences, also of what was read, and data races looked for."""
    folder = ptx.instance("cfpo_bfloat16", arch).parent
    assert_passed(run_check(ptx_check, folder, kernels, races=1), kernels)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("async_", [0, 1, 2], ids=["immediate", "late", "random"])
def test_other_orders(async_: int, seed: int, ptx_check: Path, ptx: nvcc.Compiler) -> None:
    folder = ptx.instance("cfpo_bfloat16", nvcc.CLUSTERS).parent
    assert_passed(run_check(ptx_check, folder, "clusters", async_=async_, seed=seed), "clusters")
