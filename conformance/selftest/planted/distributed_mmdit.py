"""Bugs of our MMDiT over ranks."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

MMDIT = "mmdit.mmdit"
TENSOR: dict[str, Any] = {
    "implementation": "tensor-parallel", "world_sizes": (1, 2), "rounding": "eager", "batch_invariant": False,
    "only": "num_attention_heads % 4 == 0",
}  # fmt: skip
SEQUENCE: dict[str, Any] = {**TENSOR, "implementation": "sequence-parallel"}

mutant(
    MMDIT, "norms-of-own-heads", "Gradients of the norms of heads are those of the rank's own heads.",
    "mmdit_tensor_parallel._shared",
    "summed = gradients_summed(group, *tokens, *(at_least_float32(attention[name]) for name in names))",
    "summed = (*gradients_summed(group, *tokens), *(at_least_float32(attention[name]) for name in names))",
    "world_size", "gradient", "qk norms replicated under tensor parallelism", **TENSOR,
)  # fmt: skip
mutant(
    MMDIT, "text-gradients-of-own-heads", "Gradients of the image's tokens are added up over the ranks, the text's are not.",
    "mmdit_tensor_parallel._joint_attention",
    "attention, inputs_BSD, text_inputs_BTD = _shared(attention, group, modulated_BSD, text_modulated_BTD)",
    "(attention, inputs_BSD), text_inputs_BTD = _shared(attention, group, modulated_BSD), text_modulated_BTD",
    "world_size", "gradient", "Megatron's f on one of two streams", **TENSOR,
)  # fmt: skip
mutant(
    MMDIT, "text-not-added-up", "The text goes on with the products of the rank's own heads.",
    "mmdit_tensor_parallel._joint_attention",
    "summed_linears(group, *((each, *_linear(attention, name)) for each, name in streams))",
    "[summed_linear(each, *_linear(attention, name), group) if name == \"to_out.0\" else functional.linear(each, "
    "*_linear(attention, name)) for each, name in streams]",
    "world_size", "structural", "to_add_out left out of a plan of parallel layers", **TENSOR,
)  # fmt: skip
mutant(
    MMDIT, "more-attention-as-if-alone", "The second attention sums nothing backward.", "mmdit_tensor_parallel._self_attention",
    "attention, inputs_BSD = _shared(attention, group, modulated_BSD)", "inputs_BSD = modulated_BSD", "world_size", "gradient",
    "attn2 left out of a plan of parallel layers", **TENSOR,
)  # fmt: skip
mutant(
    MMDIT, "heads-as-if-alone", "A rank cuts its features into as many heads as the model has.",
    "mmdit_tensor_parallel.mmdit_of_parts", "config.num_attention_heads // dist.get_world_size(group)",
    "config.num_attention_heads", "world_size", "structural", "heads not divided after ColwiseParallel", **TENSOR,
)  # fmt: skip

mutant(
    MMDIT, "attention-to-what-fills-up", "Tokens attend to those that only fill a stream up.",
    "sequence_parallel.attention_over_ranks", "places is None or len(places) == of_all.shape[3]", "True", "world_size",
    "boundary", "padding of sequences without a mask", **SEQUENCE,
)  # fmt: skip
mutant(
    MMDIT, "filled-up-at-the-end", "What fills the image up is looked for behind the text.", "sequence_parallel.places_of_tokens",
    "for length in lengths:", "for length in [sum(-(-each // ranks) * ranks for each in lengths[:-1]) + lengths[-1]]:",
    "world_size", "boundary", "padding of a joint sequence", **SEQUENCE,
)  # fmt: skip
mutant(
    MMDIT, "text-of-the-first-rank", "Every rank has the first tokens of the text.", "mmdit_sequence_parallel.mmdit",
    "own_tokens(filled_up(text, ranks), group)", "filled_up(text, ranks).chunk(ranks, 1)[0]", "world_size", "structural",
    **SEQUENCE,
)  # fmt: skip
mutant(
    MMDIT, "attention-to-own-image", "The image attends once more to the rank's own tokens alone.",
    "mmdit_sequence_parallel._self_attention", "attention_over_ranks(of_image, group, places)",
    "functional.scaled_dot_product_attention(*of_image.unbind())", "world_size", "structural",
    "attn2 left with the processor of one rank", **SEQUENCE,
)  # fmt: skip
mutant(
    MMDIT, "gradients-of-own-tokens", "Gradients of the text and its pooled vector are those that the rank's own tokens give.",
    "mmdit_sequence_parallel.mmdit",
    "latents, text, pooled, *parameters = replicated(group, latents, encoder_hidden_states, pooled_projections, *state.values())",
    "text, pooled = encoder_hidden_states.float(), pooled_projections.float()\n"
    "    latents, *parameters = replicated(group, latents, *state.values())",
    "world_size", "gradient", "sequence parallelism that sums the gradients of parameters alone", **SEQUENCE,
)  # fmt: skip
