"""Optimized operations in plain PyTorch, for the CPU: files and functions as in `reference.torch`."""
