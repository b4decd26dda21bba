"""DiT-MoE with everything between its matrix products fused: adaptive norms as in `dit`, routing, experts and losses as in
`dit_moe_layers`.

A block is two kernels of residual, gate, LayerNorm and modulation, of which the second normalizes for the next block already;
torch's matrix products, `scaled_dot_product_attention` and LayerNorms of queries and keys; and the MoE layer's kernels.
Everything is in the dtype of the latents, results of products and of attention included, but for the inside of the kernels, the
gates and the sums of products, which are float32.

Shapes: as in `reference.torch.layers`.
"""

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled.dit import State, embed_conditions, linear
from gaugeblock.optimized.compiled.dit_moe import attention
from gaugeblock.optimized.triton.dit_moe_layers import dit_moe as moe_layer
from gaugeblock.optimized.triton.launch import reject_float64
from gaugeblock.optimized.triton.layers import gated_residual_layer_norm_modulate, layer_norm_modulate
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import DiTMoEModelConfig
from gaugeblock.reference.torch import layers
from gaugeblock.reference.torch.dit import NORM_EPS, block_state, embed_patches
from gaugeblock.reference.torch.dit_moe import state_shapes


def dit_moe(
    state: State, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, *, config: DiTMoEModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the velocity or the noise (and with `learn_sigma` the variance) in latents of a class at a time.

    Args:
        state: The parameters by name, shapes as in `reference.torch.dit_moe.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, input_size, input_size], bfloat16, float16 or float32.
        timesteps: [batch_size], float32 or float64.
        class_labels: [batch_size], integer in 0 .. num_classes; num_classes is the label that was dropped.
        config: The model.

    Returns:
        out: [batch_size, out_channels, input_size, input_size], dtype as latents. Differentiable once, by latents and state.
        auxiliary_loss: [], float32; differentiable likewise.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or `config` not a DiTMoEModelConfig.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; a label names no class; or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.dit_moe.dit_moe`.
    """
    validation.dit(state, latents, timesteps, class_labels, config, state_shapes(config))
    reject_float64("latents", latents)
    validation.class_labels_in_range(class_labels, config.num_classes)

    hidden_BSD = embed_patches(state, latents, config=config)
    active_BD = functional.silu(embed_conditions(state, config.timestep_scale * timesteps, class_labels, config))
    prefixes = [*(f"blocks.{index}" for index in range(config.depth)), "final_layer"]
    modulations = [linear(state, f"{prefix}.adaLN_modulation.1", active_BD) for prefix in prefixes]
    # shift_1, scale_1, gate_1, shift_2, scale_2 and gate_2 of a block; shift and scale of the final layer
    parts = [modulation.unflatten(-1, (-1, config.hidden_size)).unbind(1) for modulation in modulations]

    modulated_BSD, losses = layer_norm_modulate(hidden_BSD, *parts[0][:2], eps=NORM_EPS), []
    for index in range(config.depth):
        block = block_state(state, index)
        gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = parts[index][2:]
        attention_BSD = attention(block, modulated_BSD, num_heads=config.num_heads, has_norms=config.qk_norm)
        hidden_BSD, modulated_BSD = gated_residual_layer_norm_modulate(
            hidden_BSD, attention_BSD, gate_1_BD, shift_2_BD, scale_2_BD, eps=config.norm_eps
        )
        experts_BSD, _, _, loss = moe_layer(modulated_BSD, states.part(block, "moe"), config=config.moe)
        losses.append(loss)
        hidden_BSD, modulated_BSD = gated_residual_layer_norm_modulate(
            hidden_BSD, experts_BSD, gate_2_BD, *parts[index + 1][:2], eps=NORM_EPS
        )
    out_BCHW = layers.unpatchify(linear(state, "final_layer.linear", modulated_BSD), patch_size=config.patch_size)
    return out_BCHW, torch.stack(losses).sum()
