from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cfpo_kernels import backends
from cfpo_kernels.backends import cpu

LEVELS = tuple(cpu.native.cpu_levels()) if cpu.native is not None else ()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "level" in metafunc.fixturenames:
        only_cpu = metafunc.config.getoption("--backend") == "cpu"
        metafunc.parametrize("level", LEVELS if only_cpu else LEVELS[:1], indirect=True)


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = config.getoption("--backend") == "triton"
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
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA kernels built for the CPU; once, also where several processes run the tests."""
    from emulation import load_module
    from filelock import FileLock  # torch brings it

    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    with FileLock(root / "emulated.lock"):
        return load_module(root / "emulated")
