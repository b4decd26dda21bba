"""Flux of torch's fused operations, in the dtype of its inputs, with its blocks compiled by torch.compile or left as they are.

One compilation serves all blocks of a kind, so that its time does not grow with their number; everything between the matrix
products and `scaled_dot_product_attention` is fused. Sums of products, norms of queries and keys, rotations, and the inside of
an operation, are float32.

Shapes: as in `reference.torch.flux`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

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

Table: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, [J, R] each."""
_T = torch.Tensor
Arrays: TypeAlias = Sequence[_T]
"""All arguments of `flux` from hidden_states to txt_ids."""
Streams: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Of the image, and of the text."""
Heads: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values."""
MakesHeads: TypeAlias = Callable[[State, tuple[str, ...], torch.Tensor, Table], Heads]
"""Of a block's parameters, the names of those that make heads, tokens and their rows of the table."""
Attention: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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


def _predict(fuse: Fuse, state: State, arrays: tuple[_T, _T, _T, _T, _T, _T, _T], config: FluxConfig) -> torch.Tensor:
    """Take tokens of image and text, pooled text, times, guidances and places."""
    validation.flux(state, *arrays, config, state_shapes(config))
    blocks = (partial(fuse(each), num_heads=config.num_attention_heads) for each in (block, single_block))
    return model_of_blocks(state, arrays, config, *blocks)


def block(
    state: State, image_BSD: torch.Tensor, text_BTD: torch.Tensor, active_BD: torch.Tensor, table: Table, num_heads: int
) -> Streams:
    """Apply a block with two streams of tokens, [B, S, D] and [B, T, D]."""
    branches = partial(joint_attention, heads=partial(heads, num_heads=num_heads)), feed_forwards
    return block_of_branches(state, image_BSD, text_BTD, active_BD, table, *branches)


def single_block(state: State, joint_BJD: torch.Tensor, active_BD: torch.Tensor, table: Table, num_heads: int) -> torch.Tensor:
    """Apply a block with one stream of tokens, [B, J, D]."""
    return single_block_of_branch(
        state, joint_BJD, active_BD, table, partial(single_branch, heads=partial(heads, num_heads=num_heads))
    )


def model_of_blocks(
    state: State, arrays: Arrays, config: FluxConfig, block: Callable[..., Streams], single_block: Callable
) -> torch.Tensor:
    """Run the model on all arguments of `flux` from hidden_states to txt_ids.

    Args:
        block: Takes a block's parameters, tokens of image and text, silu of what steers, and the rotary table; returns tokens.
        single_block: The same of a block with one stream.
    """
    image_BSD, text_BTD, active_BD, table = embed(state, arrays, config)
    for own in states.parts(state, "transformer_blocks", config.num_layers):
        image_BSD, text_BTD = block(own, image_BSD, text_BTD, active_BD, table)
    joint_BJD = torch.cat([text_BTD, image_BSD], dim=1)
    for own in states.parts(state, "single_transformer_blocks", config.num_single_layers):
        joint_BJD = single_block(own, joint_BJD, active_BD, table)
    scale_BD, shift_BD = steering(state, "norm_out", active_BD)
    image_BSD = layer_norm_modulate(joint_BJD[:, text_BTD.shape[1] :], shift_BD, scale_BD, eps=NORM_EPS)
    return linear(state, "proj_out", image_BSD)


def block_of_branches(
    state: State,
    image_BSD: torch.Tensor,
    text_BTD: torch.Tensor,
    active_BD: torch.Tensor,
    table: Table,
    joint_attention: Callable[..., Sequence[torch.Tensor]],
    feed_forwards: Callable[..., Sequence[torch.Tensor]],
) -> Streams:
    """Apply a block with two streams whose branches are given, each as a function of the parameters and both streams' tokens.

    Attention takes the rotary table too.
    """
    tokens, parts = (image_BSD, text_BTD), [steering(state, name, active_BD) for name in ("norm1", "norm1_context")]
    modulated = (layer_norm_modulate(each, *own[:2], eps=NORM_EPS) for each, own in zip(tokens, parts, strict=True))
    branches = joint_attention(state, *modulated, table)
    (image_BSD, image_modulated_BSD), (text_BTD, text_modulated_BTD) = (
        gated_residual_layer_norm_modulate(each, branch, *own[2:5], eps=NORM_EPS)
        for each, branch, own in zip(tokens, branches, parts, strict=True)
    )
    image_branch_BSD, text_branch_BTD = feed_forwards(state, image_modulated_BSD, text_modulated_BTD)
    image_gate_BD, text_gate_BD = (own[5] for own in parts)
    return (
        gated_residual(image_BSD, image_branch_BSD, image_gate_BD),
        gated_residual(text_BTD, text_branch_BTD, text_gate_BD),
    )


