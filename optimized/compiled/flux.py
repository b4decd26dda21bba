"""Flux of torch's fused operations, in the dtype of its inputs, with its blocks compiled by torch.compile or left as they are.

One compilation serves all blocks of a kind, so that its time does not grow with their number; everything between the matrix
products and `scaled_dot_product_attention` is fused. Sums of products, norms of queries and keys, rotations, and the inside of
an operation, are float32.

Shapes: as in `reference.torch.flux`.
"""

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled.library_layers import (
    Fuse,
    compiled,
    gated_residual,
    gated_residual_layer_norm_modulate,
    layer_norm_modulate,
)
from gaugeblock.optimized.model_parts import as_it_is, linear, two_linears
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch import layers
from gaugeblock.reference.torch.attention import join_heads, split_heads
from gaugeblock.reference.torch.flux import (
    FREQUENCY_EMBEDDING_SIZE,
    HEADS,
    NORM_EPS,
    TEXT_HEADS,
    THETA,
    TIME_SCALE,
    State,
    state_shapes,
)
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.rotary import qk_norm_rotary, rotary_table

Table = tuple[torch.Tensor, torch.Tensor]
_T = torch.Tensor
Arrays = tuple[_T, _T, _T, _T, _T, _T, _T]


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
        hidden_states: [batch_size, num_image_tokens, in_channels], floating.
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
        ValueError: An entry of the state is missing, unexpected or of another shape, or ranks, sizes or devices do not fit
            together.

    Source: `gaugeblock.reference.torch.flux.flux`.
    """
    arrays = hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids
    return _predict(compiled, state, arrays, config)


def flux_by_library(
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
    """As `flux`, with nothing compiled: each operation of torch is fused in itself."""
    arrays = hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids
    return _predict(as_it_is, state, arrays, config)


def _predict(fuse: Fuse, state: State, arrays: Arrays, config: FluxConfig) -> torch.Tensor:
    """Take tokens of image and text, pooled text, times, guidances and places."""
    validation.flux(state, *arrays, config, state_shapes(config))
    image_BSD, text_BTD, active_BD, table = embed(state, *arrays, config)
    for block in states.parts(state, "transformer_blocks", config.num_layers):
        image_BSD, text_BTD = fuse(_block)(block, image_BSD, text_BTD, active_BD, table, config.num_attention_heads)
    joint_BJD = torch.cat([text_BTD, image_BSD], dim=1)
    for block in states.parts(state, "single_transformer_blocks", config.num_single_layers):
        joint_BJD = fuse(_single_block)(block, joint_BJD, active_BD, table, config.num_attention_heads)
    scale_BD, shift_BD = steering(state, "norm_out", active_BD)
    image_BSD = layer_norm_modulate(joint_BJD[:, text_BTD.shape[1] :], shift_BD, scale_BD, eps=NORM_EPS)
    return linear(state, "proj_out", image_BSD)


def _block(
    state: State, image_BSD: torch.Tensor, text_BTD: torch.Tensor, active_BD: torch.Tensor, table: Table, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    image_parts, text_parts = steering(state, "norm1", active_BD), steering(state, "norm1_context", active_BD)
    branches = joint_attention(
        state,
        layer_norm_modulate(image_BSD, *image_parts[:2], eps=NORM_EPS),
        layer_norm_modulate(text_BTD, *text_parts[:2], eps=NORM_EPS),
        table,
        num_heads,
    )
    image_BSD = _end_block(state, "ff", image_BSD, image_parts, branches[0])
    return image_BSD, _end_block(state, "ff_context", text_BTD, text_parts, branches[1])


def _end_block(
    state: State, name: str, residual: torch.Tensor, parts: tuple[torch.Tensor, ...], branch: torch.Tensor
) -> torch.Tensor:
    gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = parts[2:]
    hidden_BSD, modulated_BSD = gated_residual_layer_norm_modulate(
        residual, branch, gate_1_BD, shift_2_BD, scale_2_BD, eps=NORM_EPS
    )
    return gated_residual(hidden_BSD, feed_forward(state, name, modulated_BSD), gate_2_BD)


def _single_block(state: State, joint_BJD: torch.Tensor, active_BD: torch.Tensor, table: Table, num_heads: int) -> torch.Tensor:
    shift_BD, scale_BD, gate_BD = steering(state, "norm", active_BD)
    modulated_BJD = layer_norm_modulate(joint_BJD, shift_BD, scale_BD, eps=NORM_EPS)
    return gated_residual(joint_BJD, single_branch(state, modulated_BJD, table, num_heads), gate_BD)


def embed(
    state: State,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    guidance: torch.Tensor,
    img_ids: torch.Tensor,
    txt_ids: torch.Tensor,
    config: FluxConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Table]:
    """Return tokens of image and text, [B, S, D] and [B, T, D], silu of what steers the blocks, [B, D], and the rotary table.

    Waves of times and angles are computed in float32 at least, the angles of guidances reach some thousands.
    """
    times = {"timestep_embedder": timesteps} | ({"guidance_embedder": guidance} if config.guidance_embeds else {})
    conditioning_BD = _two_linears(state, "text_embedder", pooled_projections)
    for name, each in times.items():
        waves_BF = layers.timestep_embedding(TIME_SCALE * each, embedding_size=FREQUENCY_EMBEDDING_SIZE, frequency_shift=0)
        conditioning_BD = conditioning_BD + _two_linears(state, name, waves_BF.to(pooled_projections.dtype))
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return (
        linear(state, "x_embedder", hidden_states),
        linear(state, "context_embedder", encoder_hidden_states),
        functional.silu(conditioning_BD),
        rotary_table(torch.cat([txt_ids, img_ids]), features=config.axes_dims_rope, theta=THETA, dtype=dtype),
    )


def _two_linears(state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
    return two_linears(state, (f"time_text_embed.{name}.linear_1", f"time_text_embed.{name}.linear_2"), inputs)


def steering(state: State, name: str, active_BD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the shifts, scales and gates that the layer of that name makes, [B, D] each."""
    return linear(state, f"{name}.linear", active_BD).unflatten(-1, (-1, active_BD.shape[-1])).unbind(1)


