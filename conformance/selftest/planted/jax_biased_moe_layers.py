"""Bugs in our MoE layers in JAX over ranks, in what experts with biases have of their own."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

GPT_OSS = "biased_moe_layers.gpt_oss_moe"
ON_RANKS: dict[str, Any] = {"implementation": "jax-expert-parallel"}

mutant(
    GPT_OSS, "down-bias-not-weighted", "The last bias is added once for each choice, whatever its weight.",
    "expert_calls.Experts", "weights_X1 * inner_XI, weights_X1", "weights_X1 * inner_XI, used_X1",
    "parity", "structural", "gpt-oss ports", **ON_RANKS,
)  # fmt: skip
mutant(
    GPT_OSS, "biases-without-gradients", "What is added to each product is a constant.", "expert_calls.Experts",
    "at_least_float32(biases)", "jax.lax.stop_gradient(at_least_float32(biases))", "gradients", "gradient", **ON_RANKS,
)  # fmt: skip
mutant(
    GPT_OSS, "biases-of-the-first-expert", "All experts of a rank add the biases of its first one.", "expert_calls.Experts",
    "at_least_float32(biases)", "at_least_float32(biases[:1].repeat(len(biases), 0))", "parity", "structural", "vllm#57092",
    **ON_RANKS,
)  # fmt: skip
mutant(
    GPT_OSS, "router-bias-forgotten", "The router is a product alone.", "moe_composition._routed",
    "logits_TE + bias", "logits_TE", "parity", "structural", "checkpoints loaded without the router's bias", **ON_RANKS,
)  # fmt: skip
mutant(
    GPT_OSS, "room-for-an-even-load", "There is room for what ranks would send each other if the load were even.",
    "expert_parallel.capacity_and_load", "min(capacity, tokens_of_rank)", "min(capacity, -(-tokens_of_rank // num_ranks))",
    "parity", "structural", "static capacity of dispatch buffers", **ON_RANKS,
)  # fmt: skip
