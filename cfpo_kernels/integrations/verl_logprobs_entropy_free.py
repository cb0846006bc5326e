"""As :mod:`.verl_logprobs`, where ``actor.entropy_coeff`` is 0: entropies without a gradient.

For ``actor_rollout_ref.model.external_lib``; see :func:`.verl.use_fused_logprobs`.
"""

from __future__ import annotations

from .verl import use_fused_logprobs

use_fused_logprobs(entropy_grad=False)
