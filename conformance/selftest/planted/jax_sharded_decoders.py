"""Bugs of our language models in JAX over ranks."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

MOE = "sdar.sdar_moe"
HEADS = "num_key_value_heads % 4 == 0 and vocab_size % 4 == 0"
ROW: dict[str, Any] = {"implementation": "jax-sharded", "only": f"{HEADS} and num_experts % 4 == 0"}

mutant(
    MOE, "always-renormalized", "Weights of chosen experts sum to 1 whatever the config says.", "sharded_decoders._experts",
    "renormalize=config.norm_topk_prob", "renormalize=True", "parity", "structural", "OLMoE's norm_topk_prob ignored", **ROW,
)  # fmt: skip
mutant(
    MOE, "full-attention", "Every token sees every token.", "sharded_decoders._sdar_moe",
    "block_length=config.block_length", "block_length=input_ids.shape[1]", "parity", "structural",
    "prefill under a full mask", **ROW,
)  # fmt: skip
