"""Tools that check Triton kernels on a machine without a GPU.

`offline` compiles what production code launches and reads the machine code; `interpreter` mends
Triton's interpreter and `checker` watches every memory access of interpreted launches.
"""