def single_block_of_branch(
    state: State, joint_BJD: torch.Tensor, active_BD: torch.Tensor, table: Table, single_branch: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Apply a block with one stream whose branch is given, as a function of its parameters, its tokens and the rotary table."""
    shift_BD, scale_BD, gate_BD = steering(state, "norm", active_BD)
    modulated_BJD = layer_norm_modulate(joint_BJD, shift_BD, scale_BD, eps=NORM_EPS)
    return gated_residual(joint_BJD, single_branch(state, modulated_BJD, table), gate_BD)


def embed(state: State, arrays: Arrays, config: FluxConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Table]:
    """Return tokens of image and text, [B, S, D] and [B, T, D], silu of what steers the blocks, [B, D], and the rotary table.

    Waves of times and angles are computed in float32 at least, the angles of guidances reach some thousands.
    """
    hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids = arrays
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
    state: State,
    image_BSD: torch.Tensor,
    text_BTD: torch.Tensor,
    table: Table,
    heads: MakesHeads,
    attention: Attention = functional.scaled_dot_product_attention,
) -> Streams:
    """Return the attention branches of image and text, [B, S, D] and [B, T, D]."""
    image_attended_BSD, text_attended_BTD = attended_streams(state, image_BSD, text_BTD, table, heads, attention)
    image_branch_BSD = linear(state, "attn.to_out.0", image_attended_BSD)
    return image_branch_BSD, linear(state, "attn.to_add_out", text_attended_BTD)


def attended_streams(
    state: State,
    image_BSD: torch.Tensor,
    text_BTD: torch.Tensor,
    table: Table,
    heads: MakesHeads,
    attention: Attention = functional.scaled_dot_product_attention,
) -> Streams:
    """Return what the heads of image and text attend to, side by side: [B, S, A * F] and [B, T, A * F]."""
    num_text_tokens = text_BTD.shape[1]
    cos_JR, sin_JR = table
    of_text = heads(state, TEXT_HEADS, text_BTD, (cos_JR[:num_text_tokens], sin_JR[:num_text_tokens]))
    of_image = heads(state, HEADS, image_BSD, (cos_JR[num_text_tokens:], sin_JR[num_text_tokens:]))
    query, key, value = (torch.cat(both, dim=2) for both in zip(of_text, of_image, strict=True))
    attended_BJD = join_heads(attention(query, key, value))
    return attended_BJD[:, num_text_tokens:], attended_BJD[:, :num_text_tokens]


def heads(state: State, names: tuple[str, ...], modulated_BSD: torch.Tensor, table: Table, num_heads: int) -> Heads:
    """Return queries, keys and values, [B, A, S, F] each, queries and keys normalized and turned in float32."""
    query, key, value = projected_heads(state, names, modulated_BSD, num_heads)
    wide_query, wide_key = at_least_float32(query), at_least_float32(key)
    query_weight, key_weight = (at_least_float32(state[f"{norm}.weight"]) for norm in names[3:])
    query, key = qk_norm_rotary(wide_query, wide_key, query_weight, key_weight, *table, eps=NORM_EPS, pairs="interleaved")
    return query.to(value.dtype), key.to(value.dtype), value


def projected_heads(state: State, names: tuple[str, ...], modulated_BSD: torch.Tensor, num_heads: int) -> list[torch.Tensor]:
    """Return queries, keys and values as their products are, [B, A, S, F] each."""
    return [split_heads(linear(state, name, modulated_BSD), num_heads) for name in names[:3]]


def feed_forwards(state: State, image_BSD: torch.Tensor, text_BTD: torch.Tensor) -> Streams:
    """Return the branches of the feed-forward networks of image and text, [B, S, D] and [B, T, D]."""
    return feed_forward(state, "ff", image_BSD), feed_forward(state, "ff_context", text_BTD)


def feed_forward(state: State, name: str, modulated_BSD: torch.Tensor) -> torch.Tensor:
    """Return the branch of the feed-forward network of that name, [B, S, D]."""
    return linear(state, f"{name}.net.2", hidden_layer(state, f"{name}.net.0.proj", modulated_BSD))


def hidden_layer(state: State, name: str, modulated_BSD: torch.Tensor) -> torch.Tensor:
    """Return the hidden layer of a feed-forward network, whose first linear layer has that name, [B, S, I]."""
    return functional.gelu(linear(state, name, modulated_BSD), approximate="tanh")


def single_branch(
    state: State,
    modulated_BJD: torch.Tensor,
    table: Table,
    heads: MakesHeads,
    attention: Attention = functional.scaled_dot_product_attention,
) -> torch.Tensor:
    """Return what a block with one stream adds: attention and feed-forward network together, [B, J, D]."""
    return linear(state, "proj_out", single_inner(state, modulated_BJD, table, heads, attention))


def single_inner(
    state: State,
    modulated_BJD: torch.Tensor,
    table: Table,
    heads: MakesHeads,
    attention: Attention = functional.scaled_dot_product_attention,
) -> torch.Tensor:
    """Return what the heads of a block with one stream attend to, and its hidden layer, side by side: [B, J, A * F + I]."""
    attended_BJD = join_heads(attention(*heads(state, HEADS, modulated_BJD, table)))
    return torch.cat([attended_BJD, hidden_layer(state, "proj_mlp", modulated_BJD)], dim=-1)
