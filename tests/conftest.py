from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # torch brings it
from ptx_tools.nvcc import NVCC

from cfpo_kernels import backends
from cfpo_kernels.backends import cpu

# test_ptx_wrappers.py says so.
collect_ignore = (
    []
    if NVCC is not None
    else [
        "backends/ptx/test_ptx_kernels.py",
        "backends/ptx/test_ptx_mutants.py",
    ]
)

LEVELS = tuple(cpu.native.cpu_levels()) if cpu.native is not None else ()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "level" in metafunc.fixturenames:
        only_cpu = metafunc.config.getoption("--backend") == "cpu"
        metafunc.parametrize("level", LEVELS if only_cpu else LEVELS[:1], indirect=True)
    if "emulated_cuda" in metafunc.fixturenames:
        targets: list[Any] = ["source"]
        if NVCC is not None:
            targets.append("ptx")
        if getattr(metafunc.module, "ON_GPU_TOO", False):
            targets.append(pytest.param("gpu", marks=pytest.mark.gpu))
        metafunc.parametrize("emulated_cuda", targets, indirect=True, scope="session")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=("cpu", "triton"),
        default="cpu",
        help="what backend='auto' and 'cpu' mean for CPU tensors; triton: interpreted",
    )
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly too")


def pytest_configure(config: pytest.Config) -> None:
    # What this machine's user has verified is not the tests' business, and the other way round.
    os.environ["CFPO_KERNELS_CACHE"] = tempfile.mkdtemp(prefix="cfpo-kernels-tests-")
    if cpu.native is None:
        raise pytest.UsageError(f"{cpu.import_failure}; `make test` builds it")
    if config.getoption("--backend") == "triton":
        from triton_tools.interpreter import INTERPRETING, mend

        if not INTERPRETING:
            raise pytest.UsageError("--backend triton needs TRITON_INTERPRET=1")
        mend()


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.config.getoption("--backend") != "triton" or "triton" in request.node.path.name:
        yield
        return
    from triton_tools.checker import checked_launches

    resolve = backends.resolve

    def to_triton(name: str, *of: Any, **how: Any) -> str:
        return "triton" if name in ("auto", "cpu") else resolve(name, *of, **how)

    monkeypatch.setattr(backends, "resolve", to_triton)
    # Every launch of every test: nothing outside the arguments, no races, nothing written twice.
    with checked_launches() as log:
        yield
    for launch in log.launches:
        for name in {view.name for view in launch.views} & {"loss_ptr", "logps_ptr", "dlogits_ptr"}:
            assert launch.writes(name).max() <= 1, (launch.kernel, name)


def parameter(item: pytest.Item, name: str) -> Any:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get(name) if callspec else None


def takes_too_long_interpreted(item: pytest.Item) -> bool:
    of_reference = "reference" in (parameter(item, "backend"), parameter(item, "name"))
    long_rows = (parameter(item, "v") or 0) > 130_000
    of_cpu = item.name.startswith("test_every_instruction_set")
    return of_reference or long_rows or of_cpu or "slow" in item.keywords


def is_for_the_night(item: pytest.Item, interpreted: bool) -> bool:
    if "nightly" in item.keywords:
        return True
    if not interpreted or "triton" in item.path.name:
        return False
    # The kernels convert float16 where they convert bfloat16; test_triton_interpreted looks at
    # each. And torch.compile stops at the operator, whichever kernel is behind it.
    of_compile = item.name.startswith("test_compile") and "aot_eager-loss" not in item.name
    return parameter(item, "dtype") == torch.float16 or of_compile


def is_in_other_runs(item: pytest.Item) -> bool:
    """Of what runs on PTX: the kernels of one type, and short rows, are enough for every commit."""
    parameters = getattr(item, "callspec", None) and item.callspec.params
    if not parameters or parameters.get("emulated_cuda") != "ptx":
        return False
    of_type = [x for x in parameters.values() if isinstance(x, torch.dtype)]
    of_type += [x.get("dtype") for x in parameters.values() if isinstance(x, dict)]
    return any(dtype is not torch.bfloat16 for dtype in of_type) or not of_type


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = config.getoption("--backend") == "triton"
    for item in items:
        if is_in_other_runs(item):
            item.add_marker(pytest.mark.nightly)
    dropped = {item for item in items if interpreted and takes_too_long_interpreted(item)}
    if not config.getoption("--nightly"):
        dropped |= {item for item in items if is_for_the_night(item, interpreted)}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once for each instruction set that this machine has."""
    monkeypatch.setenv("CFPO_KERNELS_CPU_LEVEL", request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models that are small enough are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes that run the tests; what is built there is built under a lock."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root


@pytest.fixture(scope="session")
def interpreter(shared_folder: Path) -> Path:
    """The library that runs PTX."""
    from ptx_tools.build import build_library

    with FileLock(shared_folder / "interpreter.lock"):
        return build_library(shared_folder / "interpreter")


@pytest.fixture(scope="session")
def ptx_check(shared_folder: Path) -> Path:
    """The program of emulated_check.cpp, which $CFPO_PTX makes run PTX."""
    from ptx_tools.build import build_check

    with FileLock(shared_folder / "ptx_check.lock"):
        return build_check(shared_folder / "ptx_check")


@pytest.fixture(scope="session")
def ptx(shared_folder: Path) -> Any:
    """Compiles to PTX."""
    from ptx_tools.nvcc import Compiler

    return Compiler(shared_folder / "ptx")


@pytest.fixture(scope="session")
def emulated_cuda(request: pytest.FixtureRequest, shared_folder: Path) -> Any:
    """The CUDA kernels on the CPU, as `pytest_generate_tests` says: their source, built by g++, or
    the PTX that nvcc makes of it, interpreted. None for a GPU."""
    from emulation import load_module

    if request.param == "gpu":
        return None
    with FileLock(shared_folder / "emulated.lock"):
        module = load_module(shared_folder / "emulated")
    if request.param == "ptx":
        module.use_ptx(request.getfixturevalue("ptx").text_of)
    else:
        module.use_source()
    return module
