"""MMDiT with what lies between its matrix products fused: residual, gate, LayerNorm and modulation are one kernel.

For the image as for the text, a block is two such kernels (`layers`), of which the second normalizes for the next block
already, beside torch's matrix products, `scaled_dot_product_attention` and GELU. The steering of all blocks comes from the
conditioning alone and is computed first; the kernels read it in place. Where the image attends to itself once more, one kernel
normalizes for that. Where heads of queries and keys are normalized, each kind of each stream is one kernel (`norms`), which reads
the projections in place.

Everything is in the dtype of the latents, results of products and of attention included, but for the inside of the kernels
and the sums of products, which are float32.

Shapes: as in `reference.torch.mmdit`.
"""

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled.mmdit import (
    embed_conditions,
    feed_forward,
    joint_attention,
    self_attention,
    steering,
    text_steering,
)
from gaugeblock.optimized.triton.launch import reject_float64
from gaugeblock.optimized.triton.layers import gated_residual_layer_norm_modulate, layer_norm_modulate
from gaugeblock.optimized.triton.norms import rms_norm
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.torch import layers, modules
from gaugeblock.reference.torch.mmdit import NORM_EPS, State, block_state, embed_patches, state_shapes


def mmdit(
    state: State,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    config: MMDiTConfig,
) -> torch.Tensor:
    """Predict the velocity (noise - data) in latents of a text at a time.

    Args:
        state: The parameters by name, shapes as in `reference.torch.mmdit.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, height, width], bfloat16, float16 or float32; height and width are multiples of
            patch_size, up to pos_embed_max_size patches.
        encoder_hidden_states: [batch_size, num_text_tokens, joint_attention_dim], dtype of latents.
        pooled_projections: [batch_size, pooled_projection_dim], dtype of latents.
        timesteps: [batch_size], float32 or float64, in [0, 1000]: 1000 times the share of noise.
        config: The model.

    Returns:
        [batch_size, out_channels, height, width], dtype as latents. Differentiable once, by all but the times.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.mmdit.mmdit`.
    """
    validation.mmdit(state, latents, encoder_hidden_states, pooled_projections, timesteps, config, state_shapes(config))
    reject_float64("latents", latents)

    active_BD = functional.silu(embed_conditions(state, timesteps, pooled_projections))
    last = config.num_layers - 1
    blocks = [block_state(state, index) for index in range(config.num_layers)]
    # shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 of a block, and maybe shift_3, scale_3, gate_3; shift, scale at the end
    image_parts = [*(steering(block, "norm1", active_BD) for block in blocks), steering(state, "norm_out", active_BD)[::-1]]
    text_parts = [text_steering(block, active_BD, is_last=index == last) for index, block in enumerate(blocks)]

    hidden_BSD = embed_patches(state, latents, config=config)
    text_BTD = modules.linear(state, "context_embedder", encoder_hidden_states)
    modulated_BSD = layer_norm_modulate(hidden_BSD, *image_parts[0][:2], eps=NORM_EPS)
    text_modulated_BTD = layer_norm_modulate(text_BTD, *text_parts[0][:2], eps=NORM_EPS)
    for index, block in enumerate(blocks):
        attention = states.part(block, "attn")
        attended = joint_attention(
            attention, modulated_BSD, text_modulated_BTD, config.num_attention_heads, is_last=index == last, norm=rms_norm
        )
        if index in config.dual_attention_layers:
            shift_3_BD, scale_3_BD, gate_3_BD = image_parts[index][6:]
            modulated_BSD = layer_norm_modulate(hidden_BSD, shift_3_BD, scale_3_BD, eps=NORM_EPS)
            more_BSD = self_attention(states.part(block, "attn2"), modulated_BSD, config.num_attention_heads, rms_norm)
            hidden_BSD = layers.gated_residual(hidden_BSD, more_BSD, gate_3_BD)
        following = image_parts[index + 1]
        hidden_BSD, modulated_BSD = _rest(block, "ff", hidden_BSD, attended[0], image_parts[index], following)
        if index < last:
            following = text_parts[index + 1]
            text_BTD, text_modulated_BTD = _rest(block, "ff_context", text_BTD, attended[1], text_parts[index], following)
    patches_BSI = modules.linear(state, "proj_out", modulated_BSD)
    return layers.unpatchify(patches_BSI, patch_size=config.patch_size, num_rows=latents.shape[2] // config.patch_size)


def _rest(
    block: State,
    name: str,
    hidden_BSD: torch.Tensor,
    attended_BSD: torch.Tensor,
    parts: tuple[torch.Tensor, ...],
    following: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of image or text after a block, and modulated for the next."""
    gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = parts[2:6]
    hidden_BSD, modulated_BSD = gated_residual_layer_norm_modulate(
        hidden_BSD, attended_BSD, gate_1_BD, shift_2_BD, scale_2_BD, eps=NORM_EPS
    )
    mlp_BSD = feed_forward(block, name, modulated_BSD)
    return gated_residual_layer_norm_modulate(hidden_BSD, mlp_BSD, gate_2_BD, *following[:2], eps=NORM_EPS)
