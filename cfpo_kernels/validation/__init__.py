"""Checks every argument and brings it to the one form that the kernels take.

=============  ====================================================================================
``rows``       logits or log-probs, token ids, mask, temperature: what every entry point has
``loss``       what a policy loss has beside them: objective, numbers of each token, weights
``sequences``  which sequence each token is of, padded or packed
``tensors``    one tensor: dtype, device, shape
``scalars``    one flag, choice or number
``values``     values that live in tensors; backends ask for these checks too, when a kernel runs
``errors``     how a refusal is worded
``types``      what checked arguments are passed on as
=============  ====================================================================================

Shapes, dtypes, devices, strides and names are checked before anything is computed. Values that live
in tensors (token ids, temperatures, sequence bounds) are checked on the CPU; on a GPU that would
force a synchronisation, so only with CFPO_KERNELS_DEBUG=1.
"""

from .loss import KL_ESTIMATORS, RATIO_LEVELS, check_formula, check_loss_terms, check_objective
from .rows import check_logps, check_rows
from .scalars import check_choice, check_flag
from .types import AnyObjective, Logps, LossTerms, PerToken, Rows

__all__ = [
    "KL_ESTIMATORS",
    "RATIO_LEVELS",
    "AnyObjective",
    "Logps",
    "LossTerms",
    "PerToken",
    "Rows",
    "check_choice",
    "check_flag",
    "check_formula",
    "check_logps",
    "check_loss_terms",
    "check_objective",
    "check_rows",
]
