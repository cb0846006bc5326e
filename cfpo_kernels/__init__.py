"""Fused policy losses over large vocabularies: one read and one write of the logits."""

from importlib.metadata import PackageNotFoundError, version

from .api import CFPOLoss, cfpo_loss, policy_loss, token_logps
from .autograd import CFPOFunction
from .backends import BackendStatus, BackendUnavailableError, available_backends
from .from_logps import cfpo_loss_from_logps, policy_loss_from_logps
from .objectives import CFPO, PPOClip
from .stats import CFPOStats
from .verification.records import VerifyRecord
from .verification.run import verify

try:
    __version__ = version("cfpo-kernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "CFPO",
    "BackendStatus",
    "BackendUnavailableError",
    "CFPOFunction",
    "CFPOLoss",
    "CFPOStats",
    "PPOClip",
    "VerifyRecord",
    "available_backends",
    "cfpo_loss",
    "cfpo_loss_from_logps",
    "policy_loss",
    "policy_loss_from_logps",
    "token_logps",
    "verify",
]
