"""Bugs in the text of our Triton norms."""

from gaugeblock.conformance.selftest.edits import mutant

RMS, AFFINE = "norms.rms_norm", "norms.layer_norm_affine"
GROUP, SILU = "norms.group_norm", "norms.group_norm_silu"

mutant(
    RMS, "rms-eps-forgotten", "Nothing is added to the mean square.", "row_norms._forward_kernel",
    "/ width + eps", "/ width + 0.0 * eps", "parity", "precision",
)  # fmt: skip
mutant(
    RMS, "wide-rows-end-early", "The statistics of a wide row are those of its whole blocks.", "row_norms._statistics_kernel",
    "range(0, width, BLOCK_COLUMNS)", "range(0, width - BLOCK_COLUMNS, BLOCK_COLUMNS)", "parity", "boundary",
)  # fmt: skip
mutant(
    RMS, "leading-axes-flattened", "Leading axes are taken for one, whatever their strides.", "row_norms._rows_of",
    "all(outer == size * inner for outer, inner in zip(axes[-1][1], strides, strict=True))", "True", "layout", "memory",
)  # fmt: skip
mutant(
    RMS, "weight-stride-ignored", "Neighbouring weights are taken to lie side by side.", "row_norms._forward_kernel",
    "columns * weight_stride", "columns", "layout", "memory",
)  # fmt: skip
mutant(
    RMS, "cotangent-stride-ignored", "Neighbouring gradients are taken to lie side by side.", "row_norms._load_pair",
    "columns * gradient_column_stride", "columns", "gradient_layout", "gradient",
)  # fmt: skip
mutant(
    RMS, "first-blocks-alone", "A program's sums are those of its last block of rows.", "row_norms._backward_kernel",
    "weight_sum += gradient * normalized", "weight_sum = gradient * normalized", "gradients", "gradient",
)  # fmt: skip
mutant(
    RMS, "projection-forgotten", "The gradient along the row stays.", "row_norms._backward_kernel",
    "gradient - normalized * projection", "gradient", "gradients", "gradient",
)  # fmt: skip
mutant(
    AFFINE, "padding-in-the-variance", "Lanes behind the last column are squared and added.", "row_norms._forward_kernel",
    "tl.where(mask, inputs - mean, 0.0)", "inputs - mean", "parity", "boundary",
)  # fmt: skip
mutant(
    AFFINE, "mean-gradient-forgotten", "The mean of a row's gradient stays.", "row_norms._backward_kernel",
    "gradient -= mean_gradient", "gradient -= 0.0 * mean_gradient", "gradients", "gradient",
)  # fmt: skip
mutant(
    AFFINE, "bias-sums-of-scaled-gradients", "The bias gets the gradient of the normalized row.", "row_norms._backward_kernel",
    "bias_sum += gradient", "bias_sum += gradient * weight", "gradients", "gradient",
)  # fmt: skip
mutant(
    GROUP, "padding-in-the-mean", "Lanes behind the last pixel are numbers of the group.", "group_norm_kernels._statistics",
    "counts += mask.to(tl.float32)", "counts += 1.0", "parity", "boundary",
)  # fmt: skip
mutant(
    GROUP, "last-part-counts-as-a-whole-one", "Means of parts are averaged as if of one size.", "group_norm_kernels._counts",
    "tl.minimum(tl.maximum(left, 0), part_pixels)", "(left > 0) * part_pixels", "parity", "boundary",
)  # fmt: skip
mutant(
    GROUP, "distances-of-parts-forgotten", "Parts are merged as if they had one mean.", "group_norm_kernels._merged_parts",
    "counts * distances * distances", "0.0 * counts * distances", "parity", "structural",
)  # fmt: skip
mutant(
    GROUP, "distances-of-lanes-forgotten", "Lanes are merged as if they had one mean.", "group_norm_kernels._merged",
    "squares + counts * (means - mean) * (means - mean)", "squares", "parity", "structural",
)  # fmt: skip
mutant(
    GROUP, "weights-of-the-first-group", "Weights are addressed by the channel's place in its group.",
    "group_norm_kernels.group_norm_kernel", "weight_ptr += channel * weight_stride", "weight_ptr += 0 * channel",
    "parity", "structural",
)  # fmt: skip
mutant(
    GROUP, "rows-of-pixels-side-by-side", "Rows of an image are taken to follow each other.", "group_norms._strides",
    "any(each.stride(2) != width * each.stride(3) for each in images)", "False", "layout", "memory",
)  # fmt: skip
mutant(
    GROUP, "sums-of-one-part", "Backward of a large group takes the sums of its first part.", "group_norm_kernels._load_parts",
    "parts < tl.num_programs(1)", "(parts < tl.num_programs(1)) & ((kind < 1) | (parts < 1))", "gradients", "gradient",
)  # fmt: skip
mutant(
    SILU, "silu-forgotten-backward", "The gradient of the norm is that of silu's result.", "group_norm_kernels._load_pair",
    "if SILU:", "if False:", "gradients", "gradient",
)  # fmt: skip
mutant(
    SILU, "normalized-padding-has-gradients", "Lanes behind the last pixel are centred, and counted.",
    "group_norm_kernels._load_pair",
    "tl.where(mask, (_load(images_ptrs, mask) - mean) * rstd, 0.0)", "(_load(images_ptrs, mask) - mean) * rstd", "gradients",
    "gradient",
)  # fmt: skip