def joint_attention(
    state: State, image_BSD: torch.Tensor, text_BTD: torch.Tensor, table: Table, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention branches of image and text, [B, S, D] and [B, T, D]."""
    num_text_tokens = text_BTD.shape[1]
    cos_JR, sin_JR = table
    of_text = heads(state, TEXT_HEADS, text_BTD, (cos_JR[:num_text_tokens], sin_JR[:num_text_tokens]), num_heads)
    of_image = heads(state, HEADS, image_BSD, (cos_JR[num_text_tokens:], sin_JR[num_text_tokens:]), num_heads)
    query, key, value = (torch.cat(both, dim=2) for both in zip(of_text, of_image, strict=True))
    attended_BJD = join_heads(functional.scaled_dot_product_attention(query, key, value))
    image_branch_BSD = linear(state, "attn.to_out.0", attended_BJD[:, num_text_tokens:])
    return image_branch_BSD, linear(state, "attn.to_add_out", attended_BJD[:, :num_text_tokens])


def heads(
    state: State, names: tuple[str, ...], modulated_BSD: torch.Tensor, table: Table, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values, [B, A, S, F] each, queries and keys normalized and turned in float32."""
    *projections, norm_q, norm_k = names
    query, key, value = (split_heads(linear(state, name, modulated_BSD), num_heads) for name in projections)
    wide_query, wide_key = at_least_float32(query), at_least_float32(key)
    weights = at_least_float32(state[f"{norm_q}.weight"]), at_least_float32(state[f"{norm_k}.weight"])
    query, key = qk_norm_rotary(wide_query, wide_key, *weights, *table, eps=NORM_EPS, pairs="interleaved")
    return query.to(value.dtype), key.to(value.dtype), value


def feed_forward(state: State, name: str, modulated_BSD: torch.Tensor) -> torch.Tensor:
    """Return the branch of the feed-forward network of that name, [B, S, D]."""
    inner_BSI = functional.gelu(linear(state, f"{name}.net.0.proj", modulated_BSD), approximate="tanh")
    return linear(state, f"{name}.net.2", inner_BSI)


def single_branch(state: State, modulated_BJD: torch.Tensor, table: Table, num_heads: int) -> torch.Tensor:
    """Return what a block with one stream adds: attention and feed-forward network together, [B, J, D]."""
    query, key, value = heads(state, HEADS, modulated_BJD, table, num_heads)
    attended_BJD = join_heads(functional.scaled_dot_product_attention(query, key, value))
    inner_BJI = functional.gelu(linear(state, "proj_mlp", modulated_BJD), approximate="tanh")
    return linear(state, "proj_out", torch.cat([attended_BJD, inner_BJI], dim=-1))
