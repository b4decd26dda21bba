"""Bugs in the text of our filter of logits that sorts the highest ones alone."""

from functools import partial

from gaugeblock.conformance.selftest import edits

FILTER = "token_choices.filter_logits"

mutant = partial(edits.mutant, implementation="torch-library")

mutant(
    FILTER, "ties-beyond-top-k-dropped", "Of logits that equal the last of the top_k those within it are kept alone.",
    "token_choices._most_probable", "torch.where(is_kept_NK[:, -1:], beyond_N1, 0)", "0", "parity", "boundary",
)  # fmt: skip
mutant(
    FILTER, "ties-beyond-top-k-without-weight", "Probabilities are shared out among the top_k as if nothing equalled the last.",
    "token_choices._most_probable", "weights_NK.sum(dim=-1, keepdim=True) + others_N1", "weights_NK.sum(dim=-1, keepdim=True)",
    "parity", "boundary",
)  # fmt: skip
mutant(
    FILTER, "all-ties-at-the-end-of-top-p", "All logits that equal the least kept one are kept.", "token_choices._most_probable",
    "(is_least_NV.cumsum(dim=-1) <= num_least_N1)", "True", "parity", "boundary",
)  # fmt: skip
mutant(
    FILTER, "temperature-forgotten-in-top-p", "Probabilities are those of temperature 1.", "token_choices._most_probable",
    "(highest_NK / temperature)", "(highest_NK / 1)", "parity", "structural",
)  # fmt: skip
