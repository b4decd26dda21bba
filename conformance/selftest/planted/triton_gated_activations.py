"""Bugs in the text of our Triton gated activations."""

from gaugeblock.conformance.selftest.edits import mutant

SWIGLU, GEGLU = "gated_activations.swiglu", "gated_activations.geglu"

mutant(
    SWIGLU, "up-stride-ignored", "Neighbouring columns are taken to lie side by side.", "gated_activations._load",
    "columns * column_stride", "columns", "layout", "memory",
)  # fmt: skip
mutant(
    SWIGLU, "tokens-of-the-first-example", "Every example is read from the first.", "gated_activations._load",
    "example * example_stride + ", "0 * example_stride + ", "parity", "structural",
)  # fmt: skip
mutant(
    SWIGLU, "columns-behind-the-last", "Columns behind the last one are stored, over the next token's.",
    "gated_activations._forward_kernel", "(columns < width)", "(columns < width + 1)", "out_of_bounds", "boundary",
)  # fmt: skip
mutant(
    SWIGLU, "tokens-of-a-block-forgotten", "The last token of an example is not written.", "gated_activations._forward_kernel",
    "(tokens < num_tokens)", "(tokens < num_tokens - 1)", "parity", "boundary",
)  # fmt: skip
mutant(
    SWIGLU, "gradients-swapped", "The gradients of gate and up change places.", "gated_activations._backward_kernel",
    "_, of_gate, of_up", "_, of_up, of_gate", "gradients", "gradient",
)  # fmt: skip
mutant(
    GEGLU, "tanh-for-erf", "The GELU is the tanh's, whatever is asked for.", "gated_activations.geglu",
    "NONLINEARITIES[approximation]", 'NONLINEARITIES["tanh"]', "parity", "structural",
)  # fmt: skip
mutant(
    GEGLU, "gradient-of-silu", "Backward takes the SiLU.", "gated_activations._backward_kernel",
    "1.0, 0.0, NONLINEARITY", '1.0, 0.0, "silu"', "gradients", "gradient",
)  # fmt: skip
