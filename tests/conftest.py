from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cfpo_kernels.backends import cpu

LEVELS = tuple(cpu.native.cpu_levels())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once for each instruction set that this machine has."""
    monkeypatch.setenv("CFPO_KERNELS_CPU_LEVEL", request.param)
    return str(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
