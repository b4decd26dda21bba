"""Checks that only Triton kernels need: an interpreter that watches them, compilation without a GPU."""
