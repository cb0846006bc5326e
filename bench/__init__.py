"""`python -m bench`: time and memory of the loss kernels beside a plain copy and their peers."""
