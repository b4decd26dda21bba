"""DiT and DiT-MoE with the backward pass of flash attention: equal in exact arithmetic, with other rounding.

Where autograd subtracts the mean of dP under P, a flash kernel subtracts delta = rowsum(dO · O), which needs no scores. Where
O is rounded before it is kept, delta has the error of that rounding, and dS = P (dP - delta) no longer sums to 0: the gradient
of the keys' bias, which is 0, is then as large as the rounding.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from gaugeblock.reference import states
from gaugeblock.reference.configs import DiTConfig, DiTMoEModelConfig
from gaugeblock.reference.torch import dit as model
from gaugeblock.reference.torch import dit_moe_layers, layers, modules

State = Mapping[str, torch.Tensor]


class FlashAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(features)) v, of which the backward pass keeps the result.

    Source: Dao et al. 2022 (arXiv:2205.14135), appendix B.2; delta as in equation 4.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        probabilities = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        attended = probabilities @ value
        ctx.save_for_backward(query, key, value, probabilities, attended)
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, probabilities, attended = ctx.saved_tensors
        delta = (gradient * attended).sum(-1, keepdim=True)
        of_scores = probabilities * (gradient @ value.mT - delta) / math.sqrt(query.shape[-1])
        return of_scores @ key, of_scores.mT @ query, probabilities.mT @ gradient


def dit(
    state: State,
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


def dit_moe(
    state: State, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, *, config: DiTMoEModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dit_moe.dit_moe` with that attention; arguments and result are its own, all of one dtype."""
    tokens = model.embed_patches(state, latents, config=config)
    times = timesteps.to(latents.dtype) * config.timestep_scale
    conditioning = model.embed_conditions(state, times, class_labels, config=config)
    losses = []
    for index in range(config.depth):
        block = model.block_state(state, index)
        tokens, modulated, gate = _attended(block, tokens, conditioning, config)
        out, _, _, loss = dit_moe_layers.dit_moe(modulated, states.part(block, "moe"), config=config.moe)
        tokens = layers.gated_residual(tokens, out, gate)
        losses.append(loss)
    return model.final_layer(state, tokens, conditioning, config=config), torch.stack(losses).sum()


def _block(state: State, tokens: torch.Tensor, conditioning: torch.Tensor, config: DiTConfig) -> torch.Tensor:
    tokens, modulated, gate = _attended(state, tokens, conditioning, config)
    inner = (state[f"mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
    return layers.gated_residual(tokens, layers.gelu_mlp(modulated, *inner), gate)


def _attended(
    state: State, tokens: torch.Tensor, conditioning: torch.Tensor, config: DiTConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens after attention, what the second branch gets of them, and its gate."""
    modulation = modules.linear(state, "adaLN_modulation.1", torch.nn.functional.silu(conditioning))
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, -1)
    modulated = layers.layer_norm_modulate(tokens, shift_1, scale_1, eps=model.NORM_EPS)
    qkv = modules.linear(state, "attn.qkv", modulated)
    query, key, value = qkv.unflatten(-1, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if "attn.q_norm.weight" in state:
        query, key = (
            modules.layer_norm(state, f"attn.{name}", each, eps=model.NORM_EPS)
            for name, each in (("q_norm", query), ("k_norm", key))
        )
    attended = modules.linear(state, "attn.proj", FlashAttention.apply(query, key, value).transpose(1, 2).flatten(2))
    return *layers.gated_residual_layer_norm_modulate(tokens, attended, gate_1, shift_2, scale_2, eps=config.norm_eps), gate_2
