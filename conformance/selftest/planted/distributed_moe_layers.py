"""Bugs of our MoE layers over ranks, in what is of all ranks' tokens."""

from typing import Any

from gaugeblock.conformance.selftest.edits import mutant

DIT_MOE, GPT2 = "dit_moe_layers.dit_moe", "biased_moe_layers.upcycled_gpt2_moe"
LOSS, LOAD = "auxiliary_losses.balance_loss", "auxiliary_losses.load_fractions"
ON_TWO: dict[str, Any] = {"implementation": "expert-parallel", "world_sizes": (1, 2)}

mutant(
    DIT_MOE, "loss-of-own-tokens", "Each rank returns the loss of its own tokens.", LOSS,
    "SumOverRanks.apply(torch.stack([assignments_E.double(), scores_E]), group)", "assignments_E.double(), scores_E",
    "world_size", "structural", "losses that a data-parallel rank computes alone", **ON_TWO,
)  # fmt: skip
mutant(
    DIT_MOE, "mean-of-ranks-means", "Of samples, each rank's mean counts as one, however many it has.", LOSS,
    "* len(router_logits)\n        num_samples = torch.full_like(of_samples, len(router_logits))",
    "\n        num_samples = torch.ones_like(of_samples)", "world_size", "structural", **ON_TWO,
)  # fmt: skip
mutant(
    DIT_MOE, "gradient-of-the-loss-once-a-rank", "Every rank's cotangent of the one loss is counted.", LOSS,
    "    num_assignments =",
    "    scores_E = scores_E + (dist.get_world_size(group) - 1) * (scores_E - scores_E.detach())\n    num_assignments =",
    "world_size", "gradient", "autograd through all_reduce", **ON_TWO,
)  # fmt: skip
mutant(
    GPT2, "load-of-own-tokens", "Each rank returns the load that its own tokens make.", LOAD,
    "sum_over_ranks(_assignments(topk_ids, router_logits.shape[1]), group)",
    "_assignments(topk_ids, router_logits.shape[1])", "world_size", "structural", **ON_TWO,
)  # fmt: skip
mutant(
    GPT2, "load-per-own-assignment", "All ranks' assignments are divided by those of the rank: its loads sum to more than 1.",
    LOAD, "assignments_E.sum().clamp(min=1)", "max(1, topk_ids.numel())", "world_size", "structural", **ON_TWO,
)  # fmt: skip
