"""Bugs in the text of our Triton MoE layers."""

from gaugeblock.conformance.selftest.edits import mutant

MIXTRAL, QWEN3, QWEN2 = (f"moe_layers.{name}_moe" for name in ("mixtral", "qwen3", "qwen2"))
BALANCE, Z = "auxiliary_losses.load_balancing_loss", "auxiliary_losses.router_z_loss"

mutant(
    MIXTRAL, "weights-not-renormalized", "The weights of the chosen are their probabilities among all.",
    "moe_composition.mixtral_moe", "renormalize=True", "renormalize=False", "parity", "structural",
)  # fmt: skip
mutant(
    QWEN3, "always-renormalized", "The weights of a layer that does not renormalize are divided by their sum too.",
    "moe_composition.qwen3_moe", "renormalize=renormalize", "renormalize=True", "parity", "structural",
)  # fmt: skip
mutant(
    QWEN3, "logits-in-the-dtype-of-the-tokens", "The router's product is rounded before the softmax.",
    "moe_composition.router_logits", "hidden_states.to(dtype) @ weight.to(dtype).mT",
    "(hidden_states @ weight.mT).to(dtype)", "parity", "precision", dtypes=("float16", "bfloat16"),
)  # fmt: skip
mutant(
    QWEN2, "shared-expert-ungated", "The expert that all tokens pass is added whole.", "moe_composition.qwen2_moe",
    'state["shared_expert_gate.weight"], out', '1e4 + 0 * state["shared_expert_gate.weight"], out', "parity", "structural",
)  # fmt: skip
mutant(
    QWEN2, "up-before-gate", "The shared expert's matrices are put together the wrong way.", "moe_composition.shared_weights",
    '[state[f"{prefix}.gate_proj.weight"], state[f"{prefix}.up_proj.weight"]]',
    '[state[f"{prefix}.up_proj.weight"], state[f"{prefix}.gate_proj.weight"]]', "parity", "structural",
)  # fmt: skip
mutant(
    QWEN2, "summed-in-the-dtype-of-the-tokens", "What routed and shared experts give is rounded before it is added.",
    "moe_composition.qwen2_moe", "dtype = accurate_dtype(hidden_states)", "dtype = hidden_states.dtype",
    "parity", "precision", dtypes=("float16", "bfloat16"),
)  # fmt: skip
mutant(
    BALANCE, "padding-counted", "Padding has a probability, the same for all experts.", "auxiliary_losses._balance_sums",
    "tl.where(counted, _probabilities(logits, SIGMOID), 0.0)", "_probabilities(logits, SIGMOID)", "parity", "structural",
)  # fmt: skip
mutant(
    BALANCE, "tokens-for-assignments", "Assignments are divided by themselves, not by tokens.", "auxiliary_losses._balance_loss",
    "tl.sum(assignments) // top_k", "tl.sum(assignments)", "parity", "structural",
)  # fmt: skip
mutant(
    BALANCE, "programs-mask-dropped", "Sums that no program wrote are added.", "auxiliary_losses._balance_loss",
    "(programs < num_programs)", "(programs >= 0)", "parity", "memory",
)  # fmt: skip
mutant(
    BALANCE, "programs-overlap", "Each program goes on to the tokens of the next.", "auxiliary_losses._balance_sums",
    "num_programs * BLOCK_TOKENS):", "BLOCK_TOKENS):", "parity", "boundary",
)  # fmt: skip
mutant(
    BALANCE, "gradient-not-centered", "The mean is not subtracted from the gradient.", "arithmetic.through_softmax",
    "static_range(2)", "static_range(0)", "gradients", "gradient",
)  # fmt: skip
mutant(
    BALANCE, "mask-stride-ignored", "The mask's neighbours are taken to lie side by side.", "token_sums.is_counted",
    " * mask_stride", "", "layout", "memory",
)  # fmt: skip
mutant(
    Z, "highest-forgotten", "The logarithm of the sum lacks the maximum that was subtracted.", "auxiliary_losses._token_sums",
    "highest + tl.log(total)", "tl.log(total)", "parity", "structural",
)  # fmt: skip
mutant(
    Z, "gradient-halved", "The derivative of z² is z.", "auxiliary_losses._token_backward",
    "2.0 * (highest", "(highest", "gradients", "gradient",
)  # fmt: skip
