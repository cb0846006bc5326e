"""What a call costs beside its kernel, counted; and that nobody who should see a call is passed by.

Times are `python -m bench.calls`'s to measure.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import cfpo_kernels
from cfpo_kernels import autograd, plain
from cfpo_kernels.validation import values

PACKAGE = os.path.dirname(cfpo_kernels.__file__)
# Operators that compute nothing.
VIEWS_AND_MEMORY = {
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::expand",
    "aten::new_empty",
    "aten::unsqueeze",
}
VIEWS_OR_COPIES = {"aten::reshape", "aten::to", "aten::contiguous"}


class Batch:
    def __init__(self, n: int = 1, v: int = 32) -> None:
        g = torch.Generator().manual_seed(3)
        self.logits = torch.randn(n, v, generator=g)
        self.token_ids = torch.randint(v, (n,), generator=g)
        self.advantages = torch.randn(n, generator=g)
        self.old_logps = torch.full((n,), -3.0)

    def loss(self, logits: torch.Tensor, **options: Any) -> torch.Tensor:
        loss = cfpo_kernels.cfpo_loss(
            logits, self.token_ids, self.advantages, self.old_logps, backend="cpu", **options
        )
        loss = loss[0] if isinstance(loss, tuple) else loss
        assert isinstance(loss, torch.Tensor)
        return loss

    def shaped(self, *shape: int) -> Batch:
        """With tokens of this shape."""
        self.logits = self.logits.reshape(*shape, -1)
        for name in ("token_ids", "advantages", "old_logps"):
            setattr(self, name, getattr(self, name).reshape(shape))
        return self

    def step(self, factor: float = 1.0, **options: Any) -> torch.Tensor:
        leaf = self.logits.clone().requires_grad_()
        (factor * self.loss(leaf, **options)).backward()
        assert leaf.grad is not None
        return leaf.grad


def python_calls(step: Callable[[], object]) -> list[str]:
    """The package's own functions that are called, after the first calls."""
    step()
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return called


def events(step: Callable[[], object]) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return list(found.events())


def copies(event: Any) -> bool:
    return event.name == "aten::copy_" or any(map(copies, event.cpu_children))


def operators(step: Callable[[], object]) -> list[str]:
    """torch's operators that compute, but for those that another one calls."""
    step()
    return [
        event.name
        for event in events(step)
        if event.name.startswith("aten::")
        and event.name not in VIEWS_AND_MEMORY
        and (event.name not in VIEWS_OR_COPIES or copies(event))
        and not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))
    ]


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept between calls there, and no number is looked at."""
    monkeypatch.setattr(plain, "_LONGEST_KEPT", -1)
    monkeypatch.setattr(autograd, "_is_one", lambda dloss: False)
    for name in ("can_be_checked", "can_be_looked_at"):
        monkeypatch.setattr(values, name, lambda tensor: False)


def a_step(batch: Batch, inplace: bool, **options: Any) -> Callable[[], object]:
    leaf = batch.logits.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        batch.loss(leaf, inplace=inplace, **options).backward()

    return step


@pytest.mark.parametrize("inplace", [False, True])
def test_python_functions_of_a_call(inplace: bool) -> None:
    called = python_calls(a_step(Batch(), inplace))
    assert "backward" in called  # of the Function: both halves were counted
    assert len(called) <= 100, called


@pytest.mark.parametrize("inplace", [False, True])
def test_operators_of_a_call(inplace: bool) -> None:
    # torch makes the gradient of the loss; the sum of the rows and a look at that gradient are ours
    found = operators(a_step(Batch(), inplace))
    assert sorted(found) == ["aten::item", "aten::ones_like", "aten::sum"]


N, V = 6, 32


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, batch: Batch, **options: Any) -> list[str]:
    """The operators of a step there; none of them looks at a number."""
    as_on_a_gpu(monkeypatch)
    found = operators(a_step(batch, **options))
    waiting = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
    assert not {name for name in found if name.startswith(waiting)}, found
    return sorted(found)


FOUR = ["aten::full", "aten::full", "aten::ones_like", "aten::sum"]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(N,), (2, 3)], ids=str)
def test_at_most_four_operators_on_a_gpu(
    shape: tuple[int, ...], dtype: torch.dtype, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the dtype and the tokens' shape: temperature, weights, the sum, its gradient."""
    batch = Batch(N, V).shaped(*shape)
    batch.logits = batch.logits.to(dtype)
    assert on_a_gpu(monkeypatch, batch, inplace=inplace) == FOUR


