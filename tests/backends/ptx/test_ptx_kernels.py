"""Whole kernels as nvcc compiles them, run by the interpreter of tests/cpp/ptx.

The suites of test_cuda_kernels.py and test_cuda_cluster.py run on PTX as well; here are the many
small cases of emulated_check.cpp, and what is particular to PTX.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx_tools import forms, nvcc
from ptx_tools.build import Done, run_check
from ptx_tools.nvcc import plant

NIGHTLY = pytest.mark.nightly
CASES = {"rows": 228, "clusters": 1359, "transient": 86}


def assert_passed(done: Done, kernels: str) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{CASES[kernels]} cases, 0 failed\n"


@pytest.mark.parametrize(
    ("kernels", "arch"),
    [
        ("rows", nvcc.ROWS),
        ("clusters", nvcc.CLUSTERS),
        ("transient", nvcc.CLUSTERS),
        *(
            pytest.param(kernels, arch, marks=NIGHTLY)
            for kernels, arch in (
                *(("rows", arch) for arch in ("86", "89", "90a", "100f", "120f")),
                *((x, arch) for x in ("clusters", "transient") for arch in ("100f", "120f")),
            )
        ),
    ],
)
def test_many_small_cases(kernels: str, arch: str, ptx_check: Path, ptx: nvcc.Compiler) -> None:
    """Data races are looked for, and proxy fences, also of what was read."""
    folder = ptx.instance(nvcc.CHECKED, arch).parent
    assert_passed(run_check(ptx_check, folder, kernels, races=1), kernels)


# What orders reads of some lanes before what others write there: of the target's logit, which all
# read and those use that send it; and of a confident row's peak.
ORDERS = {
    "target": "        hw::sync_warp();  // all have read it",
    "peak": "        hw::sync_warp();  // a lane looks at",
}


@pytest.mark.nightly
@pytest.mark.parametrize("line", ORDERS.values(), ids=ORDERS)
def test_a_race_of_clusters_is_found(
    line: str, ptx_check: Path, ptx: nvcc.Compiler, tmp_path: Path
) -> None:
    tree = plant("cluster_kernel.cuh", line, "        //", tmp_path)
    source = tree / "csrc" / "cuda" / "instances" / f"{nvcc.CHECKED}.cu"
    (tmp_path / "ptx").mkdir()
    nvcc.compile_ptx(source, nvcc.CLUSTERS, tmp_path / "ptx" / "kernels.ptx", tree)
    done = run_check(ptx_check, tmp_path / "ptx", "clusters", races=1)
    assert done.returncode != 0 and "ptx: a race with thread" in done.stderr, done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("async_", [0, 1, 2], ids=["immediate", "late", "random"])
def test_other_orders(async_: int, seed: int, ptx_check: Path, ptx: nvcc.Compiler) -> None:
    folder = ptx.instance(nvcc.CHECKED, nvcc.CLUSTERS).parent
    assert_passed(run_check(ptx_check, folder, "clusters", async_=async_, seed=seed), "clusters")


# On every commit those kernels whose PTX is there anyway.
@pytest.mark.parametrize("letters", ["b", pytest.param("bfh", marks=NIGHTLY)])
def test_the_list_of_forms(letters: str, interpreter: Path, ptx: nvcc.Compiler) -> None:
    """A new instruction is seen in review: its test against the manual, its place in the model."""
    text = forms.FILE.read_text()
    if f"# nvcc {forms.version()}." not in text:
        pytest.skip("the list is another nvcc's")
    got = forms.compiled(ptx, interpreter, letters)
    changed = forms.differences(got, forms.of_types(forms.read(text), letters))
    assert not changed, (
        "the kernels use other instructions than tests/golden/ptx_forms.txt says. If that is meant,"
        f" write it anew by `{forms.RENEW}` and commit it.\n" + "\n".join(changed)
    )


def test_a_new_form_is_noticed() -> None:
    want = forms.read(forms.FILE.read_text())
    assert want and forms.differences(want, want) == []
    got = want | {("80", "popc.b32 rr"): {"row(b)"}}
    del got["90a", "fence.proxy.async.shared::cta"]
    assert forms.differences(got, want) == [
        "new: sm_80 popc.b32 rr in row(b)",
        *(f"gone: sm_90a fence.proxy.async.shared::cta in cluster({x})" for x in "bfh"),
    ]
