"""Flux in JAX over the ranks of a mesh: the parameters lie there as partition rules say, the rest is left to XLA.

Each rank has some heads of each attention and some features of each hidden layer; all tokens are on every rank. XLA adds the
ranks' products up once for each branch of each stream, forward and backward, and moves nothing else: what a block with one stream
multiplies last, attention's features and the hidden layer's, is five blocks of one width beside each other
(`partition_rules.FLUX`), of each of which a rank has its part, and not one long axis, of which it would have a piece.

    placed = sharded_models.shard_state(state, partition_rules.FLUX, mesh)       once
    out = flux_of_placed(placed, *arrays, config=config, mesh=mesh)

Shapes: as in `reference.jax.flux`; N blocks of the hidden layer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax.sharded_models import run_on_ranks
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.jax import flux as reference
from gaugeblock.reference.jax import layers, modules
from gaugeblock.reference.jax.attention import attention, join_heads
from gaugeblock.reference.jax.flux import HEADS, NORM_EPS, THETA, State
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.rotary import rotary_table


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
    mesh: Mesh,
) -> jax.Array:
    """As `gaugeblock.reference.jax.flux.flux`, over the ranks of a mesh; arrays are global.

    Args: as of it; a state that does not lie on the mesh is brought there. And
        mesh: One axis, "ranks", whose size divides num_attention_heads.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide the size above.

    Source: gaugeblock.reference.jax.flux; Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """
    arrays = hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids
    validation.flux(state, *arrays, config, reference.state_shapes(config))
    return run_on_ranks(flux_of_placed, partition_rules.FLUX, state, *arrays, config=config, mesh=mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def flux_of_placed(
    placed: State,
    hidden_states: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled_projections: jax.Array,
    timesteps: jax.Array,
    guidance: jax.Array,
    img_ids: jax.Array,
    txt_ids: jax.Array,
    *,
    config: FluxConfig,
    mesh: Mesh,
) -> jax.Array:
    """Do what `flux` does with a state as `shard_state` places it by `partition_rules.FLUX`; nothing is checked."""
    state = {name: at_least_float32(parameter) for name, parameter in placed.items()}
    image_BSD = modules.linear(state, "x_embedder", at_least_float32(hidden_states))
    text_BTD = modules.linear(state, "context_embedder", at_least_float32(encoder_hidden_states))
    pooled_projections = at_least_float32(pooled_projections)
    conditioning_BD = reference.embed_conditions(state, pooled_projections, timesteps, guidance, config=config)
    ids = jnp.concatenate([txt_ids, img_ids])
    table = rotary_table(ids, features=config.axes_dims_rope, theta=THETA, dtype=image_BSD.dtype)
    for index in range(config.num_layers):
        part = states.part(state, f"transformer_blocks.{index}")
        image_BSD, text_BTD = reference.block(part, image_BSD, text_BTD, conditioning_BD, *table, config=config)
    joint_BJD = jnp.concatenate([text_BTD, image_BSD], axis=1)
    for index in range(config.num_single_layers):
        part = states.part(state, f"single_transformer_blocks.{index}")
        joint_BJD = _single_block(part, joint_BJD, conditioning_BD, table, config)
    image_BSD = joint_BJD[:, text_BTD.shape[1] :]
    return reference.final_layer(state, image_BSD, conditioning_BD).astype(hidden_states.dtype)


def _single_block(
    state: State, hidden_BJD: jax.Array, conditioning_BD: jax.Array, table: tuple[jax.Array, jax.Array], config: FluxConfig
) -> jax.Array:
    """Apply a block with one stream, whose `proj_mlp` and `proj_out` are in blocks: [N, D, D] and [D, 1 + N, D]."""
    modulation_BD = modules.linear(state, "norm.linear", jax.nn.silu(conditioning_BD))
    shift_BD, scale_BD, gate_BD = jnp.split(modulation_BD, 3, axis=-1)
    modulated_BJD = layers.layer_norm_modulate(hidden_BJD, shift_BD, scale_BD, eps=NORM_EPS)
    attended_BJD = join_heads(attention(*reference.heads(state, HEADS, modulated_BJD, *table, config=config)))
    products_BJND = jnp.einsum("bjd,ned->bjne", modulated_BJD, state["proj_mlp.weight"], precision="highest")
    inner_BJND = layers.gelu(products_BJND + state["proj_mlp.bias"])
    both_BJND = jnp.concatenate([attended_BJD[:, :, None], inner_BJND], axis=2)
    branch_BJD = jnp.einsum("bjnd,end->bje", both_BJND, state["proj_out.weight"], precision="highest")
    return layers.gated_residual(hidden_BJD, branch_BJD + state["proj_out.bias"], gate_BD)
