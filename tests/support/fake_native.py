"""The native module of a machine that is not here."""

from __future__ import annotations

from typing import Any


class FakeNative:
    """A module with CUDA kernels for Hopper, on a machine with the given device."""

    cuda_built, cuda_archs, cuda_reason = True, "90a-real", ""

    def __init__(self, name: str, major: int, minor: int) -> None:
        self.device = {"name": name, "capability_major": major, "capability_minor": minor}

    def cuda_query(self) -> dict[str, Any]:
        return {"status": 0, "devices": [self.device]}

    def cpu_levels(self) -> list[str]:
        return ["baseline"]
