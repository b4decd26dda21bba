"""Bugs in the text of our Triton routers."""

from gaugeblock.conformance.selftest.edits import mutant

SOFTMAX, GROUPED = "routers.softmax_topk", "routers.grouped_sigmoid_topk"

mutant(
    SOFTMAX, "lane-mask-off-by-one", "One lane behind the last expert takes part.", "routers._softmax_topk_forward",
    "experts < num_experts", "experts <= num_experts", "parity", "boundary", "vllm#2453",
)  # fmt: skip
mutant(
    SOFTMAX, "maximum-not-subtracted", "Exponentials overflow.", "routers._softmax_topk_forward",
    " - highest", "", "parity", "precision",
)  # fmt: skip
mutant(
    SOFTMAX, "lane-chosen-twice", "The chosen lane stays selectable.", "topk.choose_lanes",
    "tl.where(lanes == best, no_key(keys.dtype), keys)", "keys", "parity", "structural", "vllm#52679",
)  # fmt: skip
mutant(
    SOFTMAX, "batch-mask-dropped", "Rows behind the last token are stored.", "routers.store_choice",
    "in_batch & (columns < top_k)", "columns < top_k", "parity", "memory",
)  # fmt: skip
mutant(
    SOFTMAX, "column-stride-ignored", "Neighbouring logits are taken to lie side by side.", "routers.load_logits",
    " * column_stride", "", "layout", "memory",
)  # fmt: skip
mutant(
    SOFTMAX, "cotangent-stride-ignored", "Neighbouring gradients are taken to lie side by side.", "routers.load_grads",
    "pointers += column_stride", "pointers += 1", "gradient_layout", "gradient",
)  # fmt: skip
mutant(
    SOFTMAX, "weights-through-float16", "Exponentials of the chosen are rounded to float16.", "routers._softmax_topk_forward",
    "tl.exp(chosen_logits - highest)", "tl.exp(chosen_logits - highest).to(tl.float16).to(tl.float32)", "parity", "precision",
    "gpt-oss ports",
)  # fmt: skip
mutant(
    SOFTMAX, "gradient-not-centered", "The mean is not subtracted from the gradient.", "routers._softmax_topk_backward",
    "static_range(2)", "static_range(0)", "gradients", "gradient",
)  # fmt: skip
mutant(
    GROUPED, "padded-lanes-selectable", "Lanes behind the last member of a group can be chosen.", "topk.keys_of",
    "tl.where(selectable, keys, no_key(keys.dtype))", "keys", "parity", "boundary", "vllm#2453",
)  # fmt: skip
mutant(
    GROUPED, "negative-keys-reversed", "Negative scores are compared by their bits.", "topk.keys_of",
    "keys ^ highest_key(keys.dtype)", "keys", "parity", "structural",
)  # fmt: skip
mutant(
    GROUPED, "second-best-forgotten", "A group's score is its best expert's alone.", "routers._grouped_sigmoid_topk_forward",
    "if group_size > 1:", "if group_size > 1000000:", "parity", "structural", "DeepSeek-V2 and V3 mixed up",
)  # fmt: skip
mutant(
    GROUPED, "epsilon-of-float32", "10^-12 is added to the sum of the weights.", "routers.RENORMALIZE_EPSILON",
    "1e-20", "1e-12", "parity", "precision", "Diffulex#37",
)  # fmt: skip
mutant(
    GROUPED, "bias-stride-ignored", "The bias is taken to be contiguous.", "routers._grouped_sigmoid_topk_forward",
    " * bias_stride", "", "layout", "memory",
)  # fmt: skip
mutant(
    GROUPED, "factor-without-gradient", "The factor is left out of the backward pass.", "routers._grouped_sigmoid_topk_backward",
    "grads *= routed_scaling_factor", "grads *= 1.0", "gradients", "gradient",
)  # fmt: skip
