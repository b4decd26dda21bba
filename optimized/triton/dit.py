"""DiT with everything between its matrix products fused: residual, gate, LayerNorm and modulation are one kernel.

A block is two such kernels (`layers`), of which the second normalizes for the next block already, beside torch's four
matrix products, `scaled_dot_product_attention` and GELU. So the tokens make one trip to memory between the branches
instead of the six of gated sum, normalization and modulation one by one. The modulations of all blocks come from the
conditioning alone and are computed first, [B, 6 D] each; the kernels read them in place.

Everything is in the dtype of the latents, results of products and of attention included, but for the inside of the
kernels and the sums of products, which are float32.

Shapes: as in `reference.torch.layers`.
"""

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled.dit import State, attention, embed_conditions, linear, mlp
from gaugeblock.optimized.triton.launch import reject_float64
from gaugeblock.optimized.triton.layers import gated_residual_layer_norm_modulate, layer_norm_modulate
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch import layers
from gaugeblock.reference.torch.dit import NORM_EPS, block_state, embed_patches, state_shapes


def dit(
    state: State, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, *, config: DiTConfig
) -> torch.Tensor:
    """Predict the noise or the velocity (and with `learn_sigma` the variance) in latents of a class at a time.

    Args:
        state: The parameters by name, shapes as in `reference.torch.dit.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, input_size, input_size], bfloat16, float16 or float32.
        timesteps: [batch_size], float32 or float64, usually in [0, 1000).
        class_labels: [batch_size], integer in 0 .. num_classes; num_classes is the label that was dropped.
        config: The model.

    Returns:
        [batch_size, out_channels, input_size, input_size], dtype as latents. Differentiable once, by latents and state.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; a label names no class; or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.dit.dit`.
    """
    validation.dit(state, latents, timesteps, class_labels, config, state_shapes(config))
    reject_float64("latents", latents)
    validation.class_labels_in_range(class_labels, config.num_classes)

    hidden_BSD = embed_patches(state, latents, config=config)
    active_BD = functional.silu(embed_conditions(state, timesteps, class_labels, config))
    prefixes = [*(f"blocks.{index}" for index in range(config.depth)), "final_layer"]
    modulations = [linear(state, f"{prefix}.adaLN_modulation.1", active_BD) for prefix in prefixes]
    # shift_1, scale_1, gate_1, shift_2, scale_2 and gate_2 of a block; shift and scale of the final layer
    parts = [modulation.unflatten(-1, (-1, config.hidden_size)).unbind(1) for modulation in modulations]

    modulated_BSD = layer_norm_modulate(hidden_BSD, *parts[0][:2], eps=NORM_EPS)
    for index in range(config.depth):
        block = block_state(state, index)
        gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = parts[index][2:]
        hidden_BSD, modulated_BSD = gated_residual_layer_norm_modulate(
            hidden_BSD, attention(block, modulated_BSD, config.num_heads), gate_1_BD, shift_2_BD, scale_2_BD, eps=config.norm_eps
        )
        hidden_BSD, modulated_BSD = gated_residual_layer_norm_modulate(
            hidden_BSD, mlp(block, modulated_BSD), gate_2_BD, *parts[index + 1][:2], eps=NORM_EPS
        )
    return layers.unpatchify(linear(state, "final_layer.linear", modulated_BSD), patch_size=config.patch_size)
