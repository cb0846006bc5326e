from __future__ import annotations

import pytest
from heads import use_slices


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    use_slices(monkeypatch, 64)
