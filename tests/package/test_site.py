"""The pages of the docs site: every public name is on one, messages are those of the source.

``make docs`` builds the site, and refuses broken links, anchors and cross-references.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from repository import ROOT

import cfpo_kernels
from cfpo_kernels.objectives import OBJECTIVES

DOCS = ROOT / "docs"
OWN_TESTS = {
    "add-an-objective.md": "tests/package/test_add_an_objective.py",
    "numbers.md": "tests/package/test_site.py",
    "trainers.md": "tests/trainers/test_megatron_recipe.py",
}
# Of torch, not of this package.
TORCHS = "one of the variables needed for gradient computation has been modified"


def fences(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def test_every_public_name_is_in_the_reference() -> None:
    named = {
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: cfpo_kernels\.([\w.]+)$", page.read_text(), re.MULTILINE)
    }
    assert set(cfpo_kernels.__all__) - named == set()


def strings(source: str) -> Iterator[str]:
    """Literal texts, with a NUL where an f-string says something else."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def missing(page: str, texts: list[str]) -> list[str]:
    """Headings that are messages, and parts of which no text holds in their order."""
    found = []
    for heading in re.findall(r"^### `(.*)`$", page, re.MULTILINE):
        parts = [part.strip() for part in heading.split("...") if part.strip()]
        message = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        if not any(message.search(text) for text in texts):
            found.append(heading)
    return found


def test_messages_are_those_of_the_source() -> None:
    sources = (ROOT / "cfpo_kernels").rglob("*.py")
    texts = [text for source in sources for text in strings(source.read_text())]
    page = (DOCS / "troubleshooting.md").read_text()
    assert page.count("\n### `") > 20
    assert [heading[: len(TORCHS)] for heading in missing(page, texts)] == [TORCHS]


def test_a_wrong_message_is_noticed() -> None:
    texts = list(strings('raise ValueError(f"epsilon must be positive, got {x}:" " see paper")'))
    page = "### `epsilon must be positive, got ... see paper`\n### `epsilon must be small`\n"
    assert missing(page, texts) == ["epsilon must be small"]


def test_the_first_loss() -> None:
    (text,) = fences(DOCS / "index.md")
    names: dict[str, object] = {}
    exec(compile(text, "index.md", "exec"), names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor) and logits.grad is not None
    assert logits.grad[1, 1].abs().max() > 0 and logits.grad[1, 2].abs().max() == 0


def test_every_snippet_has_a_test() -> None:
    with_snippets = {page.name for page in DOCS.rglob("*.md") if fences(page)}
    assert with_snippets == {"index.md", *OWN_TESTS}
    assert all((ROOT / test).exists() for test in OWN_TESTS.values())


@pytest.mark.parametrize("snippet", fences(DOCS / "numbers.md"), ids=lambda text: text[:30])
@pytest.mark.nightly
def test_snippets_behind_numbers_run(snippet: str) -> None:
    exec(compile(snippet, "numbers.md", "exec"), {"__name__": "snippet"})


def test_pictures_show_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "site"))
    import objectives

    assert sorted(objectives.ORDER) == sorted(OBJECTIVES)
    near = (objectives.RATIOS - 1).abs().argmin()
    for name in ("cfpo", "ppo_clip"):
        for advantage in (1.0, -1.0):
            _, push = objectives.curves(name, advantage)
            assert push[near].item() == pytest.approx(advantage, abs=0.03)
    far = objectives.RATIOS > 1.21
    assert (objectives.curves("cfpo", 1.0)[1][far] < 0).all()
    assert (objectives.curves("ppo_clip", 1.0)[1][far] == 0).all()
    assert objectives.picture("dppo").count("<path") > 10
