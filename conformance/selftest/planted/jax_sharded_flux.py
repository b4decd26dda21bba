"""Bugs of our Flux in JAX over ranks."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

FLUX = "flux.flux"
ROW: dict[str, Any] = {"implementation": "jax-sharded", "only": "num_attention_heads % 4 == 0"}

mutant(
    FLUX, "hidden-layer-first", "The last product takes the hidden layer's blocks before attention's.",
    "sharded_flux._single_block", "[attended_BJD[:, :, None], inner_BJND]", "[inner_BJND, attended_BJD[:, :, None]]", "parity",
    "structural", "single blocks of Flux ports: linear2", **ROW,
)  # fmt: skip
mutant(
    FLUX, "image-before-text", "Where the streams become one, the image comes first; the places do not.",
    "sharded_flux.flux_of_placed", "[text_BTD, image_BSD]", "[image_BSD, text_BTD]", "parity", "structural", **ROW,
)  # fmt: skip
mutant(
    FLUX, "gate-and-scale-swapped", "A block with one stream takes its second third for the gate.",
    "sharded_flux._single_block", "shift_BD, scale_BD, gate_BD =", "shift_BD, gate_BD, scale_BD =", "parity", "structural", **ROW,
)  # fmt: skip
