"""Bugs in the text of our Triton MoE layers."""

from gaugeblock.conformance.selftest.edits import mutant

MIXTRAL, BALANCE, Z = "moe_layers.mixtral_moe", "auxiliary_losses.load_balancing_loss", "auxiliary_losses.router_z_loss"

mutant(
    MIXTRAL, "weights-not-renormalized", "The weights of the chosen are their probabilities among all.",
    "moe_layers.mixtral_moe", "renormalize=True", "renormalize=False", "parity", "structural",
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
