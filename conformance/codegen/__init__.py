"""What compiles: every Triton kernel for chips that are not there."""
