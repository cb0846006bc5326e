"""The documentation: links lead somewhere, and what is public has examples, which are right.

The examples of bounds, sequences, rollout_weights and preference are run by their own tests.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plain_torch import examples_of
from repository import ROOT

import cfpo_kernels
from cfpo_kernels.objectives import OBJECTIVES, Objective

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
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


PUBLIC = {name: getattr(cfpo_kernels, name) for name in cfpo_kernels.__all__}
PUBLIC = {name: thing for name, thing in PUBLIC.items() if not inspect.ismodule(thing)}
PUBLIC["Objective"] = Objective
# It verifies this machine's CPU kernels, which takes a minute; test_verification_process does too.
LONG = [pytest.param(name, marks=pytest.mark.nightly) for name in ("verify",)]


@pytest.mark.parametrize("name", [*sorted(PUBLIC.keys() - {"verify"}), *LONG])
def test_examples(name: str) -> None:
    thing = PUBLIC[name]
    if name == "register_triton_objective":
        pytest.importorskip("triton")
    known = vars(inspect.getmodule(thing)) | PUBLIC | {"cfpo_kernels": cfpo_kernels}
    assert thing.__name__ in examples_of(thing, known), "has no example"


def test_a_wrong_example_is_noticed() -> None:
    def doubled(x: int) -> int:
        """Twice x.

        >>> doubled(2)
        5
        """
        return 2 * x

    with pytest.raises(AssertionError, match="doubled"):
        examples_of(doubled, {"doubled": doubled})


def missing(thing: Any) -> list[str]:
    """Parameters that a docstring does not name, unless it says where the others are named."""
    text = inspect.getdoc(thing) or ""
    if re.search(r"^ *(others|Args\b.*): see", text, re.M):
        return []
    names = [name for name in inspect.signature(thing).parameters if name != "self"]
    return [name for name in names if not re.search(rf"^ *[\w, *]*\b{name}\b[\w, *]*:", text, re.M)]


def test_docstrings_name_every_parameter() -> None:
    things = [x for x in PUBLIC.values() if inspect.isfunction(x)]
    things += [*OBJECTIVES.values(), cfpo_kernels.CFPOLoss, cfpo_kernels.CFPOLoss.forward]
    modules = (cfpo_kernels.bounds, cfpo_kernels.sequences, cfpo_kernels.preference)
    for module in modules:
        things += [
            x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__
        ]
    assert len(things) > 40
    found = {thing.__qualname__: missing(thing) for thing in things if thing.__name__[0] != "_"}
    assert {name: names for name, names in found.items() if names} == {}
