"""Bugs in the text of our Triton kernels that choose tokens and places."""

from gaugeblock.conformance.selftest.edits import mutant

DRAW, PLACES = "token_choices.draw_tokens", "unmasking.choose_places"

mutant(
    DRAW, "tokens-counted-from-the-tile", "A token's id is its place in its tile.", "token_choices._draw_of_tiles",
    "tile * BLOCK_COLUMNS + best", "0 * tile + best", "parity", "boundary",
)  # fmt: skip
mutant(
    DRAW, "sums-of-tiles-not-rescaled", "Sums of exponentials are added whatever was subtracted in each tile.",
    "token_choices._choice_of_rows", "shares * totals)", "totals)", "parity", "structural",
)  # fmt: skip
mutant(
    DRAW, "second-of-the-best-tile-alone", "The second probability is looked for in the tile of the first alone.",
    "token_choices._choice_of_rows", "seconds, highs)", "seconds, float(\"-inf\"))", "parity", "boundary",
)  # fmt: skip
mutant(
    DRAW, "forbidden-tokens-in-the-entropy", "0 times minus infinity is added to the entropy.", "token_choices._draw_of_tiles",
    "tl.where(exponentials == 0, 0.0, exponentials * shifted)", "exponentials * shifted", "parity", "boundary",
)  # fmt: skip
mutant(
    DRAW, "draws-by-the-strides-of-logits", "Draws are read where logits would lie.", "token_choices._draw_of_tiles",
    "row * uniforms_row_stride + columns * uniforms_column_stride", "row * row_stride + columns * column_stride", "layout",
    "memory",
)  # fmt: skip
mutant(
    PLACES, "prompt-overwritten", "What is no mask is chosen where fewer masks are left.", "unmasking._choose_places",
    "accepted & is_masked", "accepted", "parity", "boundary",
)  # fmt: skip
mutant(
    PLACES, "ranks-of-one-tile", "A place is compared with the last places alone.", "unmasking._choose_places",
    "ranks += ", "ranks = ", "parity", "boundary",
)  # fmt: skip
mutant(
    PLACES, "nan-before-all", "A NaN is never behind another.", "unmasking._load_row",
    "tl.where(confidence >= LEAST, confidence, LEAST)", "tl.where(confidence < LEAST, LEAST, confidence)", "parity", "boundary",
)  # fmt: skip
mutant(
    PLACES, "counts-side-by-side", "Neighbouring counts are taken to lie side by side.", "unmasking._choose_places",
    "row * counts_stride", "row", "layout", "memory",
)  # fmt: skip
