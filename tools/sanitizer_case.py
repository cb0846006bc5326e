"""A few small calls of every CUDA kernel, for compute-sanitizer: the tests are too many for it.

Rows that are kept, read again, split, and pass; short and ragged ones; every dtype. Each result is
compared with the CPU kernels', so that a tool that stops the kernels from working is noticed.
"""

from __future__ import annotations

import torch

import cfpo_kernels


def gradient(logits, ids, advantages, device, inplace):
    # With a column cut off, no row but the first is aligned.
    wide = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=logits.dtype, device=device)
    rows = wide[:, : logits.shape[1]]
    rows.copy_(logits)
    leaf = rows.detach().requires_grad_()
    arguments = {"backend": device, "inplace": inplace, "entropy_coef": 0.1, "reduction": "none"}
    loss = cfpo_kernels.cfpo_loss(leaf, ids.to(device), advantages.to(device), **arguments)
    (2 * loss).sum().backward()  # a factor other than 1: multiply_rows has work to do
    scored = leaf.detach().clone().requires_grad_()
    logps, entropy = cfpo_kernels.token_logps(
        scored, ids.to(device), return_entropy=True, backend=device
    )
    (logps + entropy).sum().backward()
    return leaf.grad.cpu(), scored.grad.cpu()


def main():
    torch.manual_seed(0)
    shapes = ((20, 1001), (3, 5000), (2, 40001), (150, 33001))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, v in shapes:
            logits = torch.randn(n, v).to(dtype)
            ids, advantages = torch.randint(v, (n,)), torch.randn(n)
            for inplace in (False, True):
                got = gradient(logits, ids, advantages, "cuda", inplace)
                want = gradient(logits, ids, advantages, "cpu", inplace)
                for x, y in zip(got, want, strict=True):
                    error = (x.double() - y.double()).norm() / y.double().norm()
                    assert error < 1e-2, (dtype, n, v, inplace, error)
    print("sanitizer_case: all results as on the CPU")


if __name__ == "__main__":
    main()
