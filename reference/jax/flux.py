"""Flux: a transformer on packed latents and text, first in two streams that attend together, then in one.

Parameters are a flat dict with the names of diffusers' checkpoints.

Shapes: B batch_size, S tokens of the image, T tokens of the text, J tokens of both, J = T + S, C channels, D hidden_size,
I intermediate_size, A num_attention_heads, F features of a head, R = F / 2 pairs of features, Y rows and X columns of patches,
P = 2 height and width of a patch.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import flux_checkpoints, states, validation
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.jax import layers, modules
from gaugeblock.reference.jax.attention import attention, join_heads, split_heads
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.recomputation import recomputable
from gaugeblock.reference.jax.rotary import qk_norm_rotary, rotary_table

NORM_EPS = 1e-6  # of every LayerNorm, and of the RMSNorms of queries and keys
THETA = 10000.0  # of the rotary embedding
TIME_SCALE = 1000.0  # times and guidances are embedded in thousandths
FREQUENCY_EMBEDDING_SIZE = 256
PATCH_SIZE = 2  # of packed latents

# queries, keys, values and norms of what attends: the image, in a block with one stream everything; and the text
HEADS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.norm_q", "attn.norm_k")
TEXT_HEADS = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.norm_added_q", "attn.norm_added_k")

State = Mapping[str, jax.Array]


def flux(
    state: State,
    hidden_states: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled_projections: jax.Array,
    timesteps: jax.Array,
    guidance: jax.Array,
    img_ids: jax.Array,
    txt_ids: jax.Array,
    *,
    config: FluxConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.flux`."""
    validation.flux(
        state, hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids,
        config, state_shapes(config),
    )  # fmt: skip
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    image_BSD = modules.linear(state, "x_embedder", at_least_float32(hidden_states))
    text_BTD = modules.linear(state, "context_embedder", at_least_float32(encoder_hidden_states))
    conditioning_BD = embed_conditions(state, at_least_float32(pooled_projections), timesteps, guidance, config=config)
    ids = jnp.concatenate([txt_ids, img_ids])
    cos_JR, sin_JR = rotary_table(ids, features=config.axes_dims_rope, theta=THETA, dtype=image_BSD.dtype)

    for index in range(config.num_layers):
        part = states.part(state, f"transformer_blocks.{index}")
        image_BSD, text_BTD = block(part, image_BSD, text_BTD, conditioning_BD, cos_JR, sin_JR, config=config)
    joint_BJD = jnp.concatenate([text_BTD, image_BSD], axis=1)
    for index in range(config.num_single_layers):
        part = states.part(state, f"single_transformer_blocks.{index}")
        joint_BJD = single_block(part, joint_BJD, conditioning_BD, cos_JR, sin_JR, config=config)
    return final_layer(state, joint_BJD[:, text_BTD.shape[1] :], conditioning_BD).astype(hidden_states.dtype)


def embed_conditions(
    state: State, pooled_projections: jax.Array, timesteps: jax.Array, guidance: jax.Array, *, config: FluxConfig
) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.embed_conditions`."""
    conditioning_BD = embed_time(state, "timestep_embedder", timesteps.astype(pooled_projections.dtype))
    if config.guidance_embeds:
        conditioning_BD = conditioning_BD + embed_time(state, "guidance_embedder", guidance.astype(pooled_projections.dtype))
    names = "time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2"
    return conditioning_BD + modules.two_linears(state, names, pooled_projections)


def embed_time(state: State, name: str, times: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.embed_time`."""
    waves_BF = layers.timestep_embedding(TIME_SCALE * times, embedding_size=FREQUENCY_EMBEDDING_SIZE, frequency_shift=0)
    return modules.two_linears(state, (f"time_text_embed.{name}.linear_1", f"time_text_embed.{name}.linear_2"), waves_BF)


@recomputable
def block(
    state: State,
    hidden_states: jax.Array,
    encoder_hidden_states: jax.Array,
    conditioning: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    config: FluxConfig,
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.flux.block`."""
    num_text_tokens = encoder_hidden_states.shape[1]
    active_BD = jax.nn.silu(conditioning)
    image_parts = jnp.split(modules.linear(state, "norm1.linear", active_BD), 6, axis=-1)
    text_parts = jnp.split(modules.linear(state, "norm1_context.linear", active_BD), 6, axis=-1)

    modulated_BSD = layers.layer_norm_modulate(hidden_states, *image_parts[:2], eps=NORM_EPS)
    modulated_BTD = layers.layer_norm_modulate(encoder_hidden_states, *text_parts[:2], eps=NORM_EPS)
    image_heads = heads(state, HEADS, modulated_BSD, cos[num_text_tokens:], sin[num_text_tokens:], config=config)
    text_heads = heads(state, TEXT_HEADS, modulated_BTD, cos[:num_text_tokens], sin[:num_text_tokens], config=config)
    query_BAJF, key_BAJF, value_BAJF = (jnp.concatenate(both, axis=2) for both in zip(text_heads, image_heads, strict=True))
    attended_BJD = join_heads(attention(query_BAJF, key_BAJF, value_BAJF))

    image_branch_BSD = modules.linear(state, "attn.to_out.0", attended_BJD[:, num_text_tokens:])
    text_branch_BTD = modules.linear(state, "attn.to_add_out", attended_BJD[:, :num_text_tokens])
    return (
        end_block(state, "ff", hidden_states, image_branch_BSD, *image_parts[2:]),
        end_block(state, "ff_context", encoder_hidden_states, text_branch_BTD, *text_parts[2:]),
    )


