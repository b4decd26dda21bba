"""Bugs of public kernels, planted into right ones."""
