"""What `available_backends` says of a backend, and the error where one cannot run."""

from __future__ import annotations

from dataclasses import dataclass


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run; the message says why."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine.

    Attributes:
        available: it can be chosen by name.
        detail: what it would use, or why it is not available.
    """

    available: bool
    detail: str

    def __bool__(self) -> bool:
        return self.available
