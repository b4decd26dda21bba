"""Bugs in how our UNets are composed."""

from gaugeblock.conformance.selftest.edits import mutant

UNET, TEXT_TIME = "unet.unet", "unet.unet_text_time"

mutant(
    UNET, "time-of-the-first-example", "ResNet blocks add the time of the first example to all.", "unet_composition.resnet",
    "[:, :, None, None]", "[:1, :, None, None]", "parity", "structural",
)  # fmt: skip
mutant(
    UNET, "text-mask-dropped", "All of the text is looked at.", "unet_composition.transformer_block",
    "attn_mask=mask", "attn_mask=None", "parity", "structural", "pipelines that pass no encoder_attention_mask",
)  # fmt: skip
mutant(
    UNET, "gates-first", "The halves of the feed-forward network are taken the other way round.",
    "unet_composition.transformer_block", "up_BSI, gate_BSI = ", "gate_BSI, up_BSI = ", "parity", "structural",
    "GEGLU of other models",
)  # fmt: skip
mutant(
    UNET, "geglu-by-tanh", "GELU is approximated.", "unet_composition.transformer_block",
    'approximation="none"', 'approximation="tanh"', "parity", "precision",
)  # fmt: skip
mutant(
    UNET, "resnet-eps-in-transformers", "The GroupNorm before the blocks has the eps of ResNet blocks.",
    "unet_composition.transformer", "eps=TRANSFORMER_NORM_EPS", "eps=config.norm_eps", "parity", "precision",
)  # fmt: skip
mutant(
    UNET, "heads-of-the-first-level", "Each level has as many heads as the first.", "unet_composition.transformer",
    "config.attention_head_dim[level]", "config.attention_head_dim[0]", "parity", "structural",
    "diffusers: attention_head_dim is a number of heads",
)  # fmt: skip
mutant(
    UNET, "silu-of-time-forgotten", "ResNet blocks take the embedding of the time as it is.", "unet_composition.predict",
    "functional.silu(conditioning.time)", "conditioning.time", "parity", "structural",
)  # fmt: skip
mutant(
    TEXT_TIME, "waves-in-the-dtype-of-the-latents", "Sizes are rounded before their waves: 1023 pixels are 1024.",
    "unet_composition.unchecked_unet_text_time", "waves(time_ids.flatten(), size)",
    "waves(time_ids.flatten().to(latents.dtype), size)",
    "parity", "precision", dtypes=("bfloat16",),
)  # fmt: skip
