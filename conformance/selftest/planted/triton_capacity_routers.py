"""Bugs in the text of our Triton router with a capacity."""

from gaugeblock.conformance.selftest.edits import mutant

SWITCH = "capacity_routers.switch_top1"
COUNT, FIND = "capacity_routers._count_choices", "capacity_routers._find_overflow"

mutant(
    SWITCH, "capacity-off-by-one", "One token more than there is room for is kept.", FIND,
    ">= capacity", "> capacity", "parity", "boundary", "Switch ports",
)  # fmt: skip
mutant(
    SWITCH, "later-tokens-first", "Within a block, the tokens behind count.", FIND,
    "places[None, :] < places[:, None]", "places[None, :] > places[:, None]", "parity", "structural", "Switch ports",
)  # fmt: skip
mutant(
    SWITCH, "own-token-counted", "A token takes room before it is placed.", FIND,
    "places[None, :] < places[:, None]", "places[None, :] <= places[:, None]", "parity", "boundary",
)  # fmt: skip
mutant(
    SWITCH, "own-block-counted-twice", "Counts up to a block include its own.", FIND,
    " - tl.load(counts_ptr + cells, mask=is_asked, other=0)", "", "parity", "boundary", "inclusive for exclusive scans",
)  # fmt: skip
mutant(
    SWITCH, "blocks-not-added-up", "Places start again in every block.", FIND,
    "in_earlier_blocks + ", "", "parity", "structural",
)  # fmt: skip
mutant(
    SWITCH, "experts-of-one-block", "Only the first experts are counted.", COUNT,
    "range(0, num_experts, BLOCK_EXPERTS)", "range(0, BLOCK_EXPERTS, BLOCK_EXPERTS)", "parity", "boundary",
)  # fmt: skip
mutant(
    SWITCH, "late-keep-their-weight", "A dropped token's weight is its probability.", "capacity_routers.switch_top1",
    ".masked_fill(dropped, 0)", "", "parity", "structural", "transformers#37017",
)  # fmt: skip
