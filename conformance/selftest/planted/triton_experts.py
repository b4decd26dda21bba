"""Bugs in the text of our Triton experts."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

EXPERTS = "experts.fused_swiglu"
FAST: dict[str, Any] = {"implementation": "triton-fast", "batch_invariant": False, "dtypes": ("bfloat16",)}

mutant(
    EXPERTS, "gate-and-up-swapped", "The first half of w13 is taken for up.", "expert_products._tile_of_first_product",
    "activate(gate, up,", "activate(up, gate,", "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    EXPERTS, "depth-mask-dropped", "The last tile of a sum reads on behind the row.",
    "grouped_matmul._tile_of_rows_times_matrices",
    "steps < depth", "steps >= 0", "parity", "boundary", "vllm#2453",
)  # fmt: skip
mutant(
    EXPERTS, "other-missing", "Lanes behind the end of the sum hold whatever the load leaves there.",
    "expert_products._tile_of_first_product",
    ", other=0.0", "", "masked_lanes", "boundary",
)  # fmt: skip
mutant(
    EXPERTS, "one-depth-tile-less", "The loop over the sum ends one tile early.", "expert_products._tile_of_first_product",
    "range(0, hidden_size, BLOCK_DEPTH)", "range(0, hidden_size - BLOCK_DEPTH, BLOCK_DEPTH)", "parity", "boundary",
)  # fmt: skip
mutant(
    EXPERTS, "column-mask-dropped", "Columns behind the last are stored over the next row's.",
    "grouped_matmul._tile_of_rows_times_matrices",
    "mask=row_exists & column_exists", "mask=row_exists & (columns >= 0)", "parity", "memory",
)  # fmt: skip
mutant(
    EXPERTS, "store-past-the-end", "The column mask of the combine is off by one.", "dispatch._sum_rows_kernel",
    "columns < width", "columns <= width", "out_of_bounds", "memory",
)  # fmt: skip
mutant(
    EXPERTS, "tf32-left-on", "Operands are rounded to tf32, as is tl.dot's default.", "expert_products._tile_of_first_product",
    'input_precision="ieee"', 'input_precision="tf32"', "parity", "precision",
)  # fmt: skip
mutant(
    EXPERTS, "needless-blocks-compute-again", "Blocks that this routing does not need do the last row beside its own program.",
    "dispatch.split_into_blocks", "starts_B.minimum(expert_ends_B)", "starts_B.minimum(expert_ends_B - 1)", "races", "memory",
)  # fmt: skip
mutant(
    EXPERTS, "float16-accumulator", "Gate and up are rounded to float16 after each tile.",
    "expert_products._tile_of_first_product",
    'input_precision="ieee")', 'input_precision="ieee").to(tl.float16).to(tl.float32)', "parity", "precision",
    "pytorch/helion#2141",
    dtypes=("float16",),
)  # fmt: skip
mutant(
    EXPERTS, "partial-blocks-dropped", "An expert's rows behind its last full block are not computed.",
    "dispatch._needed_blocks",
    ".add(block_rows - 1) // block_rows", " // block_rows", "fully_written", "boundary",
)  # fmt: skip
mutant(
    EXPERTS, "blocks-overlap", "A block runs on into the next expert's rows, whose own block may come before or after.",
    "dispatch.split_into_blocks", "(starts_B + block_rows).minimum(expert_ends_B)", "(starts_B + block_rows).clamp(max=num_rows)",
    "program_order", "boundary",
)  # fmt: skip
mutant(
    EXPERTS, "last-choice-forgotten", "The combine leaves out each token's last choice.", "dispatch._sum_rows_kernel",
    "range(top_k)", "range(top_k - 1)", "parity", "structural",
)  # fmt: skip
mutant(
    EXPERTS, "weight-stride-ignored", "Router weights of a token are taken to lie side by side.", "dispatch._sum_rows_kernel",
    "weight_ptrs += weights_choice_stride", "weight_ptrs += 1", "layout", "memory",
)  # fmt: skip
mutant(
    EXPERTS, "matrix-stride-ignored", "The rows of w13 are taken to lie one behind the other.",
    "expert_products._tile_of_first_product",
    " * w1_row_stride", " * hidden_size", "layout", "memory", "Liger-Kernel#1377",
)  # fmt: skip
mutant(
    EXPERTS, "tiles-chosen-by-tokens", "Small batches sum in shorter tiles.", "grouped_matmul.choose_tiles",
    "Tiles(32, 64, 16,", "Tiles(32, 64, 32 if operands[0].shape[0] > 8 else 16,", "batch_invariance", "state", "vllm#36488",
)  # fmt: skip
mutant(
    EXPERTS, "silu-without-the-product-rule", "silu' is taken for the sigmoid.", "activations._nonlinearity_and_slope",
    "sigmoid * (1.0 + alpha * x * (1.0 - sigmoid))", "sigmoid", "gradients", "gradient",
)  # fmt: skip
mutant(
    EXPERTS, "weight-gradient-misses-the-last-row", "An expert's last row is left out of the gradients of w13 and w2.",
    "grouped_matmul._tile_of_sum_of_products", "positions < end", "positions < end - 1", "gradients", "gradient",
)  # fmt: skip
mutant(
    EXPERTS, "gradient-of-unused-experts-unwritten", "Experts without rows write no gradient.",
    "grouped_matmul._tile_of_sum_of_products",
    "    tl.store(", "    if start == end:\n        return\n    tl.store(", "fully_written", "memory", "vllm-ascend#17009",
)  # fmt: skip
mutant(
    EXPERTS, "cotangent-stride-ignored", "Neighbouring gradients are taken to lie side by side.",
    "expert_products._through_activation_kernel",
    "steps * gradient_hidden_stride", "steps", "gradient_layout", "gradient",
)  # fmt: skip
mutant(
    EXPERTS, "ids-unchecked", "An id out of range addresses memory that is not there.", "experts._apply",
    "validation.expert_ids_in_range(topk_ids, num_experts=expert.w1.shape[0])", "pass", "rejections", "error-contract",
)  # fmt: skip
mutant(
    EXPERTS, "silent-fallback", "The reference computes, and no kernel is launched.", "experts.fused_swiglu",
    "return _apply(SWIGLU, hidden_states,",
    "from gaugeblock.reference.torch.experts import fused_swiglu as reference\n"
    "    return reference(hidden_states, w13, w2, topk_weights, topk_ids)\n"
    "    return _apply(SWIGLU, hidden_states,",
    "path_witness", "structural",
)  # fmt: skip
mutant(
    EXPERTS, "programs-share-tiles", "Each program of a persistent grid goes on with its neighbour's tile.",
    "grouped_matmul._rows_times_matrices_kernel", "tl.num_programs(0)", "1", "races", "memory", **FAST,
)  # fmt: skip
mutant(
    EXPERTS, "short-group-taken-for-full", "Tiles are counted as if the last group of row blocks were full.",
    "persistent.tile_of", "tl.minimum(num_blocks - first, GROUP)", "GROUP", "out_of_bounds", "boundary", **FAST,
)  # fmt: skip
mutant(
    EXPERTS, "descriptor-of-the-first-expert", "What a descriptor reads is expert 0's.",
    "grouped_matmul._tile_of_rows_times_matrices", "expert.to(tl.int32)", "0", "parity", "structural", **FAST,
)  # fmt: skip
mutant(
    EXPERTS, "gate-read-for-up", "Both are read from the first half by the descriptor.", "expert_products._tile_of_first_product",
    "[expert.to(tl.int32), 1,", "[expert.to(tl.int32), 0,", "parity", "structural", **FAST,
)  # fmt: skip
