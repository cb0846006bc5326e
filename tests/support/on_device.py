"""A GPU's backend for CPU tensors, by way of the GPU: for tests that compare on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from oracle import Case
from torch import Tensor

from cfpo_kernels.backends.base import Backend, KernelRows, KernelTerms


def on_cuda(case: Case) -> dict[str, object]:
    """What a loss of the case takes besides its logits, on the GPU."""
    options = {
        name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.options.items()
    }
    tensors = {
        name: getattr(case, name).cuda() for name in ("token_ids", "advantages", "old_logps")
    }
    return tensors | options


class Visit:
    """Tensors on the GPU with the strides, alignment and sharing of memory that they had here."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        here = x.untyped_storage()
        if here.data_ptr() not in self.storages:
            there = torch.UntypedStorage(here.nbytes(), device=self.device)
            there.copy_(here)
            self.storages[here.data_ptr()] = here, there
        moved = torch.empty(0, dtype=x.dtype, device=self.device)
        _, there = self.storages[here.data_ptr()]
        return moved.set_(there, x.storage_offset(), x.shape, x.stride())

    def bring_back(self) -> None:
        for here, there in self.storages.values():
            here.copy_(there)


class OnDevice:
    """See ``base.Backend``."""

    def __init__(self, kernels: Backend, device: str = "cuda") -> None:
        self.kernels, self.device = kernels, torch.device(device)

    def policy_loss(self, rows: KernelRows, terms: KernelTerms, **outputs: Any) -> None:
        visit = Visit(self.device)
        moved = {name: visit(x) for name, x in outputs.items()}
        terms = terms._replace(inputs=terms.inputs.each(visit), grad_scale=visit(terms.grad_scale))
        self.kernels.policy_loss(KernelRows(*map(visit, rows)), terms, **moved)
        visit.bring_back()

    def token_logps(self, rows: KernelRows, **outputs: Any) -> None:
        visit = Visit(self.device)
        moved = {name: visit(x) for name, x in outputs.items()}
        self.kernels.token_logps(KernelRows(*map(visit, rows)), **moved)
        visit.bring_back()

    def token_logps_backward(self, rows: KernelRows, **tensors: Any) -> None:
        visit = Visit(self.device)
        moved = {name: visit(x) for name, x in tensors.items()}
        self.kernels.token_logps_backward(KernelRows(*map(visit, rows)), **moved)
        visit.bring_back()

    def multiply_rows(self, x: Tensor, factors: Tensor) -> None:
        visit = Visit(self.device)
        self.kernels.multiply_rows(visit(x), visit(factors))
        visit.bring_back()
