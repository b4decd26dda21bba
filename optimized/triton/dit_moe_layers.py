"""The MoE layer of DiT-MoE of the Triton router, experts and losses; its gate's product is torch's, in float32.

The operation is that of `gaugeblock.reference.torch.dit_moe_layers`, in bfloat16, float16 or float32. Differentiable once, in
hidden_states and all of `state`; the router takes the lower id of equal scores.
"""

from functools import partial

import torch

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.triton import auxiliary_losses, experts, shared_experts
from gaugeblock.optimized.triton.routing import route
from gaugeblock.reference.configs import DiTMoEConfig


def dit_moe_gate(router_logits: torch.Tensor, config: DiTMoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.dit_moe_layers.gate`; of scores that round to the same the higher logit is chosen."""
    return route(
        router_logits,
        top_k=config.top_k,
        scores=config.scores,
        divisor="sum + epsilon" if config.renormalize else "",
        num_groups=config.num_groups,
        topk_groups=config.topk_groups,
        group_best=1,
        routed_scaling_factor=config.routed_scaling_factor,
    )


PARTS = moe_composition.on_one_device(
    dit_moe_gate=dit_moe_gate,
    fused_swiglu=experts.fused_swiglu,
    shared_swiglu=shared_experts.shared_swiglu,
    balance_loss=partial(moe_composition.balance_loss, auxiliary_losses.sequence_balance_loss),
)

dit_moe = partial(moe_composition.dit_moe, PARTS)
