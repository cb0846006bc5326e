"""Where things are, whatever folder a test is in."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"  # on the path of every test, and of the processes that some start
GOLDEN = TESTS / "golden"
