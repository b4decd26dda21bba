"""What only Triton kernels need: an interpreter that watches them, chips that are not there."""
