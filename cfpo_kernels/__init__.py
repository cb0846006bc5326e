"""Fused policy losses over large vocabularies: one read and one write of the logits."""

from importlib.metadata import PackageNotFoundError, version

from . import bounds, preference, sequences
from .api import CFPOLoss, cfpo_loss, policy_loss, token_logps
from .autograd import CFPOFunction
from .backends import BackendStatus, BackendUnavailableError, available_backends
from .from_logps import cfpo_loss_from_logps, policy_loss_from_logps
from .gradient_buffer import reuse_gradient_buffer
from .linear import LinearCFPOLoss, linear_cfpo_loss, linear_policy_loss, linear_token_logps
from .objectives import ASPO as ASPO
from .objectives import CFPO as CFPO
from .objectives import CISPO as CISPO
from .objectives import DPPO as DPPO
from .objectives import DRO as DRO
from .objectives import GPPO as GPPO
from .objectives import IPO as IPO
from .objectives import OBJECTIVES
from .objectives import SAPO as SAPO
from .objectives import TOPR as TOPR
from .objectives import IcePop as IcePop
from .objectives import PowerIS as PowerIS
from .objectives import PPOClip as PPOClip
from .objectives import Reinforce as Reinforce
from .objectives import register_triton_objective as register_triton_objective
from .rollout import rollout_weights
from .stats import CFPOStats
from .two_pass import TokenTerms
from .verification.records import VerifyRecord
from .verification.run import verify
from .vocab_parallel import VocabParallel

try:
    __version__ = version("cfpo-kernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "BackendStatus",
    "BackendUnavailableError",
    "CFPOFunction",
    "CFPOLoss",
    "CFPOStats",
    "LinearCFPOLoss",
    "TokenTerms",
    "VocabParallel",
    "VerifyRecord",
    "available_backends",
    "bounds",
    "cfpo_loss",
    "cfpo_loss_from_logps",
    "linear_cfpo_loss",
    "linear_policy_loss",
    "linear_token_logps",
    "policy_loss",
    "policy_loss_from_logps",
    "preference",
    "register_triton_objective",
    "reuse_gradient_buffer",
    "rollout_weights",
    "sequences",
    "token_logps",
    *(objective.__name__ for objective in OBJECTIVES.values()),
    "verify",
]
