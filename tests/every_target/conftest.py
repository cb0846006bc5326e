from __future__ import annotations

import pytest
from targets import Target


@pytest.fixture(autouse=True)
def _every_test_has_a_target(target: Target) -> None:
    """So none of this folder can be forgotten for one; marks leave tests out, with a reason."""
