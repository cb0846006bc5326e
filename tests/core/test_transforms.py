"""What torch can ask beside a gradient, and views that it guards: right, or refused in a sentence.

Never a derivative of 0, and never logits that are gone when the refusal comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

import cfpo_kernels
from cfpo_kernels.backends import cpu

N, V, H = 4, 20, 3


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


IDS, ADVANTAGES, LOGITS, ALONG = torch.arange(N), normal(N), normal(N, V), normal(V, N).t() + 0.5
HEAD = normal(V, H)


def loss(x: Tensor, **how: Any) -> Tensor:
    return cfpo_kernels.cfpo_loss(x, IDS, ADVANTAGES, **how)  # type: ignore[return-value]


def logps(x: Tensor, **how: Any) -> Tensor:
    return cfpo_kernels.token_logps(x, IDS, **how).sum()  # type: ignore[union-attr]


def linear(x: Tensor) -> Tensor:
    return cfpo_kernels.linear_cfpo_loss(x[:, :H], HEAD, IDS, ADVANTAGES)  # type: ignore[return-value]


def support(x: Tensor) -> Tensor:
    kept = torch.stack([IDS, IDS + 1], 1)
    return cfpo_kernels.linear_cfpo_loss(  # type: ignore[return-value]
        x[:, :H], HEAD, IDS, ADVANTAGES, support=kept, backend="reference"
    )


Function = Callable[..., Any]


def along_a_dual(f: Function, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, ALONG))).tangent


ASKED: dict[str, Callable[[Function], Function]] = {
    "jvp": lambda f: lambda x: jvp(f, (x,), (ALONG,))[1],
    "grad": grad,
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.ones(()))[0],
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f: lambda x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "forward over reverse": lambda f: lambda x: jvp(grad(f), (x,), (ALONG,))[1],
    "a dual number": lambda f: lambda x: along_a_dual(f, x),
}
each = pytest.mark.parametrize("asked", ASKED)
REFUSED = "cfpo_kernels: .* not supported by the fused kernels; .*reference"


@each
@pytest.mark.parametrize("f", [loss, logps, linear])
def test_refused(f: Function, asked: str) -> None:
    with pytest.raises(RuntimeError, match=REFUSED):
        ASKED[asked](f)(LOGITS)


QUICK = ("jvp", "vmap")


@pytest.mark.parametrize(
    "asked", [x if x in QUICK else pytest.param(x, marks=pytest.mark.nightly) for x in ASKED]
)
@pytest.mark.parametrize("f", [pytest.param(loss, marks=pytest.mark.nightly), logps])
def test_refused_in_compiled_code(f: Function, asked: str) -> None:
    torch._dynamo.reset()
    if asked == "jvp":  # what is compiled for plain calls is not run
        torch.compile(f, backend="eager")(LOGITS)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.compile(ASKED[asked](f), backend="eager")(LOGITS)


@pytest.mark.skipif(cpu.native is None, reason="needs the native module")
@pytest.mark.parametrize("f", [loss, logps])
def test_a_backend_by_name_is_one_graph(f: Function) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: f(x, backend="cpu"), backend="eager", fullgraph=True)
    assert torch.equal(compiled(LOGITS), f(LOGITS, backend="cpu"))


@each
@pytest.mark.parametrize("f", [loss, logps])
def test_the_reference_is_right(f: Function, asked: str) -> None:
    def written(x: Tensor) -> Tensor:
        found = torch.log_softmax(x, -1).gather(1, IDS[:, None])[:, 0]
        if f is logps:
            return found.sum()
        excess = torch.expm1(found - found.detach())
        return -(excess * ADVANTAGES - ADVANTAGES.abs() / 0.4 * excess**2 + ADVANTAGES).mean()

    got = ASKED[asked](lambda x: f(x, backend="reference"))(LOGITS.double())
    want = ASKED[asked](written)(LOGITS.double())
    torch.testing.assert_close(got, want)
    assert got.any()


@pytest.mark.parametrize("f", [loss, logps, linear, support])
def test_double_backward_is_refused(f: Function) -> None:
    x = LOGITS.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(f(x), x, create_graph=True)


@pytest.mark.nightly
def test_compiled_double_backward_is_refused() -> None:
    torch._dynamo.reset()
    x = LOGITS.clone().requires_grad_()
    compiled = torch.compile(lambda y: loss(y) + y.pow(3).sum(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        gradient = torch.autograd.grad(compiled(x), x, create_graph=True)[0]
        gradient.sum().backward()


def test_a_vmap_over_token_ids_on_the_reference() -> None:
    """Their values cannot be looked at there."""
    ids = torch.stack([IDS, IDS + 1])
    got = vmap(lambda i: cfpo_kernels.token_logps(LOGITS, i, backend="reference"))(ids)
    assert torch.equal(got, torch.stack([torch.log_softmax(LOGITS, -1)[IDS, i] for i in ids]))


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


def hooked(x: Tensor) -> Tensor:
    module = torch.nn.Identity()
    module.register_full_backward_hook(lambda *_: None)
    return module(x)  # type: ignore[no-any-return]


def without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        view = x[:N]
    return view.requires_grad_()


GUARDED: dict[str, Function] = {
    "split": lambda x: x.split(N)[0],
    "chunk": lambda x: x.chunk(2)[1],
    "unbind": lambda x: x.unflatten(0, (2, N)).unbind(0)[0],
    "slice of a split": lambda x: x.split(N + 1)[0][:N],
    "Function": lambda x: Same.apply(x)[:N],
    "full backward hook": lambda x: hooked(x[:N]),
    "no_grad": without_graph,
}
FREE: dict[str, Function] = {
    "itself": lambda x: x[:N].clone(),
    "slice": lambda x: x[:N],
    "split of a leaf": lambda x: x.detach().split(N)[0].requires_grad_(),
}


def product() -> Tensor:
    return normal(2 * N, H) @ HEAD.t().clone().requires_grad_()


@pytest.mark.parametrize("of", GUARDED)
def test_a_guarded_view_is_refused_before_a_byte_is_written(of: str) -> None:
    logits = GUARDED[of](product())
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match=r"inplace=True: the logits are .*inplace=False"):
        loss(logits, inplace=True)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("of", [*GUARDED, *FREE])
@pytest.mark.parametrize("f", [loss, logps])
def test_what_is_not_refused_is_right(of: str, f: Function) -> None:
    """token_logps overwrites in backward, when the views are done with."""
    if of == "no_grad" or (of in GUARDED and f is loss):
        with pytest.raises(RuntimeError, match="inplace=True"):
            f(GUARDED[of](product()), inplace=True)
        return
    gradients = []
    for inplace in (False, True):
        base = product().detach().requires_grad_()
        logits = (GUARDED | FREE)[of](base * 1.0)
        leaf = logits if logits.is_leaf else base
        f(logits, inplace=inplace).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients) and gradients[0].any()
