"""A few small calls of every CUDA kernel, for compute-sanitizer: the tests are too many for it.

Rows that are kept, read again, split, and pass; short and ragged ones; every dtype; by clusters of
blocks, where there are some, and without. Each result is compared with the CPU kernels', so that a
tool that stops the kernels from working is noticed.
"""

from __future__ import annotations

import os

import torch

import cfpo_kernels


def rows_in_whole_vectors(x, pitch, device):
    """A copy of x (N, V) with `pitch` columns from row to row, in whole vectors of 16 bytes.

    The kernels read every vector that a row touches. On a GPU that is harmless at the end of an
    allocation, whose memory goes on; for a tool that counts its bytes it is a read past the end, or
    of what nobody has written.
    """
    n, v = x.shape
    per_vector = 16 // x.element_size()
    memory = torch.zeros(-(-n * pitch // per_vector) * per_vector, dtype=x.dtype, device=device)
    rows = memory[: n * pitch].view(n, pitch)[:, :v]
    rows.copy_(x)
    return rows


def gradient(logits, ids, advantages, device, inplace):
    columns = logits.shape[1]
    # With a column cut off, no row but the first is aligned.
    leaf = rows_in_whole_vectors(logits, columns + 1, device).requires_grad_()
    arguments = {"backend": device, "inplace": inplace, "entropy_coef": 0.1, "reduction": "none"}
    loss = cfpo_kernels.cfpo_loss(leaf, ids.to(device), advantages.to(device), **arguments)
    (2 * loss).sum().backward()  # a factor other than 1: multiply_rows has work to do
    scored = rows_in_whole_vectors(leaf.detach(), columns, device).requires_grad_()
    logps, entropy = cfpo_kernels.token_logps(
        scored, ids.to(device), return_entropy=True, backend=device
    )
    (logps + entropy).sum().backward()
    return leaf.grad.cpu(), scored.grad.cpu()


def main():
    torch.manual_seed(0)
    # The last is too long for an H100's shared memory in float32.
    shapes = ((20, 1001), (3, 5000), (2, 40001), (150, 33001), (150, 60001))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, v in shapes:
            logits = torch.randn(n, v).to(dtype)
            ids, advantages = torch.randint(v, (n,)), torch.randn(n)
            for inplace in (False, True):
                want = gradient(logits, ids, advantages, "cpu", inplace)
                for kernel in ("auto", "portable", "auto-transient"):
                    os.environ["CFPO_KERNELS_CUDA_KERNEL"] = kernel
                    got = gradient(logits, ids, advantages, "cuda", inplace)
                    for x, y in zip(got, want, strict=True):
                        error = (x.double() - y.double()).norm() / y.double().norm()
                        assert error < 1e-2, (dtype, n, v, inplace, kernel, error)
    print("sanitizer_case: all results as on the CPU")


if __name__ == "__main__":
    main()
