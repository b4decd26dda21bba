"""Bugs of our text encoder of CLIP in JAX over ranks."""

from gaugeblock.conformance.selftest.edits import mutant

mutant(
    "clip_text.clip_text", "padding-seen-on-ranks", "The mask does not reach the ranks.", "sharded_clip_text.clip_text",
    "state, input_ids, attention_mask, config=config", "state, input_ids, None, config=config", "parity", "structural",
    implementation="jax-sharded", only="num_attention_heads % 4 == 0 and intermediate_size % 4 == 0",
)  # fmt: skip
