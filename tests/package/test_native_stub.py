"""cfpo_kernels/_C.pyi says what the built module has: names, signatures, attributes.

pybind11 writes a signature into the first line of a function's docstring; nothing else knows it.
"""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cfpo_kernels
from cfpo_kernels.backends import cpu

STUB = (Path(cfpo_kernels.__file__).parent / "_C.pyi").read_text()
# What a function of pybind11 takes, in the words of the stub; its versions differ.
SPELLINGS = [
    (r"\b(typing|collections\.abc)\.", ""),
    (r"\bSupportsInt( \| SupportsIndex)?\b", "int"),
    (r"\bSupportsFloat( \| SupportsIndex)?\b", "float"),
    (r"\bSequence\[", "list["),
    (r"\bOptional\[((?:[^][]|\[[^][]*\])*)\]", r"\1 | None"),
]
# What a call of the CUDA kernels has in place of the CPU kernels' last arguments.
ON_CPU = "threads: int"
ON_CUDA = "device: int, stream: int, workspace: int | Tensor | None, row_kernel: str"


def spelled(text: str) -> str:
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text


def signature(function: ast.FunctionDef, aliases: dict[str, str]) -> str:
    text = f"({ast.unparse(function.args)}) -> {ast.unparse(function.returns or ast.Constant('?'))}"
    for name, meaning in aliases.items():
        text = re.sub(rf"\b{name}\b", meaning, text)
    return text


def built(function: Any) -> str:
    first = spelled((function.__doc__ or "").splitlines()[0])
    (parsed,) = ast.parse(f"def {first}: ...").body
    assert isinstance(parsed, ast.FunctionDef)
    return signature(parsed, {})


class Stub:
    def __init__(self, text: str) -> None:
        body = ast.parse(text).body
        aliases = [node for node in body if isinstance(node, ast.Assign)]
        names = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in aliases}
        functions = [node for node in body if isinstance(node, ast.FunctionDef)]
        self.functions = {node.name: signature(node, names) for node in functions}
        attributes = [node for node in body if isinstance(node, ast.AnnAssign)]
        self.attributes = {
            ast.unparse(node.target): ast.unparse(node.annotation) for node in attributes
        }
        classes = [node for node in body if isinstance(node, ast.ClassDef)]
        self.keys = {
            node.name: [ast.unparse(entry.target) for entry in node.body]  # type: ignore[attr-defined]
            for node in classes
        }


def differences(text: str, module: ModuleType) -> list[str]:
    stub = Stub(text)
    there = {name for name in vars(module) if not name.startswith("__")}
    only_with_cuda = set() if module.cuda_built else {"cuda", "cuda_query"}
    said = (stub.functions.keys() | stub.attributes.keys()) - only_with_cuda
    found = [f"{name}: in the stub only" for name in sorted(said - there)]
    found += [f"{name}: in the module only" for name in sorted(there - said)]
    for name in sorted(said & there):
        thing = getattr(module, name)
        if name == "cuda_query":  # a dict to pybind11
            query = thing()
            if list(query) != stub.keys["CudaQuery"]:
                found.append(f"{name}: {list(query)}")
        elif name in stub.functions:
            if built(thing) != stub.functions[name]:
                found.append(f"{name}: {stub.functions[name]} is {built(thing)}")
        elif name != "cuda" and not isinstance(thing, getattr(builtins, stub.attributes[name])):
            found.append(f"{name}: {stub.attributes[name]} is {type(thing).__name__}")
    if module.cuda_built:
        for name, on_cpu in stub.functions.items():
            if ON_CPU in on_cpu and hasattr(module.cuda, name):  # token_losses is the CPU's
                there_too = built(getattr(module.cuda, name))
                if there_too != on_cpu.replace(ON_CPU, ON_CUDA):
                    found.append(f"cuda.{name}: {there_too}")
    return found


def test_the_stub_is_right() -> None:
    assert differences(STUB, cpu.native) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (
            "lse: Address,\n    entropy: Address,\n    threads",
            "entropy: Address,\n    lse: Address,\n    threads",
        ),
        (
            "dlogits: Rows | None,\n    columns: list[Address]",
            "dlogits: Rows | None,\n    columns: list[float]",
        ),
        ("weights: Address,\n    log_ratios: Address", "weights: Address,\n    log_ratio: Address"),
        ("dlogits: Rows | None", "dlogits: Rows"),
        ("Rows = tuple[int | Tensor | None, ", "Rows = tuple["),
        ("def policy_term(\n    *,\n", "def policy_term(\n"),
        ("def cpu_levels() -> list[str]: ...\n", ""),
        ("def cpu_levels() -> list[str]", "def cpu_levels() -> list[int]"),
        ("cuda_built: bool", "cuda_built: str"),
        ("build_id: str", "build_id: str\nbuild_date: str"),
    ],
)
def test_a_planted_difference_is_found(right: str, wrong: str) -> None:
    assert STUB.count(right) == 1
    assert len(differences(STUB.replace(right, wrong), cpu.native)) >= 1


def test_spellings_of_older_versions() -> None:
    older = "(x: Optional[tuple[int, int]], y: Optional[float]) -> None"
    assert spelled(older) == "(x: tuple[int, int] | None, y: float | None) -> None"
