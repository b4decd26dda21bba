"""Flux: a transformer on packed latents and text, first in two streams that attend together, then in one.

Parameters are a flat dict with the names of diffusers' checkpoints.

Shapes: B batch_size, S tokens of the image, T tokens of the text, J tokens of both, J = T + S, C channels, D hidden_size,
I intermediate_size, A num_attention_heads, F features of a head, R = F / 2 pairs of features, Y rows and X columns of patches,
P = 2 height and width of a patch.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import flux_checkpoints, states, validation
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch import layers, modules
from gaugeblock.reference.torch.attention import attention, join_heads, split_heads
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.recomputation import recomputable
from gaugeblock.reference.torch.rotary import qk_norm_rotary, rotary_table

NORM_EPS = 1e-6  # of every LayerNorm, and of the RMSNorms of queries and keys
THETA = 10000.0  # of the rotary embedding
TIME_SCALE = 1000.0  # times and guidances are embedded in thousandths
FREQUENCY_EMBEDDING_SIZE = 256
PATCH_SIZE = 2  # of packed latents

# queries, keys, values and norms of what attends: the image, in a block with one stream everything; and the text
HEADS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.norm_q", "attn.norm_k")
TEXT_HEADS = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.norm_added_q", "attn.norm_added_k")

State = Mapping[str, torch.Tensor]


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

        c = time embedding + guidance embedding + embedding of the pooled text
        image = linear(hidden_states);  text = linear(encoder_hidden_states)
        image, text = block(image, text, c), num_layers times
        joint = single_block(text then image, c), num_single_layers times
        out = linear(layer_norm_modulate(the image's tokens, shift, scale)),  scale, shift = linear(silu(c))

    Args:
        state: The parameters by name, shapes as in `state_shapes`, dtype of hidden_states.
        hidden_states: [batch_size, num_image_tokens, in_channels], floating: latents, as `pack_latents` returns them.
        encoder_hidden_states: [batch_size, num_text_tokens, joint_attention_dim], dtype of hidden_states: T5's of the text.
        pooled_projections: [batch_size, pooled_projection_dim], dtype of hidden_states: CLIP's of the text.
        timesteps: [batch_size], float32 or float64, in [0, 1]; 1 is noise.
        guidance: [batch_size], float32 or float64, usually 3.5; read where the config has `guidance_embeds`.
        img_ids: [num_image_tokens, axes], float32 or float64: the tokens' places, as `image_ids` returns them.
        txt_ids: [num_text_tokens, axes], the same of the text: 0, as `text_ids` returns them.
        config: The model.

    Returns:
        [batch_size, num_image_tokens, out_features], dtype as hidden_states; computed in float32 (float64 for float64
        hidden_states) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape, or ranks, sizes or devices do not fit
            together.

    Source: black-forest-labs/flux model.py; diffusers models/transformers/transformer_flux.py, FluxTransformer2DModel.
    """
    validation.flux(
        state, hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids,
        config, state_shapes(config),
    )  # fmt: skip
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    image_BSD = modules.linear(state, "x_embedder", at_least_float32(hidden_states))
    text_BTD = modules.linear(state, "context_embedder", at_least_float32(encoder_hidden_states))
    conditioning_BD = embed_conditions(state, at_least_float32(pooled_projections), timesteps, guidance, config=config)
    ids = torch.cat([txt_ids, img_ids])
    cos_JR, sin_JR = rotary_table(ids, features=config.axes_dims_rope, theta=THETA, dtype=image_BSD.dtype)

    for index in range(config.num_layers):
        part = states.part(state, f"transformer_blocks.{index}")
        image_BSD, text_BTD = block(part, image_BSD, text_BTD, conditioning_BD, cos_JR, sin_JR, config=config)
    joint_BJD = torch.cat([text_BTD, image_BSD], dim=1)
    for index in range(config.num_single_layers):
        part = states.part(state, f"single_transformer_blocks.{index}")
        joint_BJD = single_block(part, joint_BJD, conditioning_BD, cos_JR, sin_JR, config=config)
    return final_layer(state, joint_BJD[:, text_BTD.shape[1] :], conditioning_BD).to(hidden_states.dtype)


def embed_conditions(
    state: State, pooled_projections: torch.Tensor, timesteps: torch.Tensor, guidance: torch.Tensor, *, config: FluxConfig
) -> torch.Tensor:
    """Embed times [B], guidances [B] and the pooled text [B, pooled_projection_dim] as what steers the blocks, [B, D]."""
    conditioning_BD = embed_time(state, "timestep_embedder", timesteps.to(pooled_projections.dtype))
    if config.guidance_embeds:
        conditioning_BD = conditioning_BD + embed_time(state, "guidance_embedder", guidance.to(pooled_projections.dtype))
    names = "time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2"
    return conditioning_BD + modules.two_linears(state, names, pooled_projections)


