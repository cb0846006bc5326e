"""What only the reference has: float64, and a second derivative. The rest: tests/every_target."""

from __future__ import annotations

import torch
from oracle import make_case, oracle, run, with_everything

import cfpo_kernels
from cfpo_kernels import CFPO, PPOClip


def test_in_float64_it_is_the_oracle() -> None:
    for objective in (CFPO(0.3), CFPO(0.2, log_ratio_clip=0.25), PPOClip(0.1, 0.3, dual_clip=2.0)):
        case = with_everything(make_case(26, 50, torch.float64, mask_every=5, objective=objective))
        got, want = run(case, backend="reference"), oracle(case)
        assert got.loss.dtype == torch.float64
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got.dlogits, want.dlogits, rtol=1e-9, atol=1e-15)


def test_it_is_differentiable_twice() -> None:
    leaf = make_case(2, 5, torch.float64).logits.requires_grad_()
    ids = torch.tensor([1, 2])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return cfpo_kernels.cfpo_loss(
            x, ids, torch.tensor([1.0, -2.0]), torch.tensor([-1.5, -1.0]), backend="reference"
        )

    assert torch.autograd.gradgradcheck(loss, (leaf,))
