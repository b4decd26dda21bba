"""Bugs in the text of our Triton MoE layers that weigh what experts are given."""

from gaugeblock.conformance.selftest.edits import mutant

LLAMA4 = "input_scaled_moe_layers.llama4_moe"

mutant(
    LLAMA4, "outputs-weighted", "Weights multiply what experts return, as in all other models.", "moe_composition.llama4_moe",
    'out = input_scaled_swiglu(parts, hidden_states, state["experts.gate_up_proj"].mT, state["experts.down_proj"].mT, *routing)',
    'out = parts.fused_swiglu(hidden_states, state["experts.gate_up_proj"].mT, state["experts.down_proj"].mT, *routing)',
    "parity", "structural", source="ports of Llama 4",
)  # fmt: skip
mutant(
    LLAMA4, "weighted-twice", "Weights multiply what experts are given, and what they return.",
    "moe_composition.input_scaled_swiglu", "torch.ones_like(ids, dtype=topk_weights.dtype)", "topk_weights.reshape(-1, 1)",
    "parity", "structural", source="ports of Llama 4",
)  # fmt: skip
mutant(
    LLAMA4, "first-choice-alone", "One expert per token is taken for granted.", "moe_composition.input_scaled_swiglu",
    ".view(scaled.shape).sum(1)", ".view(scaled.shape)[:, 0]", "parity", "structural", source="public models have top_k 1",
)  # fmt: skip
mutant(
    LLAMA4, "shared-expert-scaled", "The shared expert is given the scaled token too.", "moe_composition.llama4_moe",
    "parts.shared_swiglu(hidden_states, ", "parts.shared_swiglu(hidden_states * routing[0][:, :1].to(hidden_states.dtype), ",
    "parity", "structural",
)  # fmt: skip
mutant(
    LLAMA4, "matrices-not-transposed", "The experts' first matrices are read as if they lay the other way round.",
    "moe_composition.llama4_moe", 'state["experts.gate_up_proj"].mT',
    'state["experts.gate_up_proj"].flatten(1).unflatten(1, (-1, hidden_states.shape[1]))', "parity", "structural",
)  # fmt: skip
mutant(
    LLAMA4, "router-without-gradient", "No gradient goes through the weights.", "moe_composition.input_scaled_swiglu",
    "scaled = topk_weights[..., None]", "scaled = topk_weights.detach()[..., None]", "gradients", "gradient",
)  # fmt: skip
