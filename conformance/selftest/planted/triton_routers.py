"""Bugs in the text of our Triton routers."""

from gaugeblock.conformance.selftest.edits import mutant

SOFTMAX, GROUPED = "routers.softmax_topk", "routers.grouped_sigmoid_topk"
OF_CHOSEN, SIGMOID, SCALING = "routers.topk_softmax", "routers.sigmoid_topk", "routers.sigmoid_input_scaling"
MIXER = "routers.sparsemixer"
GROUPED_SOFTMAX, BIASED, ZERO = "routers.grouped_softmax_topk", "routers.biased_softmax_topk", "routers.zero_expert_topk"

mutant(
    SOFTMAX, "lane-mask-off-by-one", "One lane behind the last expert takes part.", "routing._forward",
    "lanes % BLOCK_MEMBERS < group_size", "lanes % BLOCK_MEMBERS <= group_size", "parity", "boundary", "vllm#2453",
)  # fmt: skip
mutant(
    SOFTMAX, "maximum-not-subtracted", "Exponentials of the chosen overflow.", "routing._forward",
    "tl.exp(chosen_logits - highest)", "tl.exp(chosen_logits)", "parity", "precision",
)  # fmt: skip
mutant(
    SOFTMAX, "lane-chosen-twice", "The chosen lane stays selectable.", "topk.choose_lanes",
    "tl.where(lanes == best, no_key(keys.dtype), keys)", "keys", "parity", "structural", "vllm#52679",
)  # fmt: skip
mutant(
    SOFTMAX, "batch-mask-dropped", "Rows behind the last token are stored.", "routing.store_choice",
    "in_batch & (columns < top_k)", "columns < top_k", "parity", "memory",
)  # fmt: skip
mutant(
    SOFTMAX, "column-stride-ignored", "Neighbouring logits are taken to lie side by side.", "routing.load_logits",
    " * column_stride", "", "layout", "memory",
)  # fmt: skip
mutant(
    SOFTMAX, "cotangent-stride-ignored", "Neighbouring gradients are taken to lie side by side.", "routing.load_grads",
    "pointers += column_stride", "pointers += 1", "gradient_layout", "gradient",
)  # fmt: skip
mutant(
    SOFTMAX, "weights-through-float16", "Exponentials of the chosen are rounded to float16.", "routing._forward",
    "tl.exp(chosen_logits - highest)", "tl.exp(chosen_logits - highest).to(tl.float16).to(tl.float32)", "parity", "precision",
    "gpt-oss ports",
)  # fmt: skip
mutant(
    SOFTMAX, "gradient-not-centered", "The mean is not subtracted from the gradient.", "arithmetic.through_softmax",
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
    GROUPED, "second-best-forgotten", "A group's score is its best expert's alone.", "routing._keep_best_groups",
    "if GROUP_BEST == 2:", "if GROUP_BEST == 3:", "parity", "structural", "DeepSeek-V2 and V3 mixed up",
)  # fmt: skip
mutant(
    GROUPED, "epsilon-of-float32", "10^-12 is added to the sum of the weights.", "routing.SUM_EPSILON",
    "1e-20", "1e-12", "parity", "precision", "Diffulex#37",
)  # fmt: skip
mutant(
    GROUPED, "bias-stride-ignored", "The bias is taken to be contiguous.", "routing._forward",
    " * bias_stride", "", "layout", "memory",
)  # fmt: skip
mutant(
    GROUPED, "factor-without-gradient", "The factor is left out of the backward pass.", "routing._backward",
    "grads *= routed_scaling_factor", "grads *= 1.0", "gradients", "gradient",
)  # fmt: skip
mutant(
    OF_CHOSEN, "softmax-of-all", "Weights are probabilities among all experts.", "routers.topk_softmax",
    'divisor="sum"', 'divisor=""', "parity", "structural", "gpt-oss ports",
)  # fmt: skip
mutant(
    SIGMOID, "sum-of-zero", "Nothing is added to the sum of the weights, which underflows to 0.", "routing.SUM_EPSILON",
    "1e-20", "0.0", "parity", "precision", "Diffulex#37",
)  # fmt: skip
mutant(
    SCALING, "softmax-for-sigmoid", "Weights are probabilities.", "routers.sigmoid_input_scaling",
    'scores="sigmoid"', 'scores="softmax"', "parity", "structural", "Llama-4 ports",
)  # fmt: skip
mutant(
    GROUPED_SOFTMAX, "two-best-of-a-group", "A group's score is the sum of its two best.", "routers.grouped_softmax_topk",
    "group_best=1", "group_best=2", "parity", "structural", "DeepSeek-V2 and V3 mixed up",
)  # fmt: skip
mutant(
    BIASED, "chosen-without-bias", "The bias does not take part in the choice.", "routing._forward",
    "divide(tl.exp(logits - highest), total) + bias", "divide(tl.exp(logits - highest), total)", "parity", "structural",
)  # fmt: skip
mutant(
    BIASED, "divisor-without-a-least", "Weights are divided by their sum, however small.", "routing._forward",
    "tl.maximum(tl.sum(weights, axis=1), divisor_min)", "tl.sum(weights, axis=1)", "parity", "precision",
)  # fmt: skip
mutant(
    BIASED, "gradient-through-the-least", "Where weights are divided by the least, the sum still gets a gradient.",
    "routing._grads_of_scores", "tl.where(of_sum[:, None], inner, 0.0)", "inner", "gradients", "gradient",
)  # fmt: skip
mutant(
    ZERO, "first-identity-forgotten", "The first identity is taken for an expert.", "routers.zero_expert_topk",
    ">= router_logits", "> router_logits", "parity", "boundary",
)  # fmt: skip
mutant(
    ZERO, "identities-without-gradient", "The sum of the identities' weights is a constant.", "routers.zero_expert_topk",
    "torch.where(is_identity, topk_weights, 0)", "torch.where(is_identity, topk_weights, 0).detach()", "gradients", "gradient",
)  # fmt: skip
mutant(
    MIXER, "first-choice-in-the-second-softmax", "The expert chosen first takes part in the softmax of the second.",
    "sparsemixer._probabilities_near", "others & ~is_far", "~is_far", "parity", "structural",
)  # fmt: skip
mutant(
    MIXER, "not-relative-to-the-larger", "Distances are taken relative to the highest logit, also of negative ones.",
    "sparsemixer._probabilities_near", "tl.abs(logits)", "tl.broadcast_to(highest, logits.shape)", "parity", "structural",
)  # fmt: skip
