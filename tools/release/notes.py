"""Prints the changelog's section of a tag, for the text of a release.

It fails where the tag is not the version in pyproject.toml, or the changelog has no such section.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def version() -> str:
    # Not tomllib, which Python 3.10 lacks.
    found = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def section(wanted: str) -> str:
    """The text under ``## [wanted] - date``."""
    text = (ROOT / "CHANGELOG.md").read_text()
    heading = rf"^## \[{re.escape(wanted)}\] - \d{{4}}-\d\d-\d\d\n"
    found = re.search(rf"{heading}(.*?)(?=^## \[|\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise SystemExit(f"CHANGELOG.md has no section '## [{wanted}] - DATE'")
    return found[1].strip()


def main(tag: str) -> None:
    if tag != f"v{version()}":
        raise SystemExit(f"the tag is {tag}, pyproject.toml says {version()}")
    print(section(version()))


if __name__ == "__main__":
    main(sys.argv[1])
