"""Versions made of PyTorch's own compiled operations, for the CPU: files and functions as in `reference.torch`."""
