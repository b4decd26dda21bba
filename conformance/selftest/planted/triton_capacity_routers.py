"""Bugs in the text of our Triton routers with a capacity."""

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

GSHARD, CHOOSE = "capacity_routers.gshard_top2", "capacity_routers._choose_two"

mutant(
    GSHARD, "noise-moves-the-first", "The first expert is chosen by noisy logits, too.", CHOOSE,
    "tl.argmax(keys_of(logits, exists), axis=1)", "tl.argmax(keys_of(scores, exists), axis=1)", "parity", "structural",
)  # fmt: skip
mutant(
    GSHARD, "padding-asks", "Padding takes room.", CHOOSE,
    "asks = is_token & (columns < 2)", "asks = in_batch & (columns < 2)", "parity", "structural", "Megatron-LM#5542",
)  # fmt: skip
mutant(
    GSHARD, "token-after-token", "A token asks for both its experts before the next one asks.", CHOOSE,
    "asked_ptr + columns * num_tokens + rows", "asked_ptr + rows * 2 + columns", "parity", "structural",
)  # fmt: skip
mutant(
    GSHARD, "gradient-of-padding", "NaN in padding is NaN in its gradient.", "capacity_routers._TwoChoices",
    "grad_logits.masked_fill_(is_padding, 0)", "grad_logits", "gradients", "gradient",
)  # fmt: skip
mutant(
    "capacity_routers.expert_choice", "tokens-for-experts", "Probabilities are written token by token.",
    "capacity_routers._probabilities_by_expert",
    "experts.to(tl.int64) * num_tokens + rows", "rows * num_experts + experts", "parity", "structural",
)  # fmt: skip
