"""Triton kernels (installed as ``cfpo_kernels.triton_kernels``). docs/triton.md says where
they have run.

    scalar_math   expm1 and logarithms of one number
    objective     the policy objectives and KL estimators
    softmax       stages 1 and 3 of a row: sums of exponentials, gradient
    rows          where rows are
    kernels       the kernels: loops over rows around all of these
    config        tiles and numbers of programs

``cfpo_kernels.backends.triton`` launches them.
"""
