"""What a call costs beside its kernel, and where that time goes: `python -m bench.calls`.

One row, V = 32, one CPU thread: the kernel takes a microsecond, and the rest of `cfpo_loss` and its
backward is the price of any call. A part's time is what the call gets shorter by when the part is
replaced by its own ready result. The parts do not add up to the whole: code that was just run is
faster, whoever ran it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.machine import cpu_model
from cfpo_kernels import api, autograd, cfpo_loss, ops, validation
from cfpo_kernels.backends import cpu

VOCABULARY = 32
BLOCK = 200  # calls in a row, of one kind: a call follows one of its own, as in a loop
EPSILON = 0.2


class Calls:
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.logits = torch.randn(1, VOCABULARY, generator=g)
        self.token_ids = torch.randint(VOCABULARY, (1,), generator=g)
        self.advantages = torch.randn(1, generator=g)
        self.old_logps = torch.full((1,), -3.0)

    def leaf(self) -> Tensor:
        return self.logits.detach().requires_grad_()

    def eager(self) -> None:
        """The same loss in float32, as it is written in torch."""
        logps = torch.log_softmax(self.leaf().float(), -1)
        logps = logps.gather(-1, self.token_ids[:, None]).squeeze(-1)
        ratio, a = (logps - self.old_logps).exp(), self.advantages
        (-(ratio * a - a.abs() / (2 * EPSILON) * (ratio - 1) ** 2).mean()).backward()

    def ours(self, inplace: bool = False) -> None:
        self.loss(self.leaf(), inplace).backward()

    def inplace(self) -> None:
        self.ours(True)

    def forward(self) -> None:
        self.loss(self.leaf())

    def scoring(self) -> None:
        self.loss(self.logits)

    def only_a_node(self) -> None:
        OnlyNode.apply(self.leaf(), self.logits).backward()

    def loss(self, logits: Tensor, inplace: bool = False) -> Tensor:
        given = (self.token_ids, self.advantages, self.old_logps)
        loss = cfpo_loss(logits, *given, epsilon=EPSILON, inplace=inplace)
        assert isinstance(loss, Tensor)
        return loss


class OnlyNode(torch.autograd.Function):
    """An autograd Function that computes nothing: what torch itself takes for one."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return kept.new_empty(())

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0].detach(), None


class Idle:
    """The native module, where the loss does nothing."""

    first_bad_token = staticmethod(cpu.native.first_bad_token)

    @staticmethod
    def policy_loss(*_: object) -> None:
        pass


def parts(calls: Calls) -> dict[str, list[tuple[object, str, object]]]:
    """What to replace by what."""
    leaf = calls.leaf()
    ready: dict[str, Any] = {}

    def keep(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*arguments: Any, **options: Any) -> Any:
            ready[name] = function(*arguments, **options)
            return ready[name]

        return kept

    with ExitStack() as stack:
        for owner, name in (
            (validation, "check_rows"),
            (validation, "check_loss_terms"),
            (api, "_runner"),
            (ops, "_outputs"),
            (ops, "_gradient"),
        ):
            replaced = keep(name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, replaced))
        calls.loss(leaf)

    def rows(logits: Tensor, *_: object, **__: object) -> Any:
        ready["check_rows"].source = logits
        return ready["check_rows"]

    def instead(name: str) -> Callable[..., Any]:
        return lambda *_, **__: ready[name]

    return {
        "choice of the backend": [(api, "_runner", instead("_runner"))],
        "checks: logits, token ids, mask, temperature": [(validation, "check_rows", rows)],
        "checks: all else, weights": [
            (validation, "check_loss_terms", instead("check_loss_terms"))
        ],
        "memory for loss, log p and the gradient": [
            (ops, "_outputs", instead("_outputs")),
            (ops, "_gradient", instead("_gradient")),
        ],
        "whether torch has to see the call": [
            (ops, "is_plain", lambda *_: True),
            (autograd, "_is_one", lambda _: True),
        ],
        "the backend in Python": [(cpu.CPU, "policy_loss", _straight(calls))],
        "the native call": [(cpu, "native", Idle)],
    }


def _straight(calls: Calls) -> Callable[..., None]:
    """The native call with arguments that are ready."""
    seen: list[tuple[Any, ...]] = []
    native = cpu.native

    class Noting:
        first_bad_token = staticmethod(native.first_bad_token)

        @staticmethod
        def policy_loss(*arguments: Any) -> None:
            seen.append(arguments)
            native.policy_loss(*arguments)

    with mock.patch.object(cpu, "native", Noting):
        calls.forward()
    return lambda *_, **__: native.policy_loss(*seen[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.calls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="rounds of 200 calls (default: 25)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    calls = Calls()
    kinds: dict[str, tuple[Callable[[], None], list[Any]]] = {
        "eager float32": (calls.eager, []),
        "cfpo_loss": (calls.ours, []),
        "cfpo_loss in place": (calls.inplace, []),
        "cfpo_loss, forward": (calls.forward, []),
        "cfpo_loss, no gradient": (calls.scoring, []),
        "an autograd node alone": (calls.only_a_node, []),
    }
    whole = list(kinds)
    kinds |= {name: (calls.ours, changes) for name, changes in parts(calls).items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, (call, changes) in kinds.items():
            with ExitStack() as stack:
                for owner, attribute, new in changes:
                    stack.enter_context(mock.patch.object(owner, attribute, new))
                times[name].append(block(call))
    found = {name: statistics.median(samples) for name, samples in times.items()}
    print(f"{cpu_model()}, one thread, torch {torch.__version__}")
    print(f"N = 1, V = {VOCABULARY}, loss and backward unless it says otherwise; us a call")
    for name in whole:
        ratio = found[name] / found["eager float32"]
        print(f"{name:46} {found[name]:6.1f}  {ratio:5.2f} x eager")
    print("of cfpo_loss, shorter by")
    for name in list(kinds)[len(whole) :]:
        print(f"{name:46} {found['cfpo_loss'] - found[name]:6.1f}")


def block(call: Callable[[], None]) -> float:
    """Microseconds: the lower decile of some calls in a row, which a busy machine moves least."""
    call()
    samples = []
    for _ in range(BLOCK):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.quantiles(samples, n=10)[0] * 1e6


if __name__ == "__main__":
    main()
