"""Bugs in the text of our Triton quantization."""

from gaugeblock.conformance.selftest.edits import mutant

GROUPS = "quantization.quantize_token_groups"
BITS, KERNEL = "quantization.e4m3_bits", "quantization._quantize_kernel"

mutant(
    GROUPS, "ties-toward-zero", "A quotient between two numbers goes to the smaller one.", BITS,
    " + ((magnitude >> 20) & 1)", "", "parity", "precision",
)  # fmt: skip
mutant(
    GROUPS, "subnormal-numbers-flushed", "What is below the smallest normal number becomes 0.", BITS,
    "0x3C800000, small, normal", "0x3C800000, 0, normal", "parity", "precision",
)  # fmt: skip
mutant(
    GROUPS, "exponent-of-another-format", "The exponent's bias is that of float8_e4m3fnuz.", BITS,
    "120 << 3", "119 << 3", "parity", "structural",
)  # fmt: skip
mutant(
    GROUPS, "nan-becomes-a-number", "The bits of NaN are rounded as if they were a number's.", BITS,
    "tl.where(magnitude > 0x7F800000, 0x7F, rounded)", "rounded", "parity", "structural",
)  # fmt: skip
mutant(
    GROUPS, "nan-is-no-largest", "A NaN is not the largest of its group, whose numbers stay.", KERNEL,
    "float(\"nan\"), most", "most, most", "parity", "structural",
)  # fmt: skip
mutant(
    GROUPS, "one-column-too-many", "A group's largest element may be the next group's first.", KERNEL,
    "columns < end", "columns <= end", "parity", "boundary",
)  # fmt: skip
mutant(
    GROUPS, "stride-ignored", "The elements of a token are taken to lie side by side.", KERNEL,
    "columns * hidden_stride", "columns", "layout", "memory", "Liger-Kernel#1377",
)  # fmt: skip
mutant(
    GROUPS, "scales-group-by-group", "Scales lie in columns, as some matrix kernels want them.", KERNEL,
    "tokens * num_groups + group", "group * num_tokens + tokens", "parity", "memory",
)  # fmt: skip
mutant(
    GROUPS, "token-mask-dropped", "Tokens behind the last are stored.", KERNEL,
    "exists = tokens < num_tokens", "exists = tokens >= 0", "out_of_bounds", "memory",
)  # fmt: skip