def embed_time(state: State, name: str, times: torch.Tensor) -> torch.Tensor:
    """Embed times [B], or guidances, by waves of a thousandth and two linear layers, [B, D]."""
    waves_BF = layers.timestep_embedding(TIME_SCALE * times, embedding_size=FREQUENCY_EMBEDDING_SIZE, frequency_shift=0)
    return modules.two_linears(state, (f"time_text_embed.{name}.linear_1", f"time_text_embed.{name}.linear_2"), waves_BF)


@recomputable
def block(
    state: State,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    conditioning: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    config: FluxConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply one block with two streams, each with its own parameters: joint attention, then a feed-forward network.

        of either stream: shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = sixths of linear(silu(c))
        q, k, v = heads(layer_norm_modulate(x, shift_1, scale_1)), those of the text before those of the image
        x = x + gate_1 * linear(the stream's tokens of attention(q, k, v))
        x = x + gate_2 * feed_forward(layer_norm_modulate(x, shift_2, scale_2))

    Args:
        state: The block's parameters by their own names (`attn.to_q.weight`), float32 or float64, as all that follows.
        hidden_states: [batch_size, num_image_tokens, hidden_size].
        encoder_hidden_states: [batch_size, num_text_tokens, hidden_size].
        conditioning: [batch_size, hidden_size].
        cos, sin: [num_text_tokens + num_image_tokens, attention_head_dim / 2], as `rotary_table` returns them.
        config: The model.

    Returns:
        hidden_states, encoder_hidden_states, of the same shapes.

    Source: black-forest-labs/flux modules/layers.py, DoubleStreamBlock; the joint attention of Esser et al. 2024
    (arXiv:2403.03206), figure 2.
    """
    num_text_tokens = encoder_hidden_states.shape[1]
    active_BD = torch.nn.functional.silu(conditioning)
    image_parts = modules.linear(state, "norm1.linear", active_BD).chunk(6, dim=-1)
    text_parts = modules.linear(state, "norm1_context.linear", active_BD).chunk(6, dim=-1)

    modulated_BSD = layers.layer_norm_modulate(hidden_states, *image_parts[:2], eps=NORM_EPS)
    modulated_BTD = layers.layer_norm_modulate(encoder_hidden_states, *text_parts[:2], eps=NORM_EPS)
    image_heads = heads(state, HEADS, modulated_BSD, cos[num_text_tokens:], sin[num_text_tokens:], config=config)
    text_heads = heads(state, TEXT_HEADS, modulated_BTD, cos[:num_text_tokens], sin[:num_text_tokens], config=config)
    query_BAJF, key_BAJF, value_BAJF = (torch.cat(both, dim=2) for both in zip(text_heads, image_heads, strict=True))
    attended_BJD = join_heads(attention(query_BAJF, key_BAJF, value_BAJF))

    image_branch_BSD = modules.linear(state, "attn.to_out.0", attended_BJD[:, num_text_tokens:])
    text_branch_BTD = modules.linear(state, "attn.to_add_out", attended_BJD[:, :num_text_tokens])
    return (
        end_block(state, "ff", hidden_states, image_branch_BSD, *image_parts[2:]),
        end_block(state, "ff_context", encoder_hidden_states, text_branch_BTD, *text_parts[2:]),
    )


def heads(
    state: State, names: tuple[str, ...], modulated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, config: FluxConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values [B, A, S, F] of tokens [B, S, D], queries and keys normalized and turned."""
    *projections, norm_q, norm_k = names
    query_BASF, key_BASF, value_BASF = (
        split_heads(modules.linear(state, name, modulated), config.num_attention_heads) for name in projections
    )
    weights = state[f"{norm_q}.weight"], state[f"{norm_k}.weight"]
    query_BASF, key_BASF = qk_norm_rotary(query_BASF, key_BASF, *weights, cos, sin, eps=NORM_EPS, pairs="interleaved")
    return query_BASF, key_BASF, value_BASF


def end_block(
    state: State,
    name: str,
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate_1: torch.Tensor,
    shift_2: torch.Tensor,
    scale_2: torch.Tensor,
    gate_2: torch.Tensor,
) -> torch.Tensor:
    """Add the attention's branch to a stream [B, S, D], then that of the feed-forward network of the given name."""
    hidden_BSD, modulated_BSD = layers.gated_residual_layer_norm_modulate(
        residual, branch, gate_1, shift_2, scale_2, eps=NORM_EPS
    )
    inner_BSI = layers.gelu(modules.linear(state, f"{name}.net.0.proj", modulated_BSD))
    return layers.gated_residual(hidden_BSD, modules.linear(state, f"{name}.net.2", inner_BSI), gate_2)


@recomputable
def single_block(
    state: State,
    hidden_states: torch.Tensor,
    conditioning: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    config: FluxConfig,
) -> torch.Tensor:
    """Apply one block with one stream: attention and a feed-forward network beside each other.

        shift, scale, gate = thirds of linear(silu(c))
        y = layer_norm_modulate(x, shift, scale)
        x = x + gate * linear(attention(heads(y)), then gelu(linear(y)))

    Args:
        hidden_states: [batch_size, num_text_tokens + num_image_tokens, hidden_size]. All others: as of `block`.

    Returns:
        The same shape.

    Source: black-forest-labs/flux modules/layers.py, SingleStreamBlock; the parallel layers of Dehghani et al. 2023
    (arXiv:2302.05442), section 2.
    """
    active_BD = torch.nn.functional.silu(conditioning)
    shift_BD, scale_BD, gate_BD = modules.linear(state, "norm.linear", active_BD).chunk(3, dim=-1)
    modulated_BJD = layers.layer_norm_modulate(hidden_states, shift_BD, scale_BD, eps=NORM_EPS)
    attended_BJD = join_heads(attention(*heads(state, HEADS, modulated_BJD, cos, sin, config=config)))
    inner_BJI = layers.gelu(modules.linear(state, "proj_mlp", modulated_BJD))
    branch_BJD = modules.linear(state, "proj_out", torch.cat([attended_BJD, inner_BJI], dim=-1))
    return layers.gated_residual(hidden_states, branch_BJD, gate_BD)


def final_layer(state: State, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
    """Turn the image's tokens [B, S, D] into the result [B, S, out_features]; here the scale comes before the shift."""
    active_BD = torch.nn.functional.silu(conditioning)
    scale_BD, shift_BD = modules.linear(state, "norm_out.linear", active_BD).chunk(2, dim=-1)
    return modules.linear(state, "proj_out", layers.layer_norm_modulate(hidden_states, shift_BD, scale_BD, eps=NORM_EPS))


def state_shapes(config: FluxConfig) -> states.Shapes:
    """Return the shape of every parameter by its name."""
    hidden_size = config.hidden_size
    embedders = {"timestep_embedder": FREQUENCY_EMBEDDING_SIZE}
    embedders |= {"guidance_embedder": FREQUENCY_EMBEDDING_SIZE} if config.guidance_embeds else {}
    embedders |= {"text_embedder": config.pooled_projection_dim}
    shapes = {}
    for name, in_features in embedders.items():
        shapes[f"time_text_embed.{name}.linear_1"] = states.linear_shapes(hidden_size, in_features)
        shapes[f"time_text_embed.{name}.linear_2"] = states.linear_shapes(hidden_size, hidden_size)
    shapes["context_embedder"] = states.linear_shapes(hidden_size, config.joint_attention_dim)
    shapes["x_embedder"] = states.linear_shapes(hidden_size, config.in_channels)
    shapes |= {f"transformer_blocks.{index}": block_shapes(config) for index in range(config.num_layers)}
    shapes |= {f"single_transformer_blocks.{index}": single_block_shapes(config) for index in range(config.num_single_layers)}
    shapes["norm_out.linear"] = states.linear_shapes(2 * hidden_size, hidden_size)
    shapes["proj_out"] = states.linear_shapes(config.out_features, hidden_size)
    return states.of_modules(shapes)


def block_shapes(config: FluxConfig) -> states.Shapes:
    """Return the shape of every parameter of one block with two streams by its own name."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    shapes = {}
    for norm, feed_forward in (("norm1", "ff"), ("norm1_context", "ff_context")):
        shapes[f"{norm}.linear"] = states.linear_shapes(6 * hidden_size, hidden_size)
        shapes[f"{feed_forward}.net.0.proj"] = states.linear_shapes(intermediate_size, hidden_size)
        shapes[f"{feed_forward}.net.2"] = states.linear_shapes(hidden_size, intermediate_size)
    for out in ("attn.to_out.0", "attn.to_add_out"):
        shapes[out] = states.linear_shapes(hidden_size, hidden_size)
    return states.of_modules(shapes) | heads_shapes(HEADS, config) | heads_shapes(TEXT_HEADS, config)


def single_block_shapes(config: FluxConfig) -> states.Shapes:
    """Return the shape of every parameter of one block with one stream by its own name."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    shapes = {
        "norm.linear": states.linear_shapes(3 * hidden_size, hidden_size),
        "proj_mlp": states.linear_shapes(intermediate_size, hidden_size),
        "proj_out": states.linear_shapes(hidden_size, hidden_size + intermediate_size),
    }
    return states.of_modules(shapes) | heads_shapes(HEADS, config)


def heads_shapes(names: tuple[str, ...], config: FluxConfig) -> states.Shapes:
    """Return the shape of every parameter that `heads` reads."""
    *projections, norm_q, norm_k = names
    linear = states.linear_shapes(config.hidden_size, config.hidden_size)
    shapes = states.of_modules(dict.fromkeys(projections, linear))
    return shapes | dict.fromkeys((f"{norm_q}.weight", f"{norm_k}.weight"), (config.attention_head_dim,))


def load_state(state: State, *, config: FluxConfig) -> dict[str, torch.Tensor]:
    """Return a checkpoint of diffusers or of black-forest-labs as `flux` takes it, by diffusers' names.

    Parameters keep their dtype. Of the original, queries, keys and values (and a feed-forward network's first layer) are rows of
    one entry, and the final layer's shift comes before its scale.

    Args:
        state: Floating arrays by name, as in diffusers' FluxTransformer2DModel (`transformer_blocks.0.attn.to_q.weight`) or
            as in black-forest-labs/flux (`double_blocks.0.img_attn.qkv.weight`).
        config: The model.

    Raises:
        TypeError: An entry is not a floating array.
        ValueError: An entry is missing, unexpected or of another shape.

    Source: black-forest-labs/flux model.py; diffusers scripts/convert_flux_to_diffusers.py.
    """
    shapes = state_shapes(config)
    if not any(name.startswith("double_blocks.") for name in state):
        validation.state_entries(state, shapes)
        return {name: state[name] for name in shapes}
    validation.state_entries(state, flux_checkpoints.original_shapes(shapes, config))
    rows = flux_checkpoints.original_rows(shapes, config)
    return {name: torch.cat([state[entry][first:end] for entry, first, end in rows[name]]) for name in shapes}


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Cut latents into patches of 2 by 2, one token each, row by row; inside a token: channel, row, column.

    Args:
        latents: [batch_size, channels, height, width], floating, of even height and width.

    Returns:
        [batch_size, height / 2 * width / 2, 4 * channels], dtype of latents.

    Raises:
        TypeError: latents is not a floating array.
        ValueError: latents is not of rank 4, or its height or width is odd.

    Source: black-forest-labs/flux sampling.py, prepare; diffusers pipelines/flux/pipeline_flux.py.
    """
    validation.pack_latents(latents)
    return layers.patchify(latents, patch_size=PATCH_SIZE)


def unpack_latents(tokens: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """Put tokens together to latents again, the inverse of `pack_latents`.

    Args:
        tokens: [batch_size, height / 2 * width / 2, 4 * channels], floating.
        height, width: Of the latents; even.

    Returns:
        [batch_size, channels, height, width], dtype of tokens.

    Raises:
        TypeError: tokens is not a floating array, or a size is no integer.
        ValueError: Rank or sizes do not fit together.

    Source: as of `pack_latents`.
    """
    validation.unpack_latents(tokens, height, width)
    batch_size, _, features = tokens.shape
    rows, columns, channels = height // PATCH_SIZE, width // PATCH_SIZE, features // PATCH_SIZE**2
    tiles_BYXCPP = tokens.reshape(batch_size, rows, columns, channels, PATCH_SIZE, PATCH_SIZE)
    tiles_BCYPXP = tiles_BYXCPP.permute(0, 3, 1, 4, 2, 5)
    return tiles_BCYPXP.reshape(batch_size, channels, height, width)


def image_ids(latents: torch.Tensor) -> torch.Tensor:
    """Return the places of the tokens of `pack_latents(latents)`: [num_image_tokens, 3] of 0, row, column, float32.

    Raises: as `pack_latents`.
    """
    validation.pack_latents(latents)
    row_Y, column_X = (torch.arange(size // PATCH_SIZE, dtype=torch.float32, device=latents.device) for size in latents.shape[2:])
    row_S, column_S = row_Y.repeat_interleave(len(column_X)), column_X.repeat(len(row_Y))
    return torch.stack([torch.zeros_like(row_S), row_S, column_S], dim=-1)


def text_ids(encoder_hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the places of the text's tokens [B, T, joint_attention_dim], all 0: [num_text_tokens, 3], float32."""
    return torch.zeros(encoder_hidden_states.shape[1], 3, device=encoder_hidden_states.device)
