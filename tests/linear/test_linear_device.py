"""Nothing of a step on a GPU waits for the device.

Tensors on torch's meta device have no values, so that whatever reads one on the host raises. To the
library they are no CPU tensors: it takes the way that it takes on a GPU, up to the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfpo_kernels import PPOClip, linear_policy_loss, linear_token_logps

DEVICE = "meta"
SHAPE, V, H = (4, 16), 20000, 64


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, device=DEVICE, dtype=dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": empty(*SHAPE, dtype=torch.bool)},
    "active_tokens": {"active_tokens": 40, "mask": empty(*SHAPE, dtype=torch.bool)},
    "statistics": {"return_stats": True},
    "low_memory": {"low_memory": True},
    "a loss a token": {"reduction": "none"},
    "sequences": {"reduction": "seq-mean-token-mean"},
    "ratios of sequences": {"ratio_level": "sequence"},
    "a callable": {"objective": lambda terms: -terms.log_ratio * terms.advantages},
    "KL and entropy": {"ref_logps": empty(*SHAPE), "kl_coef": 0.1, "entropy_coef": 0.01},
    "softcap": {"softcap": 20.0},
    "float32 logits": {"logits_dtype": torch.float32},
    "a support": {"support": empty(*SHAPE, 5, dtype=torch.int64)},
    "a loss scale": {"grad_scale": torch.empty((), device=DEVICE)},
    "a normalizer": {"normalizer": torch.empty((), device=DEVICE)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_reads_no_value(name: str, dtype: torch.dtype) -> None:
    hidden = empty(*SHAPE, H, dtype=dtype).requires_grad_()
    weight = empty(V, H, dtype=dtype).requires_grad_()
    ids = empty(*SHAPE, dtype=torch.int64)
    found = linear_policy_loss(
        hidden,
        weight,
        ids,
        empty(SHAPE[0]),
        empty(*SHAPE),
        backend="reference",
        chunk_tokens=32,
        **({"objective": PPOClip()} | OPTIONS[name]),
    )
    loss = found[0] if isinstance(found, tuple) else found
    loss.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and weight.grad.dtype == dtype
    logps = linear_token_logps(hidden, weight, ids, backend="reference", chunk_tokens=32)
    assert isinstance(logps, torch.Tensor)
    logps.sum().backward()


def test_a_read_would_be_noticed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        empty(3).sum().item()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|nonzero"):
        empty(3).nonzero()
