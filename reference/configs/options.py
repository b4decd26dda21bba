"""Names that options may have, and constants of operations, shared by the PyTorch and the JAX references."""

from typing import Literal

ScoreFunction = Literal["sigmoid", "softmax"]
VelocitySign = Literal["noise - data", "data - noise"]
TimestepSampling = Literal["uniform", "logit-normal"]
SecondExpertPolicy = Literal["all", "sampling", "random"]
GeluApproximation = Literal["none", "tanh"]
ClipActivation = Literal["quick_gelu", "gelu"]
RotaryPairs = Literal["interleaved", "half-split"]

E4M3_MAX = 448.0  # the largest number of float8_e4m3fn
SMALLEST_WEIGHT_SUM = 2.0**-23  # what `gshard_top2` divides by at least: float32's epsilon, as in public models
