from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # torch brings it
from ptx_tools.nvcc import NVCC
from targets import GPUS, LEVELS, NAMES, TARGETS, Target

from cfpo_kernels.backends import cpu

# test_ptx_wrappers.py says so.
collect_ignore = (
    []
    if NVCC is not None
    else ["backends/ptx/test_ptx_kernels.py", "backends/ptx/test_ptx_mutants.py"]
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--target",
        action="append",
        metavar="NAME",
        help="where tests that have targets run, here or not; the name may be a pattern",
    )
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly too")


def pytest_configure(config: pytest.Config) -> None:
    # What this machine's user has verified is not the tests' business, and the other way round.
    os.environ["CFPO_KERNELS_CACHE"] = tempfile.mkdtemp(prefix="cfpo-kernels-tests-")
    if cpu.native is None:
        raise pytest.UsageError(f"{cpu.import_failure}; `make test` builds it")
    for pattern in config.getoption("--target") or ():
        if not matching((pattern,), *TARGETS):
            raise pytest.UsageError(f"no target is called {pattern!r}: {', '.join(TARGETS)}")


# --- Targets: see support/targets.py -----------------------------------------------------------


def matching(patterns: tuple[str, ...], *names: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "level" in metafunc.fixturenames:
        metafunc.parametrize("level", LEVELS, indirect=True)
    if "target_name" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--target")
        names = [
            pytest.param(name, marks=pytest.mark.gpu if name in GPUS else ())
            for name, target in TARGETS.items()
            if (matching(wanted, name) if wanted else not target.why_not)
        ]
        # All of one target together: its PTX is parsed once.
        metafunc.parametrize("target_name", names, indirect=True, scope="session")


def check_marks(item: pytest.Item) -> None:
    for kind in ("not_on", "only_on", "nightly_on"):
        for mark in item.iter_markers(kind):
            known = mark.args and all(matching((x,), *NAMES) for x in mark.args)
            if not known or not mark.kwargs.get("reason") or "target_name" not in item.fixturenames:
                raise pytest.UsageError(
                    f"{item.nodeid}: the mark {kind} takes names of targets and a reason, on tests "
                    f"that have targets; got {kind}{mark.args} {mark.kwargs}"
                )


def is_left_out(item: pytest.Item, target: Target, parameters: dict[str, Any]) -> bool:
    return (
        any(matching(mark.args, target.name) for mark in item.iter_markers("not_on"))
        or not all(matching(mark.args, target.name) for mark in item.iter_markers("only_on"))
        or (parameters.get("v") or 0) > target.longest
    )


def is_for_the_night(item: pytest.Item, target: Target, parameters: dict[str, Any]) -> bool:
    marked = any(matching(mark.args, target.name) for mark in item.iter_markers("nightly_on"))
    return marked or not target.every_commit(parameters)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = set()
    for item in items:
        check_marks(item)
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if target := TARGETS.get(parameters.get("target_name")):
            if is_left_out(item, target, parameters):
                dropped.add(item)
            elif is_for_the_night(item, target, parameters):
                item.add_marker(pytest.mark.nightly)
        if "nightly" in item.keywords and not config.getoption("--nightly"):
            dropped.add(item)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session")
def target_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def target(target_name: str, request: pytest.FixtureRequest) -> Iterator[Target]:
    """What runs the kernels; the test runs once for each."""
    chosen = TARGETS[target_name]
    if chosen.why_not:
        pytest.skip(chosen.why_not)
    with chosen.running(request):
        yield chosen


# --- What others need --------------------------------------------------------------------------


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
def emulated_cuda(shared_folder: Path) -> Any:
    """The CUDA kernels on the CPU; a target has them run their source, or their PTX."""
    from emulation import load_module

    with FileLock(shared_folder / "emulated.lock"):
        return load_module(shared_folder / "emulated")
