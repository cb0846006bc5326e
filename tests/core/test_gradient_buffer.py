"""reuse_gradient_buffer: the memory of one gradient serves the next, and never two at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracle import make_case
from torch import Tensor

import cfpo_kernels

CASE = make_case(6, 5003)


@pytest.fixture(autouse=True)
def _reuse() -> Iterator[None]:
    cfpo_kernels.reuse_gradient_buffer(True)
    yield
    cfpo_kernels.reuse_gradient_buffer(False)


class Model(torch.nn.Module):
    """Logits that are no leaf, so that nothing but autograd ever holds their gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def forward(self) -> Tensor:
        logits = CASE.logits + self.shift
        logits.register_hook(lambda gradient: self.seen.append(gradient.data_ptr()))
        return logits


def fused(logits: Tensor) -> Tensor:
    loss = cfpo_kernels.cfpo_loss(logits, CASE.token_ids, CASE.advantages)
    assert isinstance(loss, Tensor)
    return loss


def two_passes(logits: Tensor) -> Tensor:
    logps = cfpo_kernels.token_logps(logits, CASE.token_ids)
    assert isinstance(logps, Tensor)
    return logps.sum()


def leaf_gradient(loss: object = fused) -> Tensor:
    leaf = CASE.logits.clone().requires_grad_()
    assert callable(loss)
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("loss", [fused, two_passes])
def test_steps_share_one_buffer(loss: object) -> None:
    model = Model()
    assert callable(loss)
    for _ in range(5):
        loss(model()).backward()
    assert len(set(model.seen)) == 1


@pytest.mark.parametrize("loss", [fused, two_passes])
def test_what_is_still_held_is_not_written_to(loss: object) -> None:
    first = leaf_gradient(loss)
    row, copy = first[2], first[2].clone()
    array = first.numpy()
    del first
    for _ in range(3):
        leaf_gradient(loss)
        assert torch.equal(row, copy)
    del row
    leaf_gradient(loss)
    assert (torch.from_numpy(array)[2] == copy).all()


def test_a_graph_that_did_not_run_backward_yet_keeps_its_gradient() -> None:
    want = leaf_gradient().clone()
    leaves = [CASE.logits.clone().requires_grad_() for _ in range(3)]
    losses = [fused(leaf) for leaf in leaves]
    for loss in losses:
        loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None and torch.equal(leaf.grad, want)


def test_other_shapes_and_dtypes() -> None:
    for dtype, n in (
        (torch.bfloat16, 6),
        (torch.float32, 6),
        (torch.float16, 3),
        (torch.float32, 1),
    ):
        leaf = CASE.logits[:n].to(dtype).requires_grad_()
        loss = cfpo_kernels.cfpo_loss(leaf, CASE.token_ids[:n], CASE.advantages[:n])
        assert isinstance(loss, Tensor)
        loss.backward()
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        assert leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all()


def test_off_again() -> None:
    model = Model()
    fused(model()).backward()
    cfpo_kernels.reuse_gradient_buffer(False)
    kept = [leaf_gradient() for _ in range(3)]
    assert len({gradient.data_ptr() for gradient in kept}) == 3
    with pytest.raises(TypeError, match="enabled must be a bool, got int"):
        cfpo_kernels.reuse_gradient_buffer(1)  # type: ignore[arg-type]


def test_compiled_code_gets_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from cfpo_kernels import gradient_buffer

    taken: list[bool] = []
    real = gradient_buffer._only_kept
    monkeypatch.setattr(gradient_buffer, "_only_kept", lambda x: (taken.append(True), real(x))[1])
    leaf_gradient()
    leaf_gradient()
    assert taken  # the spy sees an eager call
    taken.clear()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        leaf = CASE.logits.clone().requires_grad_()
        compiled(leaf).backward()
    assert not taken
