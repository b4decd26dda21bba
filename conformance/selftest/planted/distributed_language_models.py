"""Bugs of our language models over ranks.

Not there: a bias that every rank adds to a sum. The last products of these models' branches have none.
"""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

SDAR, MOE, CACHED = "sdar.sdar", "sdar.sdar_moe", "sdar.sdar_cached"
LLADA, DREAM = "llada.llada", "dream.dream"
HEADS = "num_key_value_heads % 4 == 0 and vocab_size % 4 == 0"
OF_RANKS: dict[str, Any] = {"world_sizes": (1, 2), "rounding": "eager", "batch_invariant": False}
TENSOR = OF_RANKS | {"implementation": "tensor-parallel", "only": f"{HEADS} and intermediate_size % 4 == 0"}
TENSOR_MOE = TENSOR | {"only": f"{HEADS} and num_experts % 4 == 0"}
EXPERT = OF_RANKS | {"implementation": "expert-parallel", "only": "num_experts % 4 == 0", "sharding": "data_parallel"}

mutant(
    SDAR, "norms-of-own-heads", "Gradients of the weights of heads' norms are those of the rank's own heads.",
    "decoder_tensor_parallel._norms_summed", "return {**parts, **dict(zip(names, summed, strict=True))}", "return parts",
    "world_size", "gradient", "Megatron: q_layernorm and k_layernorm without a gradient all-reduce", **TENSOR,
)  # fmt: skip
mutant(
    SDAR, "gradients-of-own-part", "Gradients of tokens are those of the rank's own heads, features and logits.",
    "decoder_tensor_parallel._on_ranks", "gradients_summed(group, tokens)[0]", "tokens", "world_size", "gradient",
    "Megatron's f left out", **TENSOR,
)  # fmt: skip
mutant(
    SDAR, "sums-of-rounded-parts", "Ranks' products are rounded to bfloat16 before they are added up.",
    "tensor_parallel.summed_linears", "at_least_float32(inner @ weight.mT)", "at_least_float32((inner @ weight.mT).bfloat16())",
    "parity", "precision", "Diffulex's all-reduce of bf16", **TENSOR,
)  # fmt: skip
mutant(
    SDAR, "rows-before-the-first", "Ids of ranks before are taken for the first row that a rank has.",
    "decoder_tensor_parallel._embed", "(own_ids >= 0) & (own_ids < len(table))", "own_ids < len(table)", "world_size",
    "structural", "vocabulary-parallel embeddings without a mask", **TENSOR,
)  # fmt: skip
mutant(
    DREAM, "row-after-the-last", "The first id of the next rank is taken for the last row that a rank has.",
    "decoder_tensor_parallel._embed", "own_ids < len(table)", "own_ids <= len(table)", "world_size", "boundary",
    "vocab_end_index taken to be inclusive", **TENSOR,
)  # fmt: skip
mutant(
    LLADA, "head-without-a-sum", "Gradients that the head returns are those of the rank's part of the vocabulary.",
    "decoder_composition.decode", 'parts.entering(norm(parts, state, "model.norm", hidden_BSD, config))',
    'norm(parts, state, "model.norm", hidden_BSD, config)', "world_size", "gradient",
    "ColumnParallelLinear of a head whose input's gradient is not reduced", **TENSOR,
)  # fmt: skip
mutant(
    CACHED, "past-of-another-rank", "A rank gets the past of the heads that another one has.", "tensor_parallel._Parts",
    "cut, rank=rank, ranks=ranks", "cut, rank=(ranks - 1 - rank if cut.axis == 2 else rank), ranks=ranks", "world_size",
    "structural", "KV caches dealt by another order of ranks than projections", **TENSOR,
)  # fmt: skip
mutant(
    CACHED, "kept-of-ranks-reversed", "What is to be kept is gathered in the opposite order of the ranks.",
    "collectives.GatherParts", "return torch.cat(of_ranks, axis)",
    "return torch.cat(of_ranks[::-1] if tensor.ndim == 5 else of_ranks, axis)", "world_size", "structural", **TENSOR,
)  # fmt: skip
mutant(
    MOE, "experts-sum-twice", "Gradients that experts return, which their ranks have added up, are added up again.",
    "decoder_composition.experts", 'norm(parts, state, "post_attention_layernorm", hidden_BSD, config).flatten(0, 1)',
    'parts.entering(norm(parts, state, "post_attention_layernorm", hidden_BSD, config)).flatten(0, 1)', "world_size", "gradient",
    "autograd through all_reduce", **TENSOR_MOE,
)  # fmt: skip
mutant(
    MOE, "gradients-of-own-examples", "Gradients of what is whole on every rank are those of its own examples.",
    "decoder_expert_parallel.sdar_moe_of_parts", "{**parts, **dict(zip(names, summed, strict=True))}", "parts", "world_size",
    "gradient", "expert parallelism without data parallelism's reduction", **EXPERT,
)  # fmt: skip
mutant(
    MOE, "embedding-forgotten", "Gradients of layers are added up over the ranks, those around the layers are not.",
    "decoder_expert_parallel.sdar_moe_of_parts", 'if ".mlp." not in name', 'if ".layers." in name and ".mlp." not in name',
    "world_size", "gradient", "wrappers of layers alone", **EXPERT,
)  # fmt: skip
mutant(
    MOE, "routers-of-own-examples", "Gradients of routers are those of a rank's own tokens.", "moe_layers._Parts",
    "if self.held.splits_tokens:", "if False:", "world_size", "gradient", "DeepSpeed: gate parameters taken for an expert's",
    **EXPERT,
)  # fmt: skip
