"""One buffer for the gradients that are not in place, used again from step to step."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


def reuse_gradient_buffer(enabled: bool = True) -> None:
    """Lets CPU calls that are not in place write their gradient where an earlier one lay.

    A fresh gradient of 100 MB is memory that the kernel has to map and to clear at each step; that
    takes as long as computing it. With this the package keeps the memory of its last gradient, and
    uses it again as soon as nothing else does: no tensor, view, NumPy array or autograd graph. So a
    gradient that the caller keeps stays what it is, and the next call gets memory of its own.

    Costs the memory of one gradient between steps. Not used inside code that torch.compile made,
    on other devices (whose allocators keep memory anyway), or with ``inplace=True``, which needs no
    memory at all. Applies to the whole process.

    Args:
        enabled: False: from now on gradients are new memory, and what was kept is given back.

    Raises:
        TypeError: `enabled` is no bool.

    Example:
        >>> cfpo_kernels.reuse_gradient_buffer(True)
        >>> places = set()
        >>> for step in range(3):
        ...     logits = torch.zeros(2, 5, requires_grad=True)
        ...     cfpo_kernels.cfpo_loss(logits, torch.tensor([0, 3]), torch.ones(2)).backward()
        ...     places.add(logits.grad.data_ptr())
        ...     del logits
        >>> cfpo_kernels.reuse_gradient_buffer(False)
        >>> len(places)
        1
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {type(enabled).__name__}")
    with _lock:
        _kept.enabled = enabled
        _kept.storage = None


class _Kept:
    enabled = False
    storage: torch.UntypedStorage | None = None


_kept, _lock = _Kept(), threading.Lock()


def new_gradient(logits: Tensor) -> Tensor:
    """Memory for dlogits, contiguous (..., V); for eager calls, which see nothing of it."""
    if not _kept.enabled or logits.device.type != "cpu":
        return logits.new_empty(logits.shape)
    with _lock:
        storage = _kept.storage
        needed = logits.numel() * logits.element_size()
        if storage is None or storage.nbytes() < needed or not _only_kept(storage):
            storage = torch.UntypedStorage(needed)
            if _kept.enabled:  # still
                _kept.storage = storage
        # A tensor of its own, where a view of a kept one would share its version counter.
        strides = [logits.shape[k + 1 :].numel() for k in range(logits.dim())]
        nothing = torch.empty(0, dtype=logits.dtype, device="cpu")
        return nothing.set_(storage, 0, logits.shape, strides)


def _only_kept(storage: torch.UntypedStorage) -> bool:
    return torch._C._storage_Use_Count(storage._cdata) == 1
