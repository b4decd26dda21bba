"""DiT with the backward pass of flash attention: equal in exact arithmetic, with other rounding.

Where autograd subtracts the mean of dP under P, a flash kernel subtracts delta = rowsum(dO · O), which needs no scores. Where
O is rounded before it is kept, delta has the error of that rounding, and dS = P (dP - delta) no longer sums to 0: the gradient
of the keys' bias, which is 0, is then as large as the rounding.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch import dit as model
from gaugeblock.reference.torch import layers


class FlashAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(features)) v, of which the backward pass keeps the result; keys that a mask hides are left out.

    Source: Dao et al. 2022 (arXiv:2205.14135), appendix B.2; delta as in equation 4.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if mask is None:
            probabilities = scores.softmax(-1)
        else:  # a row without any key gives 0
            is_lost = ~mask.any(dim=-1, keepdim=True)
            probabilities = torch.where(is_lost, 0.0, torch.where(mask | is_lost, scores, -math.inf).softmax(-1))
        attended = probabilities @ value
        ctx.save_for_backward(query, key, value, probabilities, attended)
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, probabilities, attended = ctx.saved_tensors
        delta = (gradient * attended).sum(-1, keepdim=True)
        of_scores = probabilities * (gradient @ value.mT - delta) / math.sqrt(query.shape[-1])
        return of_scores @ key, of_scores.mT @ query, probabilities.mT @ gradient, None


def dit(
    state: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    *,
    config: DiTConfig,
) -> torch.Tensor:
    """`dit.dit` with that attention; arguments and result are its own, all of one dtype."""
    tokens = model.embed_patches(state, latents, config=config)
    conditioning = model.embed_conditions(state, timesteps.to(latents.dtype), class_labels, config=config)
    for index in range(config.depth):
        tokens = _block(model.block_state(state, index), tokens, conditioning, config)
    return model.final_layer(state, tokens, conditioning, config=config)


def _block(
    state: Mapping[str, torch.Tensor], tokens: torch.Tensor, conditioning: torch.Tensor, config: DiTConfig
) -> torch.Tensor:
    active = torch.nn.functional.silu(conditioning)
    modulation = layers.linear(active, state["adaLN_modulation.1.weight"], state["adaLN_modulation.1.bias"])
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, -1)
    modulated = layers.layer_norm_modulate(tokens, shift_1, scale_1, eps=model.NORM_EPS)
    qkv = layers.linear(modulated, state["attn.qkv.weight"], state["attn.qkv.bias"])
    heads = qkv.unflatten(-1, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attended = FlashAttention.apply(*heads).transpose(1, 2).flatten(2)
    attended = layers.linear(attended, state["attn.proj.weight"], state["attn.proj.bias"])
    tokens, modulated = layers.gated_residual_layer_norm_modulate(tokens, attended, gate_1, shift_2, scale_2, eps=config.norm_eps)
    inner = (state[f"mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
    return layers.gated_residual(tokens, layers.gelu_mlp(modulated, *inner), gate_2)
