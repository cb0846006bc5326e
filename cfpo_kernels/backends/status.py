"""What `available_backends` says of a backend, and the error where one cannot run."""

from __future__ import annotations

from dataclasses import dataclass


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run; the message says why.

    Example:
        >>> on_meta = (torch.zeros(2, 3, device="meta"), torch.zeros(2, device="meta").long())
        >>> cfpo_kernels.token_logps(*on_meta, backend="cpu")
        Traceback (most recent call last):
        cfpo_kernels.backends.status.BackendUnavailableError: backend='cpu' takes CPU tensors, ...
    """


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine.

    Attributes:
        available: it can be chosen by name.
        detail: what it would use, or why it is not available.

    Example:
        >>> status = BackendStatus(False, "torch sees no GPU")
        >>> print("yes" if status else f"no: {status.detail}")
        no: torch sees no GPU
    """

    available: bool
    detail: str

    def __bool__(self) -> bool:
        return self.available
