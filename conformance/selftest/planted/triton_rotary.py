"""Bugs in the text of our Triton rotary embeddings."""

from gaugeblock.conformance.selftest.edits import mutant

ROTATE, NORMED = "rotary.rotate", "rotary.qk_norm_rotary"

mutant(
    ROTATE, "last-heads-unread", "A block of too few heads loses its last.", "rotary._turn_kernel",
    "num_heads - first_head)", "num_heads - first_head - 1)", "parity", "boundary",
)  # fmt: skip
mutant(
    ROTATE, "heads-of-the-first-block", "Every block of heads begins with the first head.", "rotary._place",
    "(item - chunk * head_blocks).to(tl.int64) * BLOCK_HEADS", "(item - item).to(tl.int64)", "parity", "boundary",
)  # fmt: skip
mutant(
    ROTATE, "feature-stride-ignored", "Neighbouring features are taken to lie side by side.", "rotary._load_head",
    "* stride", "* 1", "layout", "memory",
)  # fmt: skip
mutant(
    ROTATE, "angle-stride-ignored", "Neighbouring sines are taken to lie side by side.", "rotary._load_angles",
    "pairs * sin_stride", "pairs", "layout", "memory",
)  # fmt: skip
mutant(
    ROTATE, "gradient-turned-forward", "The gradient is turned by the angle, not back.", "rotary._turn_kernel",
    "sin = -sin", "sin = sin", "gradients", "gradient",
)  # fmt: skip
mutant(
    ROTATE, "padding-stored", "Features behind a head's last are stored, over the next one's.", "rotary._store_head",
    "token_exists & exists", "token_exists", "parity", "boundary",
)  # fmt: skip
mutant(
    NORMED, "mean-over-pairs", "The sum of squares is divided by the number of pairs.", "rotary._rstd",
    "/ head_size + eps", "/ (head_size // 2) + eps", "parity", "structural",
)  # fmt: skip
mutant(
    NORMED, "eps-forgotten", "Nothing is added to the mean square.", "rotary._rstd",
    "/ head_size + eps", "/ head_size + 0.0 * eps", "parity", "precision",
)  # fmt: skip
mutant(
    NORMED, "projection-forgotten", "The gradient along the normalized head stays.", "rotary._norm_backward_kernel",
    "y_gradient - y * projection", "y_gradient + 0.0 * projection", "gradients", "gradient",
)  # fmt: skip
mutant(
    NORMED, "one-item-for-each-program", "A program adds up the weight's gradient of its last item alone.",
    "rotary._norm_backward_kernel", "y_sums += y_gradient * y", "y_sums = y_gradient * y", "gradients", "gradient",
)  # fmt: skip
mutant(
    NORMED, "cotangent-stride-ignored", "Neighbouring gradients are taken to lie side by side.", "rotary._norm_backward_kernel",
    "gradient_ptrs, gradient_stride", "gradient_ptrs, 1", "gradient_layout", "gradient",
)  # fmt: skip
