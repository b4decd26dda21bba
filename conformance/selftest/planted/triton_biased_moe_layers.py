"""Bugs in how our MoE layers with biases are composed."""

from gaugeblock.conformance.selftest.edits import mutant

GPT_OSS, GPT2 = (f"biased_moe_layers.{name}_moe" for name in ("gpt_oss", "upcycled_gpt2"))
EMERGENCE = "review of sumitdotml/moe-emergence"

mutant(
    GPT_OSS, "router-bias-forgotten", "The router is a product alone.", "moe_composition.gpt_oss_moe",
    'state["router.bias"])', '0 * state["router.bias"])',
    "parity", "structural", "checkpoints loaded without the router's bias",
)  # fmt: skip
mutant(
    GPT_OSS, "router-bias-for-the-choice-alone", "The bias decides who is chosen, and the weights are those without it.",
    "moe_composition.gpt_oss_moe", "*routing, alpha",
    '(logits - state["router.bias"]).gather(1, routing[1]).softmax(1), routing[1], alpha',
    "parity", "structural", "DeepSeek-V3, whose bias is of that kind",
)  # fmt: skip
mutant(
    GPT_OSS, "softmax-of-all", "Weights are the probabilities among all experts.", "biased_moe_layers.PARTS",
    "topk_softmax=routers.topk_softmax",
    "topk_softmax=lambda logits, top_k: routers.softmax_topk(logits, top_k=top_k, renormalize=False)",
    "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    GPT_OSS, "down-not-transposed-where-square", "Where sizes are equal, as in gpt-oss, the down matrix is taken as it lies.",
    "moe_composition.gpt_oss_moe", 'state["experts.down_proj"].mT',
    'state["experts.down_proj"].transpose(1, -1 if hidden_states.shape[1] != state["experts.down_proj"].shape[1] else 1)',
    "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    GPT_OSS, "limit-of-7", "The limit is gpt-oss', whatever is asked for.", "moe_composition.gpt_oss_moe",
    "limit=limit)\n    return", "limit=7.0)\n    return", "parity", "structural",
)  # fmt: skip
mutant(
    GPT_OSS, "logits-in-the-dtype-of-the-tokens", "The router adds its bias in the dtype of the tokens.",
    "moe_composition.router_logits", "logits + bias", "(logits.to(hidden_states.dtype) + bias).to(dtype)",
    "parity", "precision", "GptOssTopKRouter of transformers", dtypes=("bfloat16",),
)  # fmt: skip

mutant(
    GPT2, "entropy-of-noisy-probabilities", "The entropy is that of what experts are chosen by.",
    "moe_composition.upcycled_gpt2_moe", "probs, entropy, parts",
    "probs, -(probs * (probs + 1e-9).log()).sum(1), parts", "parity", "structural", EMERGENCE,
)  # fmt: skip
mutant(
    GPT2, "noise-outside-of-training", "Noise chooses in evaluation too.", "moe_composition.upcycled_gpt2_moe",
    '"training": training', '"training": True', "parity", "structural", EMERGENCE,
)  # fmt: skip
mutant(
    GPT2, "noise-off", "Noise is asked for, and there is none.", "moe_composition.upcycled_gpt2_moe",
    '"noise_std": noise_std', '"noise_std": 0.0', "parity", "structural", EMERGENCE,
)  # fmt: skip
mutant(
    GPT2, "straight-through-lost", "The weight of one expert alone is a constant: the router learns of the balance loss alone.",
    "moe_composition.upcycled_gpt2_moe", "*up, *down, topk_weights", "*up, *down, topk_weights.detach()",
    "gradients", "gradient", EMERGENCE,
)  # fmt: skip
mutant(
    GPT2, "clean-probabilities-for-the-balance-loss", "What is returned for the balance loss has no noise.",
    "moe_composition.upcycled_gpt2_moe", "probs, _, logits", "_, probs, logits", "parity", "structural",
)  # fmt: skip
mutant(
    GPT2, "load-per-token", "Assignments are divided by tokens: loads sum to top_k.", "moe_composition.load_fractions",
    "topk_ids.numel()", "len(topk_ids)", "parity", "structural",
)  # fmt: skip
mutant(
    GPT2, "erf-for-tanh", "The GELU is exact, GPT-2's is not.", "moe_composition.upcycled_gpt2_moe",
    'approximate="tanh"', 'approximate="none"', "parity", "precision",
)  # fmt: skip
