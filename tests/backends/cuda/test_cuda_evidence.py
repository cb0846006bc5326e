"""What the compiler made of the CUDA kernels, read from the native module; needs no GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ptx_tools.nvcc import MISSING, NVCC
from repository import ROOT

from cfpo_kernels.backends import cpu

spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "tools/cuda_resources.py")
assert spec is not None and spec.loader is not None
resources: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resources)

pytestmark = [
    pytest.mark.skipif(
        cpu.native is None or not cpu.native.cuda_built, reason="the module has no CUDA part"
    ),
    pytest.mark.skipif(resources.find_cuobjdump() is None, reason="needs cuobjdump"),
]

# What the launch bounds of csrc/cuda leave a thread of 65536 registers.
MOST_REGISTERS = {
    "cluster_kernel": 128,
    "transient_kernel": 96,
    "row_kernel": 96,
    "split_sums_kernel": 64,
    "split_finish_kernel": 80,
    "multiply_": 64,
    "probe_": 16,
}


def problems_of_usage(usage: Any) -> list[str]:
    most = next((n for name, n in MOST_REGISTERS.items() if usage.kernel.startswith(name)), None)
    problems = []
    if usage.stack or usage.local:
        problems.append(f"{usage}: spills or local memory")
    if most is None:
        problems.append(f"{usage}: an unknown kernel")
    elif usage.registers > most:
        problems.append(f"{usage}: more than {most} registers")
    return problems


def problems_of_code(usage: Any, instructions: list[str]) -> list[str]:
    """In the fused kernel every row moves by 16 bytes, through asynchronous copies."""
    count = Counter(instructions)

    def number(pattern: str) -> int:
        return sum(n for name, n in count.items() if re.fullmatch(pattern, name))

    elements = 4 if "float32" in usage.kernel else 8
    wanted = {
        "asynchronous copies of 16 bytes, past L1": (r"LDGSTS\.E\.BYPASS(\.\w+)*\.128", 1),
        "loads of 16 bytes from shared memory": (r"LDS\.128", 8),
        "streaming stores of 16 bytes": (r"STG\.E\.EF\.128", 4),
        "exponentials, one an element and sweep": (r"MUFU\.EX2", 2 * 4 * elements),
    }
    problems = [
        f"{usage.arch} {usage.kernel}: fewer than {least} {what}"
        for what, (pattern, least) in wanted.items()
        if number(pattern) < least
    ]
    # Other copies, generic addresses, local memory. Scalars of a row are loaded one by one.
    for pattern in (r"LDGSTS(?!.*\.128).*", r"(LD|ST)\.E.*", r"(LDL|STL).*"):
        if number(pattern):
            problems.append(f"{usage.arch} {usage.kernel}: {pattern}")
    return problems


@pytest.fixture(scope="module")
def usages() -> list[Any]:
    found: list[Any] = resources.usages(cpu.native.__file__)
    return found


def test_every_kernel_is_there(usages: list[Any]) -> None:
    wanted = {
        f"row_kernel<{dtype}, {rest}>"
        for dtype in ("float32", "bfloat16", "float16")
        for stage in ("policy", "logps", "logps_backward")
        for rest in ((stage,) if stage == "logps_backward" else (stage, f"{stage}, entropy"))
    }
    wanted |= {
        f"row_kernel<{dtype}, {rest}, softcap>"
        for dtype in ("float32", "bfloat16", "float16")
        for rest in ("policy, entropy", "logps, entropy", "logps_backward")
    }
    wanted |= {
        f"cluster_kernel<{dtype}, {stage}{entropy}>"
        for dtype in ("float32", "bfloat16", "float16")
        for stage in ("policy",)
        for entropy in ("", ", entropy")
    }
    wanted |= {
        f"split_sums_kernel<{dtype}, entropy, softcap>"
        for dtype in ("float32", "bfloat16", "float16")
    }
    wanted |= {
        f"transient_kernel<{dtype}, policy{entropy}>"
        for dtype in ("float32", "bfloat16", "float16")
        for entropy in ("", ", entropy")
    }
    archs = {usage.arch for usage in usages}
    assert len(archs) == sum("virtual" not in arch for arch in cpu.native.cuda_archs.split(","))
    for arch in archs:
        assert wanted <= {usage.kernel for usage in usages if usage.arch == arch}


def test_no_kernel_spills(usages: list[Any]) -> None:
    assert usages
    assert [problem for usage in usages for problem in problems_of_usage(usage)] == []


def test_rows_move_by_16_bytes(usages: list[Any]) -> None:
    chosen = [u for u in usages if re.fullmatch(r"row_kernel<\w+, policy>", u.kernel)]
    assert chosen
    for usage in chosen:
        code = resources.instructions(cpu.native.__file__, usage)
        assert problems_of_code(usage, code) == []


def problems_of_cluster_code(usage: Any, instructions: list[str]) -> list[str]:
    """Rows come and go by bulk copies, and the sums cross between blocks."""
    wanted = {
        "bulk loads": r"UBLKCP\.S\.G",
        "bulk stores": r"UBLKCP\.G\.S",
        "waits for an mbarrier": r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
        "arrivals that expect bytes": r"SYNCS\.ARRIVE\.TRANS64.*",
        "proxy fences": r"FENCE\.VIEW\.ASYNC.*",
        "sums sent to other blocks": r"STAS\.128",
        "loads of 16 bytes from shared memory": r"LDS\.128",
        "stores of 16 bytes to shared memory": r"STS\.128",
    }
    problems = [
        f"{usage.arch} {usage.kernel}: no {what}"
        for what, pattern in wanted.items()
        if not any(re.fullmatch(pattern, name) for name in instructions)
    ]
    for pattern in (r"LDGSTS.*", r"(LDL|STL).*"):
        if any(re.fullmatch(pattern, name) for name in instructions):
            problems.append(f"{usage.arch} {usage.kernel}: {pattern}")
    return problems


def cluster_kernels(usages: list[Any], name: str) -> list[Any]:
    chosen = [
        u for u in usages if re.fullmatch(name, u.kernel) and resources.arch_number(u.arch) >= 90
    ]
    if not chosen:
        pytest.skip("built for no device with clusters")
    return chosen


def test_clusters_move_rows_by_bulk_copies(usages: list[Any]) -> None:
    for usage in cluster_kernels(usages, r"cluster_kernel<\w+, policy>"):
        code = resources.instructions(cpu.native.__file__, usage)
        assert problems_of_cluster_code(usage, code) == []
    row = next(u for u in usages if u.kernel == "row_kernel<bfloat16, policy>")
    found = problems_of_cluster_code(row, resources.instructions(cpu.native.__file__, row))
    assert len(found) >= 7, "another kernel would pass"


def test_transient_clusters_move_rows_by_16_bytes(usages: list[Any]) -> None:
    """As the row kernel does, and send their sums to each other, without proxies to be fenced."""
    for usage in cluster_kernels(usages, r"transient_kernel<\w+, policy>"):
        code = resources.instructions(cpu.native.__file__, usage)
        assert problems_of_code(usage, code) == []
        assert "STAS.128" in code and not any(name.startswith("UBLKCP") for name in code)


def fenced(instructions: list[str]) -> bool:
    """Whether the last load from shared memory has a proxy fence behind it."""
    for name in reversed(instructions):
        if name.startswith(("FENCE.VIEW.ASYNC", "LDS")):
            return name.startswith("FENCE")
    return False


def problems_of_proxies(usage: Any, instructions: list[str]) -> list[str]:
    """What was loaded from shared memory is fenced before others learn that it may be overwritten.

    In the order of the program's text: the compiler keeps a loop's instructions together.
    """
    problems = []
    for what, pattern in {
        "tells the other blocks that it has merged the sums": r"SYNCS\.ARRIVE\..*A1T0",
        "sends a sum": r"STAS\.128",
        "stores a chunk": r"UBLKCP\.G\.S",
    }.items():
        at = next((i for i, name in enumerate(instructions) if re.fullmatch(pattern, name)), 0)
        if not fenced(instructions[:at]):
            problems.append(f"{usage.arch} {usage.kernel}: no fence before it {what}")
    # Each of the four waits for this thread's loads and stores first.
    fences = re.findall(r"MEMBAR\.ALL\.CTA FENCE\.VIEW\.ASYNC", " ".join(instructions))
    if len(fences) < 4:
        problems.append(f"{usage.arch} {usage.kernel}: only {len(fences)} proxy fences")
    # Fences of the whole GPU, which take long, come with the barriers of the cluster alone.
    for i, name in enumerate(instructions):
        if name == "MEMBAR.ALL.GPU" and "UCGABAR_ARV" not in instructions[i : i + 4]:
            problems.append(f"{usage.arch} {usage.kernel}: {name} for each row")
    return problems


def test_clusters_fence_what_they_have_read(usages: list[Any]) -> None:
    for usage in cluster_kernels(usages, r"cluster_kernel<.*>"):
        code = resources.instructions(cpu.native.__file__, usage)
        assert problems_of_proxies(usage, code) == []
    told = next(i for i, name in enumerate(code) if name.endswith("A1T0"))
    late = [*code[:told], "LDS", *code[told:]]
    assert len(problems_of_proxies(usage, late)) == 1
    assert len(problems_of_proxies(usage, [c for c in code if "FENCE" not in c])) == 4
    assert len(problems_of_proxies(usage, [*late, "MEMBAR.ALL.GPU", "SYNCS.ARRIVE.TRANS64"])) == 2


SPILLING = """
namespace cfpo::cuda {
template <class T> __global__ void row_kernel(T* x) {
  T y[64];
  for (int i = 0; i < 64; ++i) y[i] = x[i * 64 + threadIdx.x];
  for (int i = 0; i < 64; ++i) x[threadIdx.x * 64 + i] = y[i] + y[(i * 7 + threadIdx.x) % 64];
}
template __global__ void row_kernel<float>(float*);
}
"""


@pytest.mark.skipif(NVCC is None, reason=MISSING)
def test_a_bad_kernel_is_noticed(tmp_path: Path) -> None:
    source, cubin = tmp_path / "bad.cu", tmp_path / "bad.cubin"
    source.write_text(SPILLING)
    subprocess.run([NVCC, "-arch=sm_90a", "-cubin", str(source), "-o", str(cubin)], check=True)
    (usage,) = resources.usages(str(cubin))
    assert usage.kernel == "row_kernel<float32>"
    assert problems_of_usage(usage)
    found = "\n".join(problems_of_code(usage, resources.instructions(str(cubin), usage)))
    for problem in ("asynchronous copies", "streaming stores", "exponentials", "LDL|STL"):
        assert problem in found


def test_the_table_in_the_documentation(usages: list[Any]) -> None:
    """Registers in docs/cuda.md are those of the compiler that it names."""
    text = (ROOT / "docs" / "cuda.md").read_text()
    kernels = "row_kernel|cluster_kernel|transient_kernel|split_|multiply_"
    header = re.search(r"^\| registers a thread \|(.*)\|$", text, re.M)
    assert header
    table = text[header.start() :].split("\n\n")[0]
    rows = re.findall(rf"^\| `((?:{kernels}).*?>)` \|(.*)\|$", table, re.M)
    assert rows
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True) if NVCC else None
    if version is None or "V13.0.88" not in version.stdout:
        pytest.skip("the table is nvcc 13.0.88's")
    archs = [cell.strip() for cell in header[1].split("|")]
    registers = {(usage.kernel, usage.arch): usage.registers for usage in usages}
    for kernel, cells in rows:
        for arch, cell in zip(archs, cells.split("|"), strict=True):
            if cell.strip() and any(usage.arch == arch for usage in usages):
                assert registers[kernel, arch] == int(cell), (kernel, arch)
