"""Checks wheels before they are handed out; `make wheel` and cibuildwheel end with it.

    python tools/check_wheel.py dist/*.whl

Prints each wheel's name and size, and what is wrong with it. Needs pyelftools, not the package.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from elftools.elf.elffile import ELFFile

PACKAGE = "cfpo_kernels"
LICENSES = ("LICENSE", "THIRD_PARTY_LICENSES")
MAX_BYTES = 10_000_000
# What every Linux that runs torch has. No libcudart: it is linked in, so that the module imports
# without CUDA. libgomp by its plain name: a renamed copy of it would be a second OpenMP runtime.
SYSTEM_LIBRARIES = {
    "ld-linux-aarch64.so.1",
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libgomp.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}


def module_faults(file: BinaryIO) -> Iterator[str]:
    """What keeps a native module from loading elsewhere as it does here."""
    dynamic = ELFFile(file).get_section_by_name(".dynamic")
    for tag in dynamic.iter_tags() if dynamic else ():
        if tag.entry.d_tag == "DT_NEEDED" and tag.needed not in SYSTEM_LIBRARIES:
            yield f"needs {tag.needed}"
        elif tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
            yield f"searches {tag.rpath if tag.entry.d_tag == 'DT_RPATH' else tag.runpath}"


def wheel_faults(path: Path) -> Iterator[str]:
    """What is wrong with a wheel; nothing if it can be handed out."""
    if "manylinux" not in path.name:
        yield "its platform tag is not manylinux: repair it with auditwheel"
    if (size := path.stat().st_size) >= MAX_BYTES:
        yield f"{size} bytes are not less than {MAX_BYTES}"
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        info = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
        for name in names:
            if name.split("/")[0] not in (PACKAGE, info):
                yield f"{name} is outside the package"
        for license_file in LICENSES:
            if f"{info}/licenses/{license_file}" not in names:
                yield f"{license_file} is missing"
        modules = [name for name in names if ".so" in Path(name).suffixes]
        if len(modules) != 1:
            yield f"it should hold one native module, not {modules}"
        for name in modules:
            yield from (f"{name} {fault}" for fault in module_faults(io.BytesIO(wheel.read(name))))


def main() -> int:
    wheels = [Path(argument) for argument in sys.argv[1:]]
    if not wheels:
        raise SystemExit("usage: python tools/check_wheel.py WHEEL...")
    bad = 0
    for path in wheels:
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
        for fault in wheel_faults(path):
            print(f"  error: {fault}", file=sys.stderr)
            bad = 1
    return bad


if __name__ == "__main__":
    sys.exit(main())
