"""Bugs of our DiT over ranks."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

DIT = "dit.dit"
TENSOR: dict[str, Any] = {
    "implementation": "tensor-parallel", "world_sizes": (1, 2), "rounding": "eager", "batch_invariant": False,
    "only": "num_heads % 4 == 0",
}  # fmt: skip
SEQUENCE: dict[str, Any] = {
    **TENSOR, "implementation": "sequence-parallel", "only": "num_heads % 4 == 0 and input_size // patch_size % 2 == 0",
}  # fmt: skip
ROWS = "torch.cat(rows) if len(rows) > 1 else rows[0]"

mutant(
    DIT, "qkv-by-ranks-alone", "Rows of queries, keys and values are cut as one block: the first rank has no values.",
    "tensor_parallel._Parts", "partition_rules.part(each, cut, rank=rank, ranks=ranks)",
    "each.tensor_split(ranks, cut.axis)[rank]", "world_size", "structural", "ColwiseParallel on a fused qkv", **TENSOR,
)  # fmt: skip
mutant(
    DIT, "heads-as-if-alone", "A rank cuts its features into as many heads as the model has.", "dit_tensor_parallel._attention",
    "config.num_heads // dist.get_world_size(group)", "config.num_heads", "world_size", "structural",
    "num_heads not divided after ColwiseParallel", **TENSOR,
)  # fmt: skip
mutant(
    DIT, "bias-of-every-rank", "Every rank adds the second layer's bias, and the sum has it as often.",
    "tensor_parallel.summed_linears", "total + bias", "total + dist.get_world_size(group) * bias", "world_size", "structural",
    "row-parallel linears with a bias", **TENSOR,
)  # fmt: skip
mutant(
    DIT, "no-sum-forward", "A rank goes on with its own part of the sum.", "tensor_parallel.summed_linears",
    f"SumOverRanks.apply({ROWS}, group)", f"({ROWS})", "world_size", "structural", "a skipped all-reduce", **TENSOR,
)  # fmt: skip
mutant(
    DIT, "no-sum-backward", "Gradients of tokens are those of the rank's own heads and features.",
    "tensor_parallel.gradients_summed", "SumOfGradients.apply(group, *tokens)", "tokens", "world_size", "gradient",
    "Megatron's f left out", **TENSOR,
)  # fmt: skip
mutant(
    DIT, "sum-backward-twice", "The gradient of a sum, which all ranks have, is added up over them.",
    "tensor_parallel.summed_linears", f"SumOverRanks.apply({ROWS}, group)",
    f"SumOverRanks.apply(SumOfGradients.apply(group, {ROWS})[0], group)", "world_size", "gradient",
    "autograd through all_reduce", **TENSOR,
)  # fmt: skip
mutant(
    DIT, "gradients-in-the-order-of-ranks", "Gradients of parts are put together as if a part were one block.",
    "tensor_parallel._joined", "blocks.flatten(cut.axis, cut.axis + 2)", "torch.cat(of_ranks.unbind(), cut.axis)",
    "world_size", "gradient", "full_tensor() of a fused qkv", **TENSOR,
)  # fmt: skip

mutant(
    DIT, "attention-to-own-tokens", "Tokens attend to those of their rank.", "sequence_parallel.attention_over_ranks",
    "of_all = AllToAll.apply(heads, 2, 3, group)", "return functional.scaled_dot_product_attention(*heads.unbind())",
    "world_size", "structural", "data-parallel code on a cut sequence", **SEQUENCE,
)  # fmt: skip
mutant(
    DIT, "senders-in-another-order", "What came from the last rank is taken for the first one's.", "collectives.all_to_all",
    "torch.cat(arrived.unbind(), gathered)", "torch.cat(arrived.flip(0).unbind(), gathered)", "world_size", "structural",
    "buffers read in the order of arrival", **SEQUENCE,
)  # fmt: skip
mutant(
    DIT, "first-tokens-everywhere", "Every rank takes the first tokens.", "sequence_parallel.own_tokens",
    "[dist.get_rank(group)]", "[0]", "world_size", "structural", **SEQUENCE,
)  # fmt: skip
mutant(
    DIT, "gradients-of-own-tokens", "Gradients of parameters are those that the rank's own tokens give.",
    "dit_sequence_parallel.dit", "replicated(group, latents, *state.values())", "(latents, *state.values())", "world_size",
    "gradient", "sequence parallelism without its gradients' all-reduce", **SEQUENCE,
)  # fmt: skip
mutant(
    DIT, "gathered-gradients-summed", "The gradient of what is gathered, which all ranks have, is added up over them.",
    "collectives.GatherParts", "d_tensor.chunk(ctx.ranks, ctx.axis)[ctx.rank]",
    "ctx.ranks * d_tensor.chunk(ctx.ranks, ctx.axis)[ctx.rank]", "world_size", "gradient", "autograd through all_gather",
    **SEQUENCE,
)  # fmt: skip
