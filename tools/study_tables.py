"""The tables and pictures of docs/study.md, made from the runs under bench/results/.

python -m bench.study --json bench/results/DEVICE-study-DATE.json   # makes the runs
python tools/study_tables.py                                 # prints the tables
python tools/study_tables.py --write                         # puts them into the page, and draws
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from marked import with_part  # noqa: E402

from bench.study import findings, pictures  # noqa: E402

PAGE = ROOT / "docs" / "study.md"
(RESULTS,) = (ROOT / "bench" / "results").glob("*-study-*.json")


def with_tables(text: str, report: dict[str, Any]) -> str:
    """The page with each table in its place."""
    for name, table in findings.markdown(report).items():
        text = with_part(text, name, f"{table}\n")
    return text


def main(arguments: list[str]) -> None:
    report = json.loads(RESULTS.read_text())
    if arguments == ["--write"]:
        PAGE.write_text(with_tables(PAGE.read_text(), report))
        pictures.save(report, RESULTS.with_suffix(".png"))
    else:
        for name, table in findings.markdown(report).items():
            print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
