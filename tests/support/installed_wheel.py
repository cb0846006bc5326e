"""What an installed wheel must do: `python -I` runs this outside a checkout, beside torch."""

import importlib.util
import sys

import torch

import cfpo_kernels
import cfpo_kernels.triton_kernels

if importlib.util.find_spec("triton"):
    import cfpo_kernels.triton_kernels.kernels

for module in (cfpo_kernels, cfpo_kernels.triton_kernels):
    assert module.__file__.startswith(sys.prefix), module.__file__

torch.manual_seed(0)
logits = torch.randn(4, 1000)
token_ids = torch.randint(1000, (4,))
old_logps = logits.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0] - 0.1
advantages = torch.randn(4)


def loss_and_gradient(backend, dtype):
    leaf = logits.detach().to(dtype).requires_grad_()
    loss = cfpo_kernels.cfpo_loss(leaf, token_ids, advantages, old_logps, backend=backend)
    loss.backward()
    return loss.detach().double(), leaf.grad.double()


# A wheel in pure Python has no kernels for the CPU, and says so; "auto" takes plain torch there.
native = importlib.util.find_spec("cfpo_kernels._C") is not None
used = "cpu" if native else "auto"
assert native or "pure Python" in cfpo_kernels.available_backends()["cpu"].detail

loss, gradient = loss_and_gradient(used, torch.float32)
expected_loss, expected = loss_and_gradient("reference", torch.float64)
assert (loss - expected_loss).abs() <= 1e-5 * expected_loss.abs(), (loss, expected_loss)
errors = (gradient - expected).norm(dim=-1) / expected.norm(dim=-1)
assert (errors <= 1e-5).all(), errors

print(f"loss {loss.item()} by {'the native module' if native else 'plain torch'}")
for name, status in cfpo_kernels.available_backends().items():
    print(f"{name}: {'yes' if status else 'no'}, {status.detail}")
