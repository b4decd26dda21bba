"""Bugs in the text of our Triton experts beside SwiGLU."""

from gaugeblock.conformance.selftest.edits import mutant

GEGLU, MLP, OAI = "experts.fused_geglu", "experts.fused_gelu_mlp", "experts.fused_swiglu_oai"

mutant(
    GEGLU, "tanh-for-erf", "The approximation is taken for the GELU, whatever is asked for.", "experts.fused_geglu",
    "Activation(GELU[approximate])", 'Activation("gelu_tanh")', "parity", "structural",
)  # fmt: skip
mutant(
    GEGLU, "density-not-normalized", "The derivative has the exponential without its factor.",
    "activations._nonlinearity_and_slope", " * 0.3989422804014327", "", "gradients", "gradient",
)  # fmt: skip
mutant(
    MLP, "bias-through-every-block", "What a weight's gradient has of the second bias is added in each block of columns.",
    "expert_products._through_activation_kernel",
    "tl.where(column_block == 0, through_b2, 0.0)", "through_b2", "gradients", "gradient",
)  # fmt: skip
mutant(
    MLP, "bias-stride-ignored", "Neighbouring biases are taken to lie side by side.", "expert_products._tile_of_first_product",
    "gate_rows * b1_row_stride", "gate_rows", "layout", "memory",
)  # fmt: skip
mutant(
    MLP, "bias-of-the-first-expert", "Every expert adds expert 0's bias.", "expert_products._tile_of_first_product",
    "b1_ptr += expert * b1_expert_stride", "b1_ptr += 0", "parity", "structural", "vllm#57092",
)  # fmt: skip
mutant(
    OAI, "interleaved-read-as-halves", "Gate and up are taken from the halves of w13.", "activations.rows_of",
    "GATED and INTERLEAVED", "False", "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    OAI, "clamp-missing", "The gate is not clamped.", "activations._clamp",
    "tl.where(gate > limit, limit, gate)", "gate", "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    OAI, "clamp-from-below-too", "The gate is clamped on either side, as up is.", "activations._clamp",
    "tl.where(gate > limit, limit, gate)", "tl.where(gate > limit, limit, tl.where(gate < -limit, -limit, gate))",
    "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    OAI, "nan-clamped-away", "The smaller of NaN and the limit is the limit.", "activations._clamp",
    "tl.where(gate > limit, limit, gate)", "tl.minimum(gate, limit)", "parity", "structural",
)  # fmt: skip
mutant(
    OAI, "gradient-passes-the-clamp", "A clamped gate gets a gradient as if it were not.", "activations.activate_backward",
    "tl.where(gate > limit, 0.0, gate_gradient)", "gate_gradient", "gradients", "gradient",
)  # fmt: skip
mutant(
    OAI, "up-bias-of-the-gate", "Both add the bias of the gate.", "expert_products._tile_of_first_product",
    "up_rows * b1_row_stride", "gate_rows * b1_row_stride", "parity", "structural",
)  # fmt: skip
