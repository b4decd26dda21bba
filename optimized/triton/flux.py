"""Flux with what lies between its matrix products fused: residual, gate, LayerNorm and modulation are one kernel.

A stream of a block with two is two such kernels (`layers`), a block with one stream is one: each ends its branch and normalizes
for the next, so that the tokens make one trip to memory between two branches. Queries and keys are normalized and turned in a
kernel each (`rotary`). Beside them are torch's matrix products, `scaled_dot_product_attention` and GELU. The modulations of all
blocks come from the conditioning alone and are computed first; the kernels read them in place.

Everything is in the dtype of the tokens, results of products and of attention included, but for the inside of the kernels and
the sums of products, which are float32.

Shapes: as in `reference.torch.flux`.
"""

from functools import partial

import torch

from gaugeblock.optimized.compiled.flux import (
    Heads,
    Table,
    embed,
    feed_forward,
    joint_attention,
    projected_heads,
    single_branch,
    steering,
)
from gaugeblock.optimized.triton.launch import reject_float64
from gaugeblock.optimized.triton.layers import gated_residual_layer_norm_modulate, layer_norm_modulate
from gaugeblock.optimized.triton.rotary import qk_norm_rotary
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch import modules
from gaugeblock.reference.torch.flux import NORM_EPS, State, state_shapes

Parts = tuple[torch.Tensor, ...]


def flux(
    state: State,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    guidance: torch.Tensor,
    img_ids: torch.Tensor,
    txt_ids: torch.Tensor,
    *,
    config: FluxConfig,
) -> torch.Tensor:
    """Predict the velocity of packed latents at a time, as a text describes them.

    Args:
        state: The parameters by name, shapes as in `reference.torch.flux.state_shapes`, dtype of hidden_states.
        hidden_states: [batch_size, num_image_tokens, in_channels], bfloat16, float16 or float32.
        encoder_hidden_states: [batch_size, num_text_tokens, joint_attention_dim], dtype of hidden_states.
        pooled_projections: [batch_size, pooled_projection_dim], dtype of hidden_states.
        timesteps: [batch_size], float32 or float64, in [0, 1].
        guidance: [batch_size], float32 or float64; read where the config has `guidance_embeds`.
        img_ids: [num_image_tokens, axes], float32 or float64.
        txt_ids: [num_text_tokens, axes], float32 or float64.
        config: The model.

    Returns:
        [batch_size, num_image_tokens, out_features], dtype as hidden_states. Differentiable once, by the first four.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.flux.flux`.
    """
    arrays = hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids
    validation.flux(state, *arrays, config, state_shapes(config))
    reject_float64("hidden_states", hidden_states)

    image_BSD, text_BTD, active_BD, table = embed(state, arrays, config)
    heads = partial(_heads, num_heads=config.num_attention_heads)
    blocks = [states.part(state, f"transformer_blocks.{index}") for index in range(config.num_layers)]
    singles = [states.part(state, f"single_transformer_blocks.{index}") for index in range(config.num_single_layers)]
    # shift and scale of what comes after each block: of a block with one stream, both streams have the same
    single_parts = [steering(block, "norm", active_BD) for block in singles] + [steering(state, "norm_out", active_BD)[::-1]]
    image_parts = [steering(block, "norm1", active_BD) for block in blocks] + single_parts[:1]
    text_parts = [steering(block, "norm1_context", active_BD) for block in blocks] + single_parts[:1]

    image_modulated_BSD = layer_norm_modulate(image_BSD, *image_parts[0][:2], eps=NORM_EPS)
    text_modulated_BTD = layer_norm_modulate(text_BTD, *text_parts[0][:2], eps=NORM_EPS)
    for index, block in enumerate(blocks):
        image_branch_BSD, text_branch_BTD = joint_attention(block, image_modulated_BSD, text_modulated_BTD, table, heads)
        image_BSD, image_modulated_BSD = _end_block(block, "ff", image_BSD, image_branch_BSD, *image_parts[index : index + 2])
        text_BTD, text_modulated_BTD = _end_block(block, "ff_context", text_BTD, text_branch_BTD, *text_parts[index : index + 2])

    joint_BJD = torch.cat([text_BTD, image_BSD], dim=1)
    modulated_BJD = torch.cat([text_modulated_BTD, image_modulated_BSD], dim=1)
    for index, block in enumerate(singles):
        branch_BJD = single_branch(block, modulated_BJD, table, heads)
        if index == config.num_single_layers - 1:  # the text's tokens end here
            joint_BJD, branch_BJD = joint_BJD[:, text_BTD.shape[1] :], branch_BJD[:, text_BTD.shape[1] :]
        gate_BD, next_parts = single_parts[index][2], single_parts[index + 1]
        joint_BJD, modulated_BJD = gated_residual_layer_norm_modulate(
            joint_BJD, branch_BJD, gate_BD, *next_parts[:2], eps=NORM_EPS
        )
    return modules.linear(state, "proj_out", modulated_BJD)


def _heads(state: State, names: tuple[str, ...], modulated_BSD: torch.Tensor, table: Table, num_heads: int) -> Heads:
    """Return queries, keys and values, [B, A, S, F] each, queries and keys normalized and turned."""
    query, key, value = projected_heads(state, names, modulated_BSD, num_heads)
    query_weight, key_weight = (state[f"{norm}.weight"] for norm in names[3:])
    query, key = qk_norm_rotary(query, key, query_weight, key_weight, *table, eps=NORM_EPS, pairs="interleaved")
    return query, key, value


def _end_block(
    state: State, name: str, residual: torch.Tensor, branch: torch.Tensor, parts: Parts, next_parts: Parts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a stream's tokens after a block, and the same as the next block's first product takes them."""
    gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = parts[2:]
    hidden_BSD, modulated_BSD = gated_residual_layer_norm_modulate(
        residual, branch, gate_1_BD, shift_2_BD, scale_2_BD, eps=NORM_EPS
    )
    branch = feed_forward(state, name, modulated_BSD)
    return gated_residual_layer_norm_modulate(hidden_BSD, branch, gate_2_BD, *next_parts[:2], eps=NORM_EPS)
