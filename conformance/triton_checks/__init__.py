"""Checks that only Triton kernels need: memory under the interpreter, compilation without a GPU."""
