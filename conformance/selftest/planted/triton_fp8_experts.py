"""Bugs in the text of our Triton experts of e4m3."""

from gaugeblock.conformance.selftest.edits import mutant

FP8 = "quantized_experts.fused_swiglu_fp8"
FIRST, SECOND = "fp8_experts._first_product_kernel", "fp8_experts._second_product_kernel"
BLOCK, STEP, STEPS = "fp8_experts._block_of", "fp8_experts._group_and_columns", "fp8_experts._num_steps"
PRODUCT, BITS = "fp8_experts._scaled_product", "quantization.from_e4m3_bits"

mutant(
    FP8, "blocks-of-128", "The block of a row is counted in 128s, whatever the size of blocks.", BLOCK,
    "// BLOCK_SIZE", "// 128", "parity", "structural", "vllm#49596",
)  # fmt: skip
mutant(
    FP8, "blocks-of-ups-begin-anew", "Blocks of up rows are counted from the first up row on.", FIRST,
    "_block_of(ups, 2 * intermediate_size, BLOCK_SIZE, ONE_BLOCK)",
    "(_block_of(gates, intermediate_size, BLOCK_SIZE, ONE_BLOCK) + intermediate_size // BLOCK_SIZE)", "parity", "boundary",
)  # fmt: skip
mutant(
    FP8, "last-block-has-the-scale-before", "Of rows, a block that is not whole has the scale of the one before it.", BLOCK,
    "tl.minimum(rows, num_rows - 1) // BLOCK_SIZE",
    "tl.minimum(rows // BLOCK_SIZE, tl.maximum(num_rows // BLOCK_SIZE - 1, 0))", "parity", "boundary",
)  # fmt: skip
mutant(
    FP8, "scales-transposed", "The blocks of a row and those of a column are swapped.", "fp8_experts._second_product",
    "*w2_scales.stride()", "*w2_scales.mT.stride()", "parity", "structural", "vLLM block-fp8",
)  # fmt: skip
mutant(
    FP8, "scales-of-the-first-expert", "The second product has the scales of expert 0.", SECOND,
    "expert * scales_expert_stride", "expert * 0", "parity", "structural", "vllm#57092",
)  # fmt: skip
mutant(
    FP8, "scales-of-the-first-column", "All blocks of some rows have the scale of the first.", FIRST,
    "scale_offset = group * scales_hidden_stride", "scale_offset = group * 0", "parity", "structural", "sglang#38573",
)  # fmt: skip
mutant(
    FP8, "scales-side-by-side", "The scales of a row are taken to lie side by side.", SECOND,
    "group * scales_depth_stride", "group", "layout", "memory", "Liger-Kernel#1377",
)  # fmt: skip
mutant(
    FP8, "one-scale-for-a-token", "A token's groups have the scale of the first.", FIRST,
    "tl.cdiv(hidden_size, BLOCK_SIZE) + group", "tl.cdiv(hidden_size, BLOCK_SIZE)", "parity", "structural",
)  # fmt: skip
mutant(
    FP8, "scales-of-activations-forgotten", "Products of quantized activations are not scaled back.", SECOND,
    "left_scales = tl.load(", "left_scales = 1.0 + 0.0 * tl.load(", "parity", "structural",
)  # fmt: skip
mutant(
    FP8, "groups-run-into-each-other", "A step takes columns of the next group, which it has scales of its own for.", STEP,
    "(within < BLOCK_SIZE) & ", "", "parity", "boundary",
)  # fmt: skip
mutant(
    FP8, "last-group-left-out", "Sums end with the last group that is whole.", STEPS,
    " + tl.cdiv(depth % BLOCK_SIZE, BLOCK_DEPTH)", "", "parity", "boundary",
)  # fmt: skip
mutant(
    FP8, "numbers-past-the-end", "The mask of a sum is off by one: a column too many.", STEP,
    "columns < depth", "columns <= depth", "out_of_bounds", "memory",
)  # fmt: skip
mutant(
    FP8, "accumulator-in-bfloat16", "What a step adds is rounded to bfloat16.", PRODUCT,
    "return product", "return product.to(tl.bfloat16)", "parity", "precision", "pytorch/helion#2141",
)  # fmt: skip
mutant(
    FP8, "exponent-of-another-format", "Bits are read as those of float8_e4m3fnuz.", BITS,
    "* 256.0", "* 128.0", "parity", "structural",
)  # fmt: skip
mutant(
    FP8, "bits-without-nan", "What stands for NaN is read as 480.", BITS,
    'tl.where(magnitude == 0x7F, float("nan"), number)', "number", "parity", "structural",
)  # fmt: skip
