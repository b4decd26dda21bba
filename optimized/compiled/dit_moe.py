"""DiT-MoE of torch's fused operations, in the dtype of its inputs, with what lies around its experts compiled or left as it is.

The MoE layer is `dit_moe_layers.py`, which computes in float32 and rounds once; which rows an expert gets is known only when it
runs, so torch.compile gets the rest of a block, in two parts that serve all blocks.

Shapes: as in `reference.torch.layers`.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled import dit_moe_layers
from gaugeblock.optimized.compiled.dit import State, before_feed_forward, embed_conditions, final_patches, split_heads
from gaugeblock.optimized.compiled.library_layers import Fuse, compiled, gated_residual
from gaugeblock.optimized.model_parts import as_it_is, linear
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import DiTMoEModelConfig
from gaugeblock.reference.torch import layers
from gaugeblock.reference.torch.attention import join_heads
from gaugeblock.reference.torch.dit import NORM_EPS, embed_patches
from gaugeblock.reference.torch.dit_moe import state_shapes

Block: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""Of a block's parameters, tokens, silu of what steers, and config: tokens, and an auxiliary loss."""


def dit_moe(
    state: State, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, *, config: DiTMoEModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the velocity or the noise (and with `learn_sigma` the variance) in latents of a class at a time.

    Args:
        state: The parameters by name, shapes as in `reference.torch.dit_moe.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, input_size, input_size], floating.
        timesteps: [batch_size], float32 or float64.
        class_labels: [batch_size], integer in 0 .. num_classes; num_classes is the label that was dropped.
        config: The model.

    Returns:
        out: [batch_size, out_channels, input_size, input_size], dtype as latents. Differentiable once, by latents and state.
        auxiliary_loss: [], float32; differentiable likewise.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or `config` not a DiTMoEModelConfig.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or a label names no class.

    Source: `gaugeblock.reference.torch.dit_moe.dit_moe`.
    """
    return _predict(partial(block, compiled, dit_moe_layers.dit_moe), state, latents, timesteps, class_labels, config)


def dit_moe_by_library(
    state: State, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, *, config: DiTMoEModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `dit_moe`, with nothing compiled: each operation of torch is fused in itself."""
    return _predict(partial(block, as_it_is, dit_moe_layers.dit_moe), state, latents, timesteps, class_labels, config)


def _predict(
    block: Block,
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    config: DiTMoEModelConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    validation.dit(state, latents, timesteps, class_labels, config, state_shapes(config))
    validation.class_labels_in_range(class_labels, config.num_classes)
    return model_of_blocks(state, latents, timesteps, class_labels, config, block)


def model_of_blocks(
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    config: DiTMoEModelConfig,
    block: Block,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model of blocks. Nothing is checked."""
    hidden_BSD, losses = embed_patches(state, latents, config=config), []
    active_BD = functional.silu(embed_conditions(state, config.timestep_scale * timesteps, class_labels, config))
    for own in states.parts(state, "blocks", config.depth):
        hidden_BSD, loss = block(own, hidden_BSD, active_BD, config)
        losses.append(loss)
    out_BCHW = layers.unpatchify(final_patches(state, hidden_BSD, active_BD), patch_size=config.patch_size)
    return out_BCHW, torch.stack(losses).sum()


def block(
    fuse: Fuse,
    moe_layer: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    state: State,
    hidden_BSD: torch.Tensor,
    active_BD: torch.Tensor,
    config: DiTMoEModelConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a block to tokens [B, S, D], its experts by a function of its own; return its auxiliary loss too."""
    hidden_BSD, modulated_BSD, gate_BD = fuse(_before_experts)(
        state, hidden_BSD, active_BD, config.num_heads, config.norm_eps, has_norms=config.qk_norm
    )
    experts_BSD, _, _, loss = moe_layer(modulated_BSD, states.part(state, "moe"), config=config.moe)
    return fuse(gated_residual)(hidden_BSD, experts_BSD, gate_BD), loss


def _before_experts(
    block: State, hidden_BSD: torch.Tensor, active_BD: torch.Tensor, num_heads: int, norm_eps: float, *, has_norms: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    branch = partial(attention, num_heads=num_heads, has_norms=has_norms)
    return before_feed_forward(block, hidden_BSD, active_BD, branch, norm_eps)


def attention(block: State, modulated_BSD: torch.Tensor, *, num_heads: int, has_norms: bool) -> torch.Tensor:
    """Return the attention branch of a block, [B, S, D]."""
    query_BASF, key_BASF, value_BASF = split_heads(block, modulated_BSD, num_heads)
    if has_norms:
        query_BASF, key_BASF = _head_norm(block, "q_norm", query_BASF), _head_norm(block, "k_norm", key_BASF)
    return linear(block, "attn.proj", join_heads(functional.scaled_dot_product_attention(query_BASF, key_BASF, value_BASF)))


def _head_norm(block: State, name: str, heads_BASF: torch.Tensor) -> torch.Tensor:
    """Return queries or keys with each head normalized."""
    weight, bias = block[f"attn.{name}.weight"], block[f"attn.{name}.bias"]
    return functional.layer_norm(heads_BASF, weight.shape, weight, bias, NORM_EPS)
