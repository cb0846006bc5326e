"""The inline PTX of each primitive, as nvcc compiles it, interpreted by tests/cpp/ptx."""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx_tools import nvcc
from ptx_tools.interpreter import Module, every_how
from ptx_tools.wrappers import CHECKS, OF_CLUSTERS, Runner
from repository import ROOT

if nvcc.NVCC is None:
    pytest.skip(nvcc.MISSING, allow_module_level=True)

SOURCE = ROOT / "tests" / "cpp" / "ptx_wrappers.cu"
NIGHTLY = pytest.mark.nightly
ARCHS = ["80", "90a", *(pytest.param(arch, marks=NIGHTLY) for arch in ("86", "100f", "120f"))]


@pytest.fixture(scope="module", params=ARCHS)
def module(request: pytest.FixtureRequest, interpreter: Path, ptx: nvcc.Compiler) -> Module:
    made = Module(interpreter, ptx.compile(SOURCE, request.param).read_text())
    made.arch = int(request.param.rstrip("af"))
    return made


@pytest.mark.parametrize("name", CHECKS)
def test_a_wrapper(name: str, module: Module) -> None:
    if name in OF_CLUSTERS and module.arch < 90:
        assert not any(f"test_{name}" in kernel for kernel in module.forms()), "no clusters there"
        return
    for how in every_how(seeds=3):
        try:
            CHECKS[name](Runner(module, how))
        except AssertionError as error:
            raise AssertionError(f"{how}: {error}") from error
