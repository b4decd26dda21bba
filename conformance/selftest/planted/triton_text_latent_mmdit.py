"""Bugs in the text of how the text-latent MMDiT is composed of our kernels."""

from gaugeblock.conformance.selftest.edits import mutant

MODEL = "text_latent_mmdit.text_latent_mmdit"

mutant(
    MODEL, "gates-exchanged", "Attention has the gates of the feed-forward networks.", "text_latent_mmdit_composition.block",
    "gates[:MODALITIES]", "gates[MODALITIES:]", "parity", "structural",
)  # fmt: skip
mutant(
    MODEL, "one-connection-for-both", "Streams are read by the attention's connection twice.",
    "text_latent_mmdit_composition.apply_branch", "{name}_residual_fns", "attn_residual_fns", "parity", "structural",
)  # fmt: skip
mutant(
    MODEL, "mask-forgotten", "The mask is accepted and ignored.", "text_latent_mmdit_composition.joint_attention",
    "attn_mask=mask_BASJ", "attn_mask=None", "parity", "structural",
)  # fmt: skip
