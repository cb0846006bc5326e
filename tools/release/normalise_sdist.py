"""Writes an sdist anew so that two builds of a commit are the same bytes.

setuptools keeps the times, modes and owner that files have on the machine that builds. Here all
have the time SOURCE_DATE_EPOCH (0 where that is not set), and nobody's name.
"""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
from pathlib import Path


def normalise(path: Path, epoch: int) -> None:
    packed = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=epoch) as compressed:
        compressed.write(packed.getvalue())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        normalise(Path(name), int(os.environ.get("SOURCE_DATE_EPOCH", "0")))
