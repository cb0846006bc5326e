"""Parts of a page that a program makes, between two comments that name them."""

from __future__ import annotations


def with_part(text: str, name: str, made: str) -> str:
    """The text with `made`, which ends a line, in the place called `name`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SystemExit(f"there is no place for the part: {begin.strip()}")
    return before + begin + made + end + after
