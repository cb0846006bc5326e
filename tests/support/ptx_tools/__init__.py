"""Runs the PTX of the kernels on a CPU: `interpreter` is tests/cpp/ptx as a Python module, `nvcc`
compiles what it runs, `wrappers` says what each primitive has to do.
"""
