"""Bugs in the text of our Triton LayerNorms."""

from gaugeblock.conformance.selftest.edits import mutant

NORM, GATED = "layers.layer_norm_modulate", "layers.gated_residual_layer_norm_modulate"

mutant(
    NORM, "padding-in-the-variance", "Lanes behind the last column are centred, squared and added.", "layers._forward_kernel",
    "tl.where(mask, hidden - mean, 0.0)", "hidden - mean", "parity", "boundary",
)  # fmt: skip
mutant(
    NORM, "eps-forgotten", "Nothing is added to the variance.", "layers._forward_kernel",
    "/ width + eps", "/ width + 0.0 * eps", "parity", "precision",
)  # fmt: skip
mutant(
    NORM, "one-forgotten", "The normalized token is multiplied by the scale alone.", "layers._forward_kernel",
    "(1.0 + scale)", "scale", "parity", "structural", "AdaLayerNormContinuous",
)  # fmt: skip
mutant(
    NORM, "scale-stride-ignored", "Neighbouring scales are taken to lie side by side.", "layers._forward_kernel",
    "columns * scale_stride", "columns", "layout", "memory",
)  # fmt: skip
mutant(
    NORM, "cotangent-stride-ignored", "Neighbouring gradients are taken to lie side by side.", "layers._backward_kernel",
    "columns * modulated_gradient_stride", "columns", "gradient_layout", "gradient",
)  # fmt: skip
mutant(
    NORM, "projection-forgotten", "The gradient along the normalized token stays.", "layers._backward_kernel",
    " - (normalized - mean_normalized) * projection", "", "gradients", "gradient",
)  # fmt: skip
mutant(
    NORM, "chunk-mask-dropped", "Sums of the next example's tokens are added.", "partial_sums._sum_chunks_kernel",
    "(chunks < num_chunks) & exists", "(chunks >= 0) & exists", "gradients", "boundary",
)  # fmt: skip
mutant(
    GATED, "gate-ignored", "The branch is added as it is.", "layers._load_hidden",
    "hidden += gate * ", "hidden += ", "parity", "structural",
)  # fmt: skip
mutant(
    GATED, "stream-gradient-lost", "What comes from the other use of the residual stream is lost.", "layers._backward_kernel",
    "gradient += _load(hidden_gradient_ptr", "gradient += 0.0 * _load(hidden_gradient_ptr", "gradients", "gradient",
)  # fmt: skip
mutant(
    GATED, "branch-gradient-without-its-gate", "The branch gets the gradient of the stream.", "layers._backward_kernel",
    "gradient * gate, mask=mask", "gradient + 0.0 * gate, mask=mask", "gradients", "gradient",
)  # fmt: skip
