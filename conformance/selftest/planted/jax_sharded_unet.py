"""Bugs of our UNets in JAX over ranks."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

UNET, TEXT_TIME = "unet.unet", "unet.unet_text_time"
ROW: dict[str, Any] = {"implementation": "jax-sharded", "only": "norm_num_groups % 4 == 0 and gcd_of_heads % 4 == 0"}

mutant(
    UNET, "first-matrix-gates", "Of the two matrices before the hidden layer the first makes the gates.",
    "sharded_unet._feed_forward", "up_BSI, gate_BSI = ", "gate_BSI, up_BSI = ", "parity", "structural", "GEGLU of other models",
    **ROW,
)  # fmt: skip
mutant(
    UNET, "bias-once-for-both", "What is gated and the gates add the bias of the first.", "sharded_unet._feed_forward",
    '["net.0.proj.bias"][:, None, None]', '["net.0.proj.bias"][:1, None, None]', "parity", "structural", **ROW,
)  # fmt: skip
mutant(
    UNET, "heads-as-at-the-first-level", "Each level has as many heads as the first, and so the ranks share none.",
    "sharded_unet._transformer", "config.attention_head_dim[level]", "config.attention_head_dim[0]", "parity", "structural",
    **ROW,
)  # fmt: skip
mutant(
    UNET, "mask-for-pixels-alone", "All of the text is looked at.", "sharded_unet._transformer", "mask=mask, ", "", "parity",
    "structural", **ROW,
)  # fmt: skip
mutant(
    TEXT_TIME, "sizes-not-added", "ResNet blocks get the time alone.", "sharded_unet.unet_text_time_of_placed",
    "time_BE + added_BE", "time_BE", "parity", "structural", **ROW,
)  # fmt: skip
