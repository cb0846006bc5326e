"""Launching and asking devices, on a CUDA runtime that only says what it was called for.

tests/cpp/launch_check.cpp does what it is told and prints each call of the runtime, results ("=")
and exceptions ("!"). Every run starts with empty caches.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from emulation import CXX, compile_cpp
from ptx_tools.nvcc import MISSING, NVCC
from repository import ROOT

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")

CUDA, CPP = ROOT / "csrc" / "cuda", ROOT / "tests" / "cpp"
FAKE = CPP / "fake_runtime"
FLAGS = ["-iquote", str(FAKE), f"-I{FAKE}", "-Wno-unused-function"]
LAUNCH = CUDA / "launch.cu"

Run = Callable[..., list[str]]


def compile_part(source: Path, output: Path, *flags: str) -> Path:
    compile_cpp(source, output, "-c", *flags, *FLAGS, optimise="-O0")
    return output


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All but launch.cu."""
    folder = tmp_path_factory.mktemp("launch")
    sources = (CPP / "launch_check.cpp", CUDA / "device_query.cu", CUDA / "plan.cpp")
    return [str(compile_part(source, folder / f"{source.name}.o")) for source in sources]


def link(objects: list[str], launch: Path, folder: Path) -> Run:
    program = folder / "launch_check"
    part = compile_part(launch, folder / "launch.o")
    subprocess.run([CXX, *objects, str(part), "-o", str(program)], check=True)

    def run(*commands: str) -> list[str]:
        done = subprocess.run(
            [str(program), *commands], capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture(scope="module")
def run(objects: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return link(objects, LAUNCH, tmp_path_factory.mktemp("program"))


RELAX, RESTORE = (f"cudaThreadExchangeStreamCaptureMode({mode})" for mode in (2, 0))
CLEAN = "left: cudaSuccess, capture mode 0"
FIRST_LAUNCH = [
    RELAX,
    "cudaSetDevice(0)",
    "cudaDeviceGetAttribute(97, 0)",
    "cudaFuncSetAttribute(kernel 0, 8, 232448)",
    "cudaFuncSetAttribute(kernel 0, 9, 100)",
    RESTORE,
    "cudaLaunchKernelEx(kernel 0, grid 7x3x1, block 128x1x1, 1024 bytes, stream 5)",
]
LATER_LAUNCH = ["cudaSetDevice(0)", FIRST_LAUNCH[-1]]
LIMITS = [
    RELAX,
    *(f"cudaDeviceGetAttribute({name}, 0)" for name in (16, 97, 81, 120)),
    "cudaSetDevice(0)",
    "cudaFuncGetAttributes()",
    RESTORE,
    "= 132 232448 233472 1",
]


def test_kernels_are_prepared_once_for_each_device(run: Run) -> None:
    assert run("launch:A", "launch:A") == [*FIRST_LAUNCH, *LATER_LAUNCH, CLEAN]
    everywhere = run("launch:A", "device=1", "launch:A", "launch:B", "device=0", "launch:B")
    prepared = [line for line in everywhere if line.startswith("cudaFuncSetAttribute")]
    assert len(prepared) == 2 * 4
    devices = [line for line in everywhere if line.startswith("cudaSetDevice")]
    assert devices == [f"cudaSetDevice({device})" for device in (0, 1, 1, 0)]


def test_limits_are_asked_for_once(run: Run) -> None:
    assert run("limits", "limits") == [*LIMITS, LIMITS[-1], CLEAN]
    assert run("launches_clusters=0", "limits")[-2] == "= 132 232448 233472 0"
    assert run("ptx_version=80", "limits")[-2] == "= 132 232448 233472 0", "no code for them"


COUNT = [
    *FIRST_LAUNCH[:-1],
    RELAX,
    "cudaOccupancyMaxActiveClusters(kernel 0, grid 4x1x1, block 512x1x1, 200000 bytes, "
    "stream 0, cluster 4x1x1)",
    RESTORE,
    "= 16",
]


def test_clusters_are_counted_once(run: Run) -> None:
    assert run("count:A", "count:A") == [*COUNT, "cudaSetDevice(0)", "= 16", CLEAN]


# What each command calls the first time, and later.
TRACES = {
    "limits": (LIMITS, LIMITS[-1:]),
    "launch:A": (FIRST_LAUNCH, LATER_LAUNCH),
    "count:A": (COUNT, ["cudaSetDevice(0)", "= 16"]),
}
CALLS = [
    (command, i)
    for command, (first, _) in TRACES.items()
    for i, line in enumerate(first)
    if line.startswith("cuda") and line != RESTORE
]


@pytest.mark.parametrize(("command", "at"), CALLS)
def test_every_failure_is_told_and_forgotten(run: Run, command: str, at: int) -> None:
    """And what did not succeed is tried again."""
    first, later = TRACES[command]
    names = [line.split("(")[0] for line in first[: at + 1]]
    succeed = [f"fail:{names[-1]}=cudaSuccess"] * names[:-1].count(names[-1])
    got = run(*succeed, f"fail:{names[-1]}=cudaErrorInvalidValue", command, command, command)

    message = next(line for line in got if line.startswith("!"))
    assert message.startswith("! RuntimeError: cfpo_kernels: ")
    what = "(a query|a kernel's attributes)" if command == "limits" else "kernel_a"
    assert re.search(f" {what} on device 0 \\(A Device\\) failed: ", message)
    assert message.endswith(" failed: cudaErrorInvalidValue: what it means")
    relaxed = first[:at].count(RELAX) > first[:at].count(RESTORE)
    failed = [
        *first[:at],
        f"{first[at]} = cudaErrorInvalidValue",
        "cudaGetDeviceProperties(0)",
        "cudaGetLastError()",
        *([RESTORE] if relaxed else []),
        message,
    ]
    prepared = first.index(RESTORE)
    again = first if at <= prepared else ["cudaSetDevice(0)", *first[prepared + 1 :]]
    assert got == [*failed, *again, *later, CLEAN]


def test_an_error_that_cannot_be_forgotten_stays(run: Run) -> None:
    got = run("fail:cudaLaunchKernelEx=cudaErrorIllegalAddress", "launch:A")
    assert got[-2].endswith("failed: cudaErrorIllegalAddress: what it means")
    assert got[-1] == "left: cudaErrorIllegalAddress, capture mode 0"


def test_a_device_that_does_not_tell_its_name(run: Run) -> None:
    """What goes wrong while a failure is described is forgotten with it."""
    broken = "fail:cudaGetDeviceProperties=cudaErrorInvalidDevice"
    got = run("fail:cudaLaunchKernelEx=cudaErrorInvalidValue", broken, "launch:A")
    assert "launching kernel_a on device 0 failed: cudaErrorInvalidValue" in got[-2]
    assert got[-1] == CLEAN


def test_a_mode_that_cannot_be_restored(run: Run) -> None:
    name = "fail:cudaThreadExchangeStreamCaptureMode="
    got = run(name + "cudaSuccess", name + "cudaErrorInvalidValue", "launch:A")
    assert got[-1] == "left: cudaSuccess, capture mode 2"
    assert not any(line.startswith("!") for line in got)


@pytest.mark.skipif(NVCC is None, reason=MISSING)
def test_the_numbers_are_those_of_cuda(tmp_path: Path) -> None:
    header = (FAKE / "cuda_runtime.h").read_text()
    numbers = re.findall(r"\b(cuda\w+) = (\d+)[,\n ]", header)
    assert len(numbers) > 20
    source = tmp_path / "numbers.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n"
        + "".join(f'static_assert({name} == {number}, "");\n' for name, number in numbers)
    )
    output = ("-o", str(tmp_path / "numbers.o"))
    done = subprocess.run(
        [NVCC, "-c", str(source), *output], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr


def launches(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("cudaLaunchKernelEx")]


@pytest.mark.parametrize("command", ["limits", "launch:A", "count:A", "loss:8192,128256"])
def test_a_first_call_may_be_captured(run: Run, command: str) -> None:
    got = run("capturing", command)
    assert got == run(command)
    assert got[-1] == CLEAN
    for i, line in enumerate(got):
        if line.startswith("cudaLaunchKernelEx"):
            assert got[:i].count(RELAX) == got[:i].count(RESTORE), "the kernel is part of the graph"


@pytest.mark.parametrize("shape", ["8192,1000", "8192,32000", "8192,151936", "1,151936"])
@pytest.mark.parametrize(
    ("what", "kernel"),
    [
        ("loss", "auto"),
        ("loss", "portable"),
        ("loss", "cluster"),
        ("loss", "transient"),
        ("loss", "auto-transient"),
        ("score", "auto"),
        ("backward", "auto"),
        ("multiply", "auto"),
    ],
)
def test_a_later_step_does_nothing_but_launch(run: Run, what: str, kernel: str, shape: str) -> None:
    """No memory, no synchronisation, no number read back: so a graph of it may be replayed."""
    step = f"{what}:{shape}"
    first = run(f"row_kernel:{kernel}", step)
    assert first[-1] == CLEAN and not any(line.startswith("!") for line in first)
    assert 1 <= len(launches(first)) <= 2
    clusters = [line for line in launches(first) if "cluster" in line]
    assert len(clusters) == 1 or kernel not in ("cluster", "transient")
    assert not clusters or what == "loss"
    got = run(f"row_kernel:{kernel}", step, "capturing", step)
    later = got[len(first) - 1 : -1]
    assert launches(later) == launches(first)
    others = [line for line in later if line not in launches(later)]
    assert set(others) == {"cudaSetDevice(0)"}


@pytest.mark.parametrize(("v", "cluster"), [(25600, 1), (50257, 2), (151936, 8)])
def test_clusters_are_launched_as_clusters(run: Run, v: int, cluster: int) -> None:
    """Also those of one block: without the attribute messages and barriers would be others."""
    got = run(f"loss:8192,{v}", "launches_clusters=0", "device=1", f"loss:8192,{v}")
    first, second = launches(got)
    assert first.endswith(f"cluster {cluster}x1x1)")
    assert f"grid {16 * cluster}x1x1" in first
    assert "cluster" not in second


@pytest.mark.parametrize(("v", "cluster"), [(32000, 2), (151936, 8)])
def test_each_row_has_a_transient_cluster(run: Run, v: int, cluster: int) -> None:
    wanted = "row_kernel:auto-transient"
    got = run(wanted, f"loss:8192,{v}", "launches_clusters=0", "device=1", f"loss:8192,{v}")
    first, second = launches(got)
    assert first.endswith(f"cluster {cluster}x1x1)")
    assert f"grid {8192 * cluster}x1x1" in first
    assert "cluster" not in second


NO_ROOM = (
    "fail:cudaOccupancyMaxActiveClusters=cudaErrorInvalidClusterSize",
    "fail:cudaOccupancyMaxActiveClusters=cudaErrorInvalidConfiguration",
    "fail:cudaOccupancyMaxActiveClusters=cudaErrorLaunchOutOfResources",
    "clusters=0",
)


@pytest.mark.parametrize("answer", NO_ROOM)
def test_a_device_without_room_for_clusters(run: Run, answer: str) -> None:
    for kernel in ("auto", "auto-transient"):
        got = run(answer, f"row_kernel:{kernel}", "loss:8192,128256", "loss:8192,128256")
        assert len(launches(got)) == 2 and not any("cluster" in line for line in launches(got))
        assert len([line for line in got if line.startswith("cudaOccupancy")]) == 1
        assert got[-1] == CLEAN
    for kernel in ("cluster", "transient"):
        got = run(answer, f"row_kernel:{kernel}", "loss:8192,128256")
        assert got[-2].startswith(f"! ValueError: CFPO_KERNELS_CUDA_KERNEL is '{kernel}'")
        assert "no room for clusters of 8 blocks" in got[-2]
        assert not launches(got)


ALLOWED = "cudaFuncSetAttribute(kernel 0, 14, 1)"  # clusters that are not portable
LONG = "loss:8192,300000"


def test_clusters_that_are_not_portable(run: Run) -> None:
    """Of 16 blocks, for rows that need them; allowed before they are counted, and once."""
    got = run("clusters=7", LONG, LONG)
    assert [line.endswith("cluster 16x1x1)") for line in launches(got)] == [True, True]
    assert all("grid 112x1x1" in line for line in launches(got))
    asked = next(i for i, line in enumerate(got) if line.startswith("cudaOccupancy"))
    assert got.count(ALLOWED) == 1 and got.index(ALLOWED) == asked - 1
    assert ALLOWED not in run("loss:8192,128256")


@pytest.mark.parametrize(
    "answer",
    [
        *NO_ROOM,
        "clusters=6",  # a quarter of the SMs, and more, would be idle
        *(
            f"fail:cudaFuncSetAttribute={error}"
            for error in ("cudaErrorInvalidValue", "cudaErrorNotSupported")
        ),
    ],
)
def test_a_device_without_room_for_16_blocks(run: Run, answer: str) -> None:
    before = ["fail:cudaFuncSetAttribute=cudaSuccess"] * 2 if "SetAttribute" in answer else []
    got = run(*before, answer, LONG, LONG)
    assert len(launches(got)) == 2 and not any("cluster" in line for line in launches(got))
    assert len([line for line in got if line.startswith(ALLOWED)]) == 1
    assert got[-1] == CLEAN


def test_the_longest_row_that_is_split(run: Run) -> None:
    """A grid has at most 65535 blocks in its second dimension, 8 segments each."""
    columns = 65535 * 8 * 1024
    got = launches(run(f"loss:1,{columns}"))
    assert len(got) == 2 and all("grid 1x65535x1" in line for line in got)
    got = run(f"loss:1,{columns + 1}")
    assert "! ValueError: a row of 524281 segments is too long" in got[-2]
    assert not launches(got)


def test_a_driver_that_is_too_old(run: Run) -> None:
    error = "fail:cudaGetDeviceCount=cudaErrorInsufficientDriver"
    name = "= 35 cudaErrorInsufficientDriver: "
    *_, text, devices, left = run(error, "driver_version=12040", "query")
    assert text == (
        name + "the driver is for CUDA 12.4; CUDA 13.0, which this build has, needs driver 580 "
        "or newer"
    )
    assert (devices, left) == ("= 0 devices", CLEAN)
    text = run(error, "driver_version=0", "query")[-3]
    assert text.startswith(name + "there is no NVIDIA driver; CUDA 13.0, which this build has, ")
    text = run(error, "driver_version=12080", "runtime_version=12090", "query")[-3]
    assert text.endswith("CUDA 12.9, which this build has, needs driver 525 or newer")
    text = run("fail:cudaGetDeviceCount=cudaErrorNoDevice", "query")[-3]
    assert text == "= 100 cudaErrorNoDevice: what it means"
    assert run("query")[-3:] == ["= 0 cudaSuccess: what it means", "= 1 devices", CLEAN]


class Mutant(NamedTuple):
    line: str
    planted: str
    found: Callable[[Run], None]  # by a test that fails
    file: str = "launch.cu"


MUTANTS = {
    "an error is left behind": Mutant(
        "  cudaGetLastError();\n  throw", "  throw",
        lambda run: test_every_failure_is_told_and_forgotten(run, "launch:A", 6),
    ),
    "an error of a query is left behind": Mutant(
        "    cudaGetLastError();\n    count = 0;", "    count = 0;",
        lambda run: test_a_device_without_room_for_clusters(run, NO_ROOM[0]),
    ),
    "the mode of capture is not restored": Mutant(
        "    if (cudaThreadExchangeStreamCaptureMode(&mode_) != cudaSuccess) cudaGetLastError();\n",
        "", lambda run: test_every_failure_is_told_and_forgotten(run, "count:A", 7),
    ),
    "the mode of capture is not relaxed": Mutant(
        "= cudaStreamCaptureModeRelaxed", "= cudaStreamCaptureModeGlobal",
        lambda run: test_a_first_call_may_be_captured(run, "launch:A"),
    ),
    "clusters are counted in the mode of capture": Mutant(
        "  const OutsideCapture outside(name, device);\n  int count = 0;", "  int count = 0;",
        lambda run: test_a_first_call_may_be_captured(run, "count:A"),
    ),
    "no room is a failure": Mutant(
        "if (too_large(status))", "if (false && too_large(status))",
        lambda run: test_a_device_without_room_for_clusters(run, NO_ROOM[0]),
    ),
    "clusters that are not portable are not allowed": Mutant(
        "if (grid.cluster > kPortableCluster)", "if (grid.cluster > 16)",
        lambda run: test_clusters_that_are_not_portable(run),
    ),
    "a kernel is taken for ready that is not": Mutant(
        "  choose_device(name, device);\n  // The", "  choose_device(name, device);\n"
        "  ready.insert({kernel, device});\n  // The",
        lambda run: test_every_failure_is_told_and_forgotten(run, "launch:A", 3),
    ),
    "a kernel is prepared each time": Mutant(
        "  ready.insert({kernel, device});\n", "", test_kernels_are_prepared_once_for_each_device,
    ),
    "a kernel is prepared on one device": Mutant(
        "ready.count({kernel, device})", "ready.count({kernel, 0})",
        test_kernels_are_prepared_once_for_each_device,
    ),
    "one block is launched without a cluster": Mutant(
        "grid.cluster > 0 ? 1 : 0", "grid.cluster > 1 ? 1 : 0",
        lambda run: test_clusters_are_launched_as_clusters(run, 25600, 1), "launch_cuda.h",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(name: str, objects: list[str], tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    text = (CUDA / mutant.file).read_text()
    assert text.count(mutant.line) == 1, f"{mutant.file} no longer has {mutant.line!r} once"
    planted = tmp_path / "cuda" / mutant.file
    planted.parent.mkdir()
    planted.write_text(text.replace(mutant.line, mutant.planted))
    launch = LAUNCH
    if planted.suffix == ".cu":
        launch = planted
    else:  # found before the project's own
        check = tmp_path / "launch_check.o"
        compile_part(CPP / "launch_check.cpp", check, "-iquote", str(tmp_path))
        objects = [str(check), *objects[1:]]
    run = link(objects, launch, tmp_path)
    with pytest.raises(AssertionError):
        mutant.found(run)