def heads(
    state: State, names: tuple[str, ...], modulated: jax.Array, cos: jax.Array, sin: jax.Array, *, config: FluxConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.flux.heads`."""
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
    residual: jax.Array,
    branch: jax.Array,
    gate_1: jax.Array,
    shift_2: jax.Array,
    scale_2: jax.Array,
    gate_2: jax.Array,
) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.end_block`."""
    hidden_BSD, modulated_BSD = layers.gated_residual_layer_norm_modulate(
        residual, branch, gate_1, shift_2, scale_2, eps=NORM_EPS
    )
    inner_BSI = layers.gelu(modules.linear(state, f"{name}.net.0.proj", modulated_BSD))
    return layers.gated_residual(hidden_BSD, modules.linear(state, f"{name}.net.2", inner_BSI), gate_2)


@recomputable
def single_block(
    state: State, hidden_states: jax.Array, conditioning: jax.Array, cos: jax.Array, sin: jax.Array, *, config: FluxConfig
) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.single_block`."""
    active_BD = jax.nn.silu(conditioning)
    shift_BD, scale_BD, gate_BD = jnp.split(modules.linear(state, "norm.linear", active_BD), 3, axis=-1)
    modulated_BJD = layers.layer_norm_modulate(hidden_states, shift_BD, scale_BD, eps=NORM_EPS)
    attended_BJD = join_heads(attention(*heads(state, HEADS, modulated_BJD, cos, sin, config=config)))
    inner_BJI = layers.gelu(modules.linear(state, "proj_mlp", modulated_BJD))
    branch_BJD = modules.linear(state, "proj_out", jnp.concatenate([attended_BJD, inner_BJI], axis=-1))
    return layers.gated_residual(hidden_states, branch_BJD, gate_BD)


def final_layer(state: State, hidden_states: jax.Array, conditioning: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.final_layer`."""
    active_BD = jax.nn.silu(conditioning)
    scale_BD, shift_BD = jnp.split(modules.linear(state, "norm_out.linear", active_BD), 2, axis=-1)
    return modules.linear(state, "proj_out", layers.layer_norm_modulate(hidden_states, shift_BD, scale_BD, eps=NORM_EPS))


def state_shapes(config: FluxConfig) -> states.Shapes:
    """As `gaugeblock.reference.torch.flux.state_shapes`."""
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


def load_state(state: State, *, config: FluxConfig) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.flux.load_state`."""
    shapes = state_shapes(config)
    if not any(name.startswith("double_blocks.") for name in state):
        validation.state_entries(state, shapes)
        return {name: state[name] for name in shapes}
    validation.state_entries(state, flux_checkpoints.original_shapes(shapes, config))
    rows = flux_checkpoints.original_rows(shapes, config)
    return {name: jnp.concatenate([state[entry][first:end] for entry, first, end in rows[name]]) for name in shapes}


def pack_latents(latents: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.pack_latents`."""
    validation.pack_latents(latents)
    return layers.patchify(latents, patch_size=PATCH_SIZE)


def unpack_latents(tokens: jax.Array, *, height: int, width: int) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.unpack_latents`."""
    validation.unpack_latents(tokens, height, width)
    batch_size, _, features = tokens.shape
    rows, columns, channels = height // PATCH_SIZE, width // PATCH_SIZE, features // PATCH_SIZE**2
    tiles_BYXCPP = tokens.reshape(batch_size, rows, columns, channels, PATCH_SIZE, PATCH_SIZE)
    tiles_BCYPXP = tiles_BYXCPP.transpose(0, 3, 1, 4, 2, 5)
    return tiles_BCYPXP.reshape(batch_size, channels, height, width)


def image_ids(latents: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.image_ids`."""
    validation.pack_latents(latents)
    row_Y, column_X = (jnp.arange(size // PATCH_SIZE, dtype=jnp.float32) for size in latents.shape[2:])
    row_S, column_S = jnp.repeat(row_Y, len(column_X)), jnp.tile(column_X, len(row_Y))
    return jnp.stack([jnp.zeros_like(row_S), row_S, column_S], axis=-1)


def text_ids(encoder_hidden_states: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.flux.text_ids`."""
    return jnp.zeros((encoder_hidden_states.shape[1], 3), dtype=jnp.float32)
