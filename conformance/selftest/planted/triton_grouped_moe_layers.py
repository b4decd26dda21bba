"""Bugs in the text of our Triton MoE layers that choose among groups of experts."""

from gaugeblock.conformance.selftest.edits import mutant

V2, V3 = "grouped_moe_layers.deepseek_v2_moe", "grouped_moe_layers.deepseek_v3_moe"
BIAS = 'state["gate.e_score_correction_bias"]'

mutant(
    V2, "shared-experts-scaled", "The factor of the routed experts multiplies the shared ones too.",
    "moe_composition.deepseek_v2_moe", "routed_and_shared(parts, hidden_states, state, weights * routed_scaling_factor, ids)",
    "routed_scaling_factor * routed_and_shared(parts, hidden_states, state, weights, ids)", "parity", "structural",
)  # fmt: skip
mutant(
    V2, "scaled-unless-renormalized", "Weights are either renormalized or scaled.", "moe_composition.deepseek_v2_moe",
    "weights / weights.sum(-1, keepdim=True)", "weights / weights.sum(-1, keepdim=True) / routed_scaling_factor",
    "parity", "structural", source="MoEGate of DeepSeek-V2's own code",
)  # fmt: skip
mutant(
    V2, "scaling-forgotten", "Weights are not scaled.", "moe_composition.deepseek_v2_moe",
    "weights * routed_scaling_factor", "weights", "parity", "structural",
)  # fmt: skip
mutant(
    V2, "gate-and-up-swapped", "The shared expert's up values pass the activation.", "moe_composition.shared_weights",
    '[state[f"{prefix}.gate_proj.weight"], state[f"{prefix}.up_proj.weight"]]',
    '[state[f"{prefix}.up_proj.weight"], state[f"{prefix}.gate_proj.weight"]]', "parity", "structural",
)  # fmt: skip
mutant(
    V2, "routed-rounded", "What the routed experts return is rounded before the shared ones are added.",
    "moe_composition.routed_and_shared", "topk_ids, out_dtype=dtype)", "topk_ids)", "parity", "precision", dtypes=("bfloat16",),
)  # fmt: skip
mutant(
    V3, "bias-on-logits", "The bias is added to the logits, so that it is in the weights too.", "moe_composition.deepseek_v3_moe",
    f"logits,\n        {BIAS}", f"logits + {BIAS},\n        0 * {BIAS}", "parity", "structural",
)  # fmt: skip
mutant(
    V3, "bias-rounded", "The bias is cast to the dtype of the model, as `model.to(dtype)` does with buffers.",
    "moe_composition.deepseek_v3_moe", f"{BIAS},", f"{BIAS}.to(hidden_states.dtype),", "parity", "precision",
    dtypes=("bfloat16",),
)  # fmt: skip
mutant(
    V3, "best-of-group-alone", "A group's score is its best expert's, as in DeepSeek-V2.", "routers.grouped_sigmoid_topk",
    "group_best=2", "group_best=1", "parity", "structural", source="ports of DeepSeek-V3",
)  # fmt: skip
mutant(
    V3, "always-renormalized", "Weights are renormalized whatever norm_topk_prob says.", "moe_composition.deepseek_v3_moe",
    "renormalize=renormalize", "renormalize=True", "parity", "structural", source="DeepSeek-V3's own inference code",
)  # fmt: skip
