"""Triton kernels (installed as ``cfpo_kernels.triton_kernels``): not part of this release yet."""
