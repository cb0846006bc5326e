"""Losses from hidden states: the head's products and the loss together, logits in tiles."""

from .api import linear_cfpo_loss, linear_policy_loss, linear_token_logps
from .module import LinearCFPOLoss

__all__ = ["LinearCFPOLoss", "linear_cfpo_loss", "linear_policy_loss", "linear_token_logps"]