MASK, TEMPERATURES = torch.arange(N) > 1, torch.full((N,), 0.7)
# How many there are with an option, each of them a launch.
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "mask": (11, {"mask": MASK}),
    "temperature": (3, {"temperature": torch.full((), 0.7)}),
    "temperatures": (3, {"temperature": TEMPERATURES}),
    "statistics": (44, {"return_stats": True}),
    "all": (49, {"mask": MASK, "temperature": TEMPERATURES, "return_stats": True}),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_operators_of_options_on_a_gpu(
    name: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, options = OPTIONS[name]
    found = on_a_gpu(monkeypatch, Batch(N, V), inplace=inplace, **options)
    assert len(found) == count, found


def test_a_look_at_a_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(N, V)
    look = batch.loss
    monkeypatch.setattr(batch, "loss", lambda x, **how: look(x, **how) * float(x.sum() > -1e9))
    with pytest.raises(AssertionError, match="item"):
        on_a_gpu(monkeypatch, batch, inplace=False)


@pytest.mark.parametrize("options", [{}, {"inplace": True}])
def test_a_profiler_shows_the_call(options: dict[str, Any]) -> None:
    name = "cfpo_kernels::policy_loss" + ("_" if options else "")
    shown = [event.name for event in events(lambda: Batch().step(2.0, **options))]
    assert shown.count(name) == 1
    assert shown.count("cfpo_kernels::multiply_rows_") == 1
    assert "aten::sum" in shown


def test_a_plain_call_goes_past_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the operator was called")

    for name in ("policy_loss", "policy_loss_", "multiply_rows_", "token_scores"):
        monkeypatch.setattr(cfpo_kernels.ops, name, refuse)
    batch = Batch()
    assert batch.step(2.0).any() and batch.step(2.0, inplace=True).any()
    cfpo_kernels.token_logps(batch.logits, batch.token_ids, backend="cpu")
    with Seeing(), pytest.raises(AssertionError, match="was called"):
        batch.step()


class Seeing(TorchDispatchMode):
    """Notes the operators that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("inplace", [False, True])
def test_a_dispatch_mode_sees_the_operators(inplace: bool) -> None:
    batch = Batch(4)
    want = batch.step(2.0, inplace=inplace)
    with Seeing() as mode:
        got = batch.step(2.0, inplace=inplace)
    assert torch.equal(got, want)
    ours = [name for name in mode.seen if name.startswith("cfpo_kernels")]
    first = "policy_loss_" if inplace else "policy_loss"
    assert ours == [f"cfpo_kernels.{first}.default", "cfpo_kernels.multiply_rows_.default"]


def test_what_is_not_plain() -> None:
    x = torch.ones(2)
    assert plain.is_plain() and plain.is_plain(x, None, torch.nn.Parameter(x))
    negative = torch.ones(2, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    for other in (
        x.as_subclass(Subclass),
        torch.ones(2, device="meta"),
        negative,
        torch._efficientzerotensor((2,)),
    ):
        assert not plain.is_plain(x, other)
    with Watching():
        assert not plain.is_plain(x)
    with Seeing():
        assert not plain.is_plain(x)
    seen = []

    def look(y: torch.Tensor) -> torch.Tensor:
        seen.append(plain.is_plain(x))
        return y.sum()

    torch.func.grad(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    torch.compile(look, backend="eager")(x)
    assert seen and not any(seen)


def test_a_negated_view_is_read_as_what_it_is() -> None:
    batch = Batch(3)
    want = batch.step()
    batch.advantages = torch.complex(torch.zeros(3), -batch.advantages).conj().imag
    assert batch.advantages.is_neg()
    assert torch.equal(batch.step(), want)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [2.0, -0.5, float("nan"), float("inf")])
def test_masked_rows_stay_zero_whatever_comes_in(factor: float, inplace: bool) -> None:
    batch = Batch(4)
    mask = torch.tensor([True, False, True, True])
    batch.logits[1] = torch.nan
    once = batch.step(mask=mask)
    got = batch.step(factor, mask=mask, inplace=inplace)
    assert torch.equal(got[1].view(torch.int32), torch.zeros(32, dtype=torch.int32))
    torch.testing.assert_close(got[mask], factor * once[mask], equal_nan=True)


@pytest.mark.parametrize("n", [1, 3, 1000, 4097])
def test_no_mask_and_a_mask_of_ones_agree(n: int) -> None:
    batch = Batch(n)
    ones = torch.ones(n, dtype=torch.bool)
    for options in (
        {},
        {"normalizer": 7.3},
        {"normalizer": torch.tensor(7.3)},
        {"reduction": "sum"},
        {"temperature": torch.full((n,), 0.7)},
    ):
        assert torch.equal(batch.step(**options), batch.step(mask=ones, **options)), options


def test_what_is_kept_is_never_written_to_and_stays_small() -> None:
    plain._kept.clear()
    batch = Batch(5)
    for temperature in (0.5, 1.0, 2.0):
        batch.step(3.0, temperature=temperature)
        batch.step(temperature=temperature, inplace=True, entropy_coef=0.1, grad_scale=8.0)
        cfpo_kernels.token_logps(batch.logits, batch.token_ids, temperature=temperature)
    assert len(plain._kept) == 4  # three temperatures, one weight
    for (n, value, dtype), kept in plain._kept.items():
        assert torch.equal(kept, torch.full((n,), value, dtype=dtype))
    for i in range(1000):
        batch.loss(batch.logits, temperature=1.0 + i)
    assert len(plain._kept) <= plain._MOST_KEPT
    Batch(5000).step()
    assert max(n for n, _, _ in plain._kept) <= plain._LONGEST_KEPT


def test_what_inference_mode_kept_can_be_saved_for_a_backward() -> None:
    plain._kept.clear()
    batch = Batch(2)
    with torch.inference_mode():
        batch.loss(batch.logits, temperature=0.9)
    leaf = batch.logits.clone().requires_grad_()
    logps = cfpo_kernels.token_logps(leaf, batch.token_ids, temperature=0.9, backend="cpu")
    assert isinstance(logps, torch.Tensor)
    logps.sum().backward()  # saves the temperature
    assert leaf.grad is not None and leaf.grad.any()


def test_threads_share_what_is_kept() -> None:
    batch = Batch(3)
    want = {t: batch.step(temperature=t) for t in (1.0, 1.5, 2.0)}
    plain._kept.clear()
    wrong: list[float] = []

    def work() -> None:
        for _ in range(50):
            wrong.extend(t for t in want if not torch.equal(batch.step(temperature=t), want[t]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
