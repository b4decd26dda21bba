"""Operations as Triton kernels, forward and backward: a file per kernel family, and `launch.py` for all."""
