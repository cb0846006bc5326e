"""What the tests of the functions beside the kernels share: where such a function has to work."""

from __future__ import annotations

import doctest
import inspect
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SYNCS = ("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique")


class NoSync(TorchDispatchMode):
    """Refuses what would make a GPU wait for the host, or the host for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in SYNCS and not name.startswith("unique"), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def on(device: str, tree: Any) -> Any:
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree)


def same(got: Any, want: Any, **tolerances: float) -> None:
    for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, **tolerances)


def works_everywhere(
    monkeypatch: Any, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """The same numbers without a sync, under another default dtype and compiled; shapes on meta."""
    want = function(*args, **kwargs)
    assert all(torch.isfinite(x).any() for x in tree_leaves(want))
    for dtype in (torch.bfloat16, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            same(function(*args, **kwargs), want, rtol=0, atol=0)
        finally:
            torch.set_default_dtype(before)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    same(compiled(*args, **kwargs), want)
    with monkeypatch.context() as patch:
        patch.setattr("cfpo_kernels.validation.values.can_be_checked", lambda tensor: False)
        with NoSync():
            got = function(*args, **kwargs)
        same(got, want, rtol=0, atol=0)
    there = function(*on("meta", args), **on("meta", kwargs))
    for one, other in zip(tree_leaves(there), tree_leaves(want), strict=True):
        assert one.device.type == "meta" and (one.shape, one.dtype) == (other.shape, other.dtype)


def planted(function: Callable[..., Any], right: str, wrong: str) -> Callable[..., Any]:
    """The function with a mistake in its source."""
    text = inspect.getsource(function)
    assert text.count(right) == 1, right
    namespace = dict(function.__globals__)
    exec("from __future__ import annotations\n" + text.replace(right, wrong), namespace)
    return namespace[function.__name__]


Refusal = tuple[str, Callable[[], Any], type[Exception], str]


def refused(cases: Sequence[tuple[Any, ...]]) -> Any:
    """Gives a test each case: the argument that is named, a call, the error, what it says too."""
    ids = [f"{case[0]}-{i}" for i, case in enumerate(cases)]
    return pytest.mark.parametrize("case", cases, ids=ids)


def check_refused(case: Refusal) -> None:
    name, call, error, message = case
    with pytest.raises(error, match=message) as caught:
        call()
    assert name in str(caught.value)


def public(module: ModuleType) -> set[str]:
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name for name, f in functions if name[0] != "_" and f.__module__ == module.__name__}


def examples_of(thing: Any, known: dict[str, Any]) -> set[str]:
    """Runs the examples of a module, class or function; the names of what has one."""
    names = {"torch": torch, "math": math} | known
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    shown = set()
    for test in doctest.DocTestFinder().find(thing, globs=names):
        if test.examples:
            shown.add(test.name.rsplit(".", 1)[-1])
            assert runner.run(test).failed == 0, test.name
    return shown


def run_examples(module: ModuleType) -> None:
    """Every public function of a module has an example, and it is right."""
    assert examples_of(module, vars(module)) == public(module)
