"""What mkdocs does beside rendering docs/: pages from elsewhere, links that leave docs/, pictures.

- CONTRIBUTING.md and CHANGELOG.md become pages.
- A line ``<!-- README: Heading -->`` is replaced by that section of the README, and
  ``<!-- objectives -->`` by one section for each named objective, with its picture.
- Pictures under bench/results/ are copied; other links to files of the repository lead to
  ``repo_url``, or are plain text where none is set.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import objectives as drawn  # noqa: E402

PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PICTURES = "bench/results/"
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
README_SECTION = re.compile(r"^<!-- README: (.*) -->$", re.MULTILINE)
OBJECTIVES = "<!-- objectives -->"


def on_files(files: Files, config: Any) -> Files:
    for page, source in PAGES.items():
        text = _to_site((ROOT / source).read_text(), source, page, config)
        files.append(File.generated(config, page, content=text))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    for name, picture in drawn.pictures().items():
        files.append(File.generated(config, f"objectives/{name}.svg", content=picture))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    here = page.file.src_uri
    if here in PAGES:
        return markdown
    text = _to_site(markdown, f"docs/{here}", here, config)
    text = README_SECTION.sub(lambda found: _readme(found[1], here, config), text)
    return text.replace(OBJECTIVES, drawn.sections()) if OBJECTIVES in text else text


def _readme(heading: str, here: str, config: Any) -> str:
    sections = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")
    if len(sections) != 2:
        raise ValueError(f"README.md has no section {heading!r}")
    return _to_site(sections[1].split("\n## ")[0], "README.md", here, config)


def _to_site(text: str, source: str, here: str, config: Any) -> str:
    """The text of the repository's file `source`, with its links as those of the page `here`."""

    def moved(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["path"]))
        if path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif path in PAGES.values():
            target = next(page for page, file in PAGES.items() if file == path)
        elif path.startswith(PICTURES) and path.endswith(".png"):
            target = "results/" + path.removeprefix(PICTURES)
        elif config["repo_url"]:
            return f"[{found['text']}]({config['repo_url'].rstrip('/')}/blob/main/{path})"
        else:
            return found["text"]
        relative = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"{found['mark']}[{found['text']}]({relative}{found['anchor'] or ''})"

    # Snippets are left alone.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)
