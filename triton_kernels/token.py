"""What a token brings to a policy loss, from its columns to its numbers."""

import triton
import triton.language as tl

# The columns of load_token, in the order of cfpo_kernels.inputs.TokenInputs.
COLUMNS = ("advantages", "old_logps", "token_weights", "ref_logps", "low", "high")


@triton.jit
def load_token(
    row,
    exact_logp,  # float64
    advantages_ptr,
    old_logps_ptr,  # None: on-policy
    token_weights_ptr,  # None: 1
    ref_logps_ptr,  # None: the distance is 0
    low_ptr,  # None: the objective's own, by the sign of the advantage; likewise `high`
    high_ptr,
    low_positive,
    low_negative,
    high_positive,
    high_negative,
):
    """advantage, log r, weight, ref_logp - logp, and the bounds of one token; float32."""
    advantage = tl.load(advantages_ptr + row)
    # From the unrounded log p; but logits that this kernel scored give exactly r = 1.
    old_logp = exact_logp
    if old_logps_ptr is not None:
        given = tl.load(old_logps_ptr + row)
        old_logp = tl.where(given == exact_logp.to(tl.float32), exact_logp, given.to(tl.float64))
    token_weight = 1.0
    if token_weights_ptr is not None:
        token_weight = tl.load(token_weights_ptr + row)
    kl_distance = 0.0
    if ref_logps_ptr is not None:
        kl_distance = (tl.load(ref_logps_ptr + row).to(tl.float64) - exact_logp).to(tl.float32)
    low = tl.where(advantage > 0, low_positive, low_negative)
    if low_ptr is not None:
        low = tl.load(low_ptr + row)
    high = tl.where(advantage > 0, high_positive, high_negative)
    if high_ptr is not None:
        high = tl.load(high_ptr + row)
    log_ratio = (exact_logp - old_logp).to(tl.float32)
    return advantage, log_ratio, token_weight, kl_distance, low, high
