"""Bugs in how our autoencoders are composed."""

from gaugeblock.conformance.selftest.edits import mutant

ENCODE, DECODE = "vae.encode", "vae.decode"

mutant(
    ENCODE, "padded-on-all-sides", "The convolution that halves has zeros before the first column and row.",
    "vae_composition.unchecked_encode", "(0, 1, 0, 1)", "(1, 0, 1, 0)", "parity", "structural",
    "asymmetric padding of Downsample2D",
)  # fmt: skip
mutant(
    ENCODE, "logvar-not-clamped", "Log variances are what the last convolution gives.", "vae_composition.unchecked_encode",
    "logvar_BCHW.clamp(SMALLEST_LOGVAR, LARGEST_LOGVAR)", "logvar_BCHW", "parity", "boundary",
)  # fmt: skip
mutant(
    DECODE, "a-resnet-too-few", "Each resolution of the decoder has as many blocks as the encoder's.",
    "vae_composition.unchecked_decode",
    "config.layers_per_block + 1", "config.layers_per_block", "parity", "structural",
)  # fmt: skip
mutant(
    DECODE, "silu-before-attention", "Silu is applied to what attention normalizes.", "vae_composition.attention",
    "parts.group_norm(", "parts.group_norm_silu(", "parity", "structural",
)  # fmt: skip
mutant(
    DECODE, "input-not-added-to-attention", "Attention replaces the image.", "vae_composition.attention",
    "return images_BCHW + ", "return ", "parity", "structural",
)  # fmt: skip
