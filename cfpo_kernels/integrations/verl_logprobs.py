"""Importing this module makes verl compute log-probs and entropies by ``token_logps``.

For ``actor_rollout_ref.model.external_lib``; see :func:`.verl.use_fused_logprobs`.
"""

from __future__ import annotations

from .verl import use_fused_logprobs

use_fused_logprobs()
