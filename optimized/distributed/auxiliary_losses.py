"""Losses and figures of a router's load, of all ranks' tokens: each rank has some of them, and returns what all of them give.

Ranks tell each other sums over their tokens, a few numbers of each expert, and no token's. They are added up in the order of the
ranks, in float64, in which they lose nothing that shows, so that every rank returns the same bits, and about those of one device.

Every rank differentiates the one result that all have: it is given the same cotangent on every rank, and returns the gradient of
its own tokens' logits, which is whole. What adds up gradients over the ranks, as of a router's weights, counts the loss once.

Shapes: T num_tokens of this rank, E num_experts.
"""

import torch
import torch.distributed as dist

from gaugeblock.optimized.distributed.collectives import SumOverRanks, sum_over_ranks
from gaugeblock.reference.configs import DiTMoEConfig
from gaugeblock.reference.torch import dit_moe_layers as reference
from gaugeblock.reference.torch.auxiliary_losses import expert_load, normalized_scores


def balance_loss(
    router_logits: torch.Tensor, topk_ids: torch.Tensor, config: DiTMoEConfig, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return the auxiliary loss of the samples of all ranks, or of all their tokens as one.

    Args:
        router_logits: [batch_size of this rank, num_tokens, num_experts], float32 or float64; any number of samples, also 0.
        topk_ids: [batch_size of this rank, num_tokens, top_k], integer in 0..num_experts - 1.
        config: The options, the same on every rank.
        group: Of the ranks; all of them call it.

    Returns:
        [], dtype as router_logits, the same on every rank; 0 where no rank has a token.

    Source: `gaugeblock.reference.torch.dit_moe_layers.balance_loss`.
    """
    if config.per_sample:  # ranks' means weigh as much as they have samples
        of_samples = reference.balance_loss(router_logits, topk_ids, config).double() * len(router_logits)
        num_samples = torch.full_like(of_samples, len(router_logits))
        total, num_samples = SumOverRanks.apply(torch.stack([of_samples, num_samples]), group)
        return (total / num_samples.clamp(min=1)).to(router_logits.dtype)

    assignments_E = _assignments(topk_ids.flatten(0, 1), router_logits.shape[2])
    scores_E = normalized_scores(router_logits, config.scores).sum(dim=(0, 1), dtype=torch.float64)
    assignments_E, scores_E = SumOverRanks.apply(torch.stack([assignments_E.double(), scores_E]), group)
    num_assignments = assignments_E.sum().clamp(min=1)
    load_E = len(assignments_E) * assignments_E / num_assignments
    probability_E = scores_E / (num_assignments / topk_ids.shape[2])
    return (config.aux_loss_alpha * (load_E * probability_E).sum()).to(router_logits.dtype)


def load_fractions(topk_ids: torch.Tensor, router_logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return each expert's part of all ranks' assignments, [num_experts], in the dtype of the logits; 0 where there are none.

    Args:
        topk_ids: [num_tokens of this rank, top_k], integer in 0..num_experts - 1.
        router_logits: [num_tokens of this rank, num_experts].
        group: Of the ranks; all of them call it.

    Source: `gaugeblock.reference.torch.biased_moe_layers.load_fractions`.
    """
    assignments_E = sum_over_ranks(_assignments(topk_ids, router_logits.shape[1]), group)
    return assignments_E.to(router_logits.dtype) / assignments_E.sum().clamp(min=1)


def _assignments(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count how often this rank's tokens choose each expert, [num_experts] int64."""
    counted_T = torch.ones(len(topk_ids), dtype=torch.bool, device=topk_ids.device)
    return expert_load(topk_ids, counted_T, num_experts=num_experts)
