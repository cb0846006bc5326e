"""Links within the documentation lead somewhere, and so do the pages that sources name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
SOURCES = ("*.py", "*.pyi", "*.h", "*.cuh", "*.cpp", "*.cu", "*.toml", "Makefile")
FOLDERS = ("cfpo_kernels", "csrc", "triton_kernels", "tests", "tools", "bench", "examples")


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4,}\S.*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings: lower case, words by hyphens, without punctuation."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        # The second of two equal headings has a number.
        found.add(words if words not in found else f"{words}-1")
    return found


def broken_links(page: Path) -> Iterator[str]:
    for groups in LINK.findall(prose(page)):
        link = next(filter(None, groups))
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page, r = 1\n[a](#a-page-r--1) [b](page.md) [c](https://example.org/page)\n"
        "[d](other.md) [e](#page) [f](page.md#a-page)\n[g]: ../none.md\n"
        "```\n# no heading\n[h](none.md)\n```\n[i](#no-heading)\n"
    )
    found = [link.partition(":")[0] for link in broken_links(page)]
    assert found == ["other.md", "#page", "page.md#a-page", "../none.md", "#no-heading"]


def test_pages_that_sources_name() -> None:
    files = [file for folder in FOLDERS for kind in SOURCES for file in (ROOT / folder).rglob(kind)]
    named = {
        page: file
        for file in files
        for page in re.findall(r"(?<![\w/])docs/[\w-]+\.md", file.read_text())
    }
    assert len(named) > 3
    assert [(page, str(file)) for page, file in named.items() if not (ROOT / page).exists()] == []
