"""Losses from hidden states: the head's products and the loss together, logits in tiles."""

from .api import linear_cfpo_loss, linear_policy_loss, linear_token_logps
from .shards import VocabParallel

__all__ = ["VocabParallel", "linear_cfpo_loss", "linear_policy_loss", "linear_token_logps"]
