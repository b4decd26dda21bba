"""Bugs in the text of our Triton dispatch."""

from gaugeblock.conformance.selftest.edits import mutant

PERMUTE, UNPERMUTE = "dispatch.permute", "dispatch.unpermute"
GATHER, SUM, DOT = "dispatch._gather_kernel", "dispatch._sum_listed_kernel", "dispatch._dot_listed_kernel"

mutant(
    PERMUTE, "last-column-lost", "The column mask is off by one.", GATHER,
    "(columns < width)", "(columns < width - 1)", "parity", "boundary",
)  # fmt: skip
mutant(
    PERMUTE, "order-stride-ignored", "The order is addressed as if it were contiguous.", GATHER,
    "rows * order_stride", "rows", "layout", "memory",
)  # fmt: skip
mutant(
    PERMUTE, "row-for-token", "The routed row is taken for the token.", GATHER,
    ".to(tl.int64) // top_k", ".to(tl.int64)", "parity", "structural", "flashinfer#2629",
)  # fmt: skip
mutant(
    UNPERMUTE, "last-choice-forgotten", "Each token's last choice is left out.", SUM,
    "tl.load(starts_ptr + row + 1))", "tl.load(starts_ptr + row + 1) - 1)", "parity", "boundary",
)  # fmt: skip
mutant(
    UNPERMUTE, "accumulator-of-the-rows", "Sums are rounded to the dtype of the rows after each addition.", SUM,
    "total += value", "total = (total + value).to(sums_ptr.dtype.element_ty).to(tl.float32)", "parity", "precision",
    dtypes=("bfloat16",),
)  # fmt: skip
mutant(
    UNPERMUTE, "dot-of-one-tile", "The gradient of a weight sees the first columns alone.", DOT,
    "range(0, width, BLOCK_COLUMNS)", "range(0, BLOCK_COLUMNS, BLOCK_COLUMNS)", "gradients", "boundary",
)  # fmt: skip
