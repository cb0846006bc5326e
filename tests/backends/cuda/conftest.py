from __future__ import annotations

from typing import Any

import pytest
from emulation import HOPPER
from targets import Target


@pytest.fixture
def module(target: Target, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emulated module, as a device with clusters of up to eight blocks."""
    monkeypatch.delenv("CFPO_KERNELS_CUDA_KERNEL", raising=False)
    target.module.set_device(*HOPPER)
    target.module.set_largest_cluster(8)
    return target.module
