"""Bugs in how our language models are composed."""

from gaugeblock.conformance.selftest.edits import mutant

SDAR, MOE, CACHED, TRAINING = "sdar.sdar", "sdar.sdar_moe", "sdar.sdar_cached", "sdar.sdar_training"
LLADA, DREAM = "llada.llada", "dream.dream"

mutant(
    SDAR, "whole-prompt-a-block", "A prompt of several blocks is taken for one.", "decoder_composition._block_causal",
    "num_tokens > config.block_length", "num_tokens > 2 * config.block_length", "parity", "boundary",
)  # fmt: skip
mutant(
    SDAR, "layers-with-one-norm", "The second norm of a layer has the weights of the first.",
    "decoder_composition.feed_forward", '"post_attention_layernorm"', '"input_layernorm"', "parity", "structural",
)  # fmt: skip
mutant(
    SDAR, "queries-weights-for-keys", "Keys are scaled by the weights of queries.", "decoder_composition.turned",
    'state["k_norm.weight"]', 'state["q_norm.weight"]', "parity", "structural",
)  # fmt: skip
mutant(
    SDAR, "pairs-interleaved", "Features 2 i and 2 i + 1 are turned as a pair.", "decoder_composition.turned",
    '"half-split"', '"interleaved"', "parity", "structural", "RoPE pairs of neighbours for half-split ones",
)  # fmt: skip
mutant(
    MOE, "one-expert-less", "One expert less is chosen, if there is another.", "decoder_composition.experts",
    "config.num_experts_per_tok", "max(1, config.num_experts_per_tok - 1)", "parity", "boundary",
)  # fmt: skip
mutant(
    CACHED, "first-layer-seen", "Every layer sees the past of the first.", "decoder_composition.decode",
    "(past[0][index], past[1][index])", "(past[0][0], past[1][0])", "parity", "structural",
)  # fmt: skip
mutant(
    CACHED, "places-from-nought", "What comes after a past has the places of its beginning.",
    "decoder_composition._block_causal", "places_from(first, input_ids)", "places_from(0, input_ids)", "parity", "structural",
)  # fmt: skip
mutant(
    TRAINING, "logits-of-clean-tokens", "Logits are those of the clean tokens.",
    "decoder_composition.sdar_training", ": noisy_ids.shape[1]]", "noisy_ids.shape[1] :]", "parity", "structural",
)  # fmt: skip
mutant(
    LLADA, "mask-ignored", "The mask is accepted and ignored.", "decoder_composition.llada",
    "attention_mask)\n", "torch.ones_like(attention_mask))\n", "parity", "structural",
    "LLaDA's first model file",
)  # fmt: skip
mutant(
    DREAM, "not-shifted", "Logits stay where they are.", "decoder_composition.dream",
    "dream_reference.shift(decoded.hidden_states)", "decoded.hidden_states", "parity", "structural",
    "ports of Dream as if it were LLaDA",
)  # fmt: skip
mutant(
    DREAM, "places-with-padding", "Padding has places too.", "decoder_composition.dream",
    "attention_mask.long().cumsum(dim=1) - 1", "places_from(0, input_ids)", "parity", "structural",
)  # fmt: skip
