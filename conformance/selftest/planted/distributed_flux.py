"""Bugs of our Flux over ranks."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

FLUX, HEADS_FIT = "flux.flux", "num_attention_heads % 4 == 0"
TENSOR: dict[str, Any] = {
    "implementation": "tensor-parallel", "world_sizes": (1, 2), "rounding": "eager", "batch_invariant": False, "only": HEADS_FIT,
}  # fmt: skip
SEQUENCE: dict[str, Any] = {
    **TENSOR, "implementation": "sequence-parallel",
    "only": f"{HEADS_FIT} and num_image_tokens % 4 == 0 and num_text_tokens % 4 == 0",
}  # fmt: skip

mutant(
    FLUX, "norms-of-own-heads", "Gradients of the weights of norms are those of the rank's own heads.",
    "flux_tensor_parallel._summed_backward", "return {**block, **dict(zip(names, summed[len(tokens) :], strict=True))}",
    "return block", "world_size", "gradient", "Megatron: q_layernorm and k_layernorm without a gradient all-reduce", **TENSOR,
)  # fmt: skip
mutant(
    FLUX, "norms-of-the-text-left-out", "Of the norms, those of the text keep the gradients of the rank's own heads.",
    "flux_tensor_parallel._joint_attention", "(*HEADS[3:], *TEXT_HEADS[3:])", "HEADS[3:]", "world_size", "gradient", **TENSOR,
)  # fmt: skip
mutant(
    FLUX, "text-of-own-features", "Gradients that the text's feed-forward networks return are those of the rank's own features.",
    "flux_tensor_parallel._feed_forwards", "zip(names, tokens, strict=True)", "zip(names, (tokens[0], text_BTD), strict=True)",
    "world_size", "gradient", "Megatron's f on one stream of two", **TENSOR,
)  # fmt: skip
mutant(
    FLUX, "no-sum-backward-of-single-blocks", "Of blocks with one stream, gradients of tokens are those of the rank's own part.",
    "flux_tensor_parallel._single_branch", "inner_BJI = single_inner(block, inputs_BJD,",
    "inner_BJI = single_inner(block, joint_BJD,", "world_size", "gradient", "Megatron's f left out", **TENSOR,
)  # fmt: skip
mutant(
    FLUX, "proj-out-as-one-block", "The last product's columns are cut once, not attention's and the hidden layer's each.",
    "tensor_parallel._Parts", "partition_rules.part(each, cut, rank=rank, ranks=ranks)",
    "(each.tensor_split(ranks, 1)[rank] if cut.blocks == 5 else partition_rules.part(each, cut, rank=rank, ranks=ranks))",
    "world_size", "structural", "RowwiseParallel on Flux' fused linear2", **TENSOR,
)  # fmt: skip
mutant(
    FLUX, "hidden-layer-as-one-block", "The rows that make the hidden layer are cut once, its columns in blocks.",
    "tensor_parallel._Parts", "partition_rules.part(each, cut, rank=rank, ranks=ranks)",
    "(each.tensor_split(ranks, 0)[rank] if cut.blocks == 4 else partition_rules.part(each, cut, rank=rank, ranks=ranks))",
    "world_size", "structural", "ColwiseParallel on Flux' fused linear1", **TENSOR,
)  # fmt: skip

mutant(
    FLUX, "places-of-the-first-tokens", "Every rank turns its image as if it were the first part.",
    "flux_sequence_parallel.flux", "places = (own_tokens(each[None], group)[0] for each in (img_ids, txt_ids))",
    "places = [each[: len(each) // group.size()] for each in (img_ids, txt_ids)]", "world_size", "structural",
    "rotary tables not cut with the sequence", **SEQUENCE,
)  # fmt: skip
mutant(
    FLUX, "conditions-of-one-rank", "Gradients of the pooled text are those that the rank's own tokens give.",
    "flux_sequence_parallel.flux", "(*tokens, pooled_BI,", "(*tokens, pooled_projections.to(pooled_BI.dtype),",
    "world_size", "gradient", "sequence parallelism: what steers all tokens is summed over none", **SEQUENCE,
)  # fmt: skip
mutant(
    FLUX, "text-to-own-image", "Tokens attend to those of their rank.", "flux_sequence_parallel._attention",
    "attention_over_ranks(torch.stack([query, key, value]), group)",
    "torch.nn.functional.scaled_dot_product_attention(query, key, value)", "world_size", "structural",
    "data-parallel code on a cut sequence", **SEQUENCE,
)  # fmt: skip
