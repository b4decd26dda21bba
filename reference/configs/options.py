"""Names that options may have, and constants of operations, shared by the PyTorch and the JAX references."""

from typing import Literal

ScoreFunction = Literal["sigmoid", "softmax"]
VelocitySign = Literal["noise - data", "data - noise"]
TimestepSampling = Literal["uniform", "logit-normal", "mode", "earlier", "later"]
Optimizer = Literal["adamw", "adam", "sgd"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]
ComputeDType = Literal["float32", "bfloat16", "float16"]
SecondExpertPolicy = Literal["all", "sampling", "random"]
GeluApproximation = Literal["none", "tanh"]
QkNorm = Literal["rms_norm"]
ClipActivation = Literal["quick_gelu", "gelu"]
RotaryPairs = Literal["interleaved", "half-split"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]
TimestepBias = Literal["none", "earlier", "later", "range"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
SigmaSchedule = Literal["interpolated", "karras", "exponential", "beta"]
FinalSigma = Literal["zero", "sigma_min"]
TimeShift = Literal["exponential", "linear"]
FlowStart = Literal["training range", "1 - n / num_steps"]
SnrOfTimes = Literal["data over noise", "noise over data"]
FlowWeighting = Literal["none", "sigma_sqrt", "cosmap"]
CycleVAEMode = Literal["cycle", "t2l", "l2t"]
LatentTimeMode = Literal["random", "full"]
PseudoTokens = Literal["argmax", "categorical"]
TokenConfidence = Literal["probability", "margin", "negative_entropy"]
PlaceStrategy = Literal["static", "dynamic", "sequential", "entropy_bounded"]
Remasking = Literal["low_confidence", "random"]
DreamAlgorithm = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
MaskTimes = Literal["sequence", "sample", "block"]
MaskWeighting = Literal["inverse", "none", "linear", "cart"]
LossMean = Literal["tokens", "masked", "examples"]

E4M3_MAX = 448.0  # the largest number of float8_e4m3fn
SMALLEST_WEIGHT_SUM = 2.0**-23  # what `gshard_top2` divides by at least: float32's epsilon, as in public models
LARGEST_CHURN = 2**0.5 - 1  # Karras et al. (arXiv:2206.00364), algorithm 2: sigma may at most grow by sqrt(2)
IGNORED_LABEL = -100  # of a token that is not trained on: torch's ignore_index
