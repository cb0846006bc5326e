"""Docstrings of this package, written to be read as text, as the API reference shows them."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


class AsMarkdown(griffe.Extension):
    """Roles become links, ``Example:`` a section of code, literal blocks Markdown's."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = ROLE.sub(lambda role: _link(role[1], obj), obj.docstring.value)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        # A paragraph that ends in "::" opens a literal block.
        text = re.sub(r"::\n\n(?=    )", ":\n\n", text)
        obj.docstring.value = text.replace("``", "`")


def _link(name: str, obj: griffe.Object) -> str:
    """To the name as the object's own module sees it."""
    if name.startswith("."):
        assert isinstance(obj.module.parent, griffe.Module)
        path = obj.module.parent.path + name
    elif name.startswith("cfpo_kernels."):
        path = name
    else:
        try:
            path = obj.resolve(name)
        except griffe.NameResolutionError:
            path = f"cfpo_kernels.{name}"
    return f"[`{name.lstrip('.')}`][{path}]"
