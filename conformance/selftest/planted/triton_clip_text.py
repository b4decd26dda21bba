"""Bugs in how our text encoder is composed."""

from gaugeblock.conformance.selftest.edits import mutant

CLIP = "clip_text.clip_text"

mutant(
    CLIP, "padding-seen", "The mask is accepted and ignored.", "clip_text_composition.unchecked_clip_text",
    "mask_BAST = None if attention_mask is None else", "mask_BAST = None if attention_mask is not None else", "parity",
    "structural", "pipelines that pass no attention_mask",
)  # fmt: skip
mutant(
    CLIP, "one-layer-for-all", "Every layer has the parameters of the first.", "clip_text_composition.unchecked_clip_text",
    "encoder.layers.{index}", "encoder.layers.{0 * index}", "parity", "structural",
)  # fmt: skip
mutant(
    CLIP, "pooled-before-the-norm", "What is pooled is not normalized.", "clip_text_composition.unchecked_clip_text",
    "norm(parts, state, LAST_NORM, hidden_BSD[ends], config)", "hidden_BSD[ends]", "parity", "structural",
)  # fmt: skip
mutant(
    CLIP, "quick-gelu-always", "quick-GELU, whatever the configuration says.", "clip_text_composition.layer",
    'config.hidden_act == "quick_gelu"', "True", "parity", "structural", "Stable Diffusion 2 run with the activation of 1",
)  # fmt: skip
mutant(
    CLIP, "eps-of-torch", "LayerNorms have the eps of torch.", "clip_text_composition.norm",
    "eps=config.layer_norm_eps", "eps=1e-5", "parity", "precision",
)  # fmt: skip
