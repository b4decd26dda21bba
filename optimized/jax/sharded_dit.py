"""DiT and DiT-MoE in JAX over the ranks of a mesh: the parameters lie there as partition rules say, the rest is left to XLA.

Each rank has some heads of each attention, some features of each hidden layer, and of DiT-MoE some of the experts; all tokens are
on every rank. XLA adds the ranks' products up once for each branch, forward and backward, and moves nothing else: the parameters
of queries, keys and values lie there as three matrices, so that a rank's rows are those of its heads.

    placed = sharded_models.shard_state(state, partition_rules.DIT, mesh)       once
    out = dit_of_placed(placed, latents, timesteps, class_labels, config=config, mesh=mesh)

Shapes: as in `reference.jax.layers`; T all tokens, B * S; K top_k.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax import expert_calls
from gaugeblock.optimized.jax.sharded_experts import sum_replicated_tokens
from gaugeblock.optimized.jax.sharded_models import run_on_ranks
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import DiTConfig, DiTMoEConfig, DiTMoEModelConfig
from gaugeblock.reference.jax import dit as reference
from gaugeblock.reference.jax import dit_moe as moe_reference
from gaugeblock.reference.jax import dit_moe_layers, layers, modules
from gaugeblock.reference.jax.attention import attention, join_heads, split_heads
from gaugeblock.reference.jax.dit import NORM_EPS
from gaugeblock.reference.jax.experts import shared_swiglu
from gaugeblock.reference.jax.moe_layers import router_logits, shared_weights
from gaugeblock.reference.jax.precision import at_least_float32

State = Mapping[str, jax.Array]
FeedForward = Callable[[State, jax.Array], tuple[jax.Array, jax.Array]]
"""The second branch of a block: what it gives, and its loss."""


def dit(
    state: State, latents: jax.Array, timesteps: jax.Array, class_labels: jax.Array, *, config: DiTConfig, mesh: Mesh
) -> jax.Array:
    """As `gaugeblock.reference.jax.dit.dit`, over the ranks of a mesh; arrays are global.

    Args: as of it; a state that does not lie on the mesh is brought there. And
        mesh: One axis, "ranks", whose size divides num_heads and intermediate_size.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide the sizes above.

    Source: gaugeblock.reference.jax.dit; Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """
    validation.dit(state, latents, timesteps, class_labels, config, reference.state_shapes(config))
    validation.class_labels_in_range(class_labels, config.num_classes)
    return run_on_ranks(dit_of_placed, partition_rules.DIT, state, latents, timesteps, class_labels, config=config, mesh=mesh)


def dit_moe(
    state: State, latents: jax.Array, timesteps: jax.Array, class_labels: jax.Array, *, config: DiTMoEModelConfig, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.jax.dit_moe.dit_moe`, over the ranks of a mesh; arrays are global.

    Args: as of it; a state that does not lie on the mesh is brought there. And
        mesh: One axis, "ranks", whose size divides num_heads, num_experts and the shared expert's width.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide the sizes above.

    Source: gaugeblock.reference.jax.dit_moe.
    """
    validation.dit(state, latents, timesteps, class_labels, config, moe_reference.state_shapes(config))
    validation.class_labels_in_range(class_labels, config.num_classes)
    return run_on_ranks(
        dit_moe_of_placed, partition_rules.DIT_MOE, state, latents, timesteps, class_labels, config=config, mesh=mesh
    )


@partial(jax.jit, static_argnames=("config", "mesh"))
def dit_of_placed(
    placed: State, latents: jax.Array, timesteps: jax.Array, class_labels: jax.Array, *, config: DiTConfig, mesh: Mesh
) -> jax.Array:
    """Do what `dit` does with a state as `shard_state` places it by `partition_rules.DIT`; nothing is checked."""

    def mlp(block: State, modulated_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        inner = (block[f"mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
        return layers.gelu_mlp(modulated_BSD, *inner), jnp.zeros(())

    return _model(placed, latents, timesteps.astype(at_least_float32(latents).dtype), class_labels, config, mlp)[0]


@partial(jax.jit, static_argnames=("config", "mesh"))
def dit_moe_of_placed(
    placed: State, latents: jax.Array, timesteps: jax.Array, class_labels: jax.Array, *, config: DiTMoEModelConfig, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Do what `dit_moe` does with a state as `shard_state` places it by `partition_rules.DIT_MOE`; nothing is checked."""
    times_B = timesteps.astype(at_least_float32(latents).dtype) * config.timestep_scale
    return _model(placed, latents, times_B, class_labels, config, partial(_moe, config=config.moe, mesh=mesh))


def _model(
    state: State, latents: jax.Array, times_B: jax.Array, class_labels: jax.Array, config: DiTConfig, feed_forward: FeedForward
) -> tuple[jax.Array, jax.Array]:
    """Run a model whose blocks have this second branch; times are such as are embedded."""
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    hidden_BSD = reference.embed_patches(state, at_least_float32(latents), config=config)
    conditioning_BD = reference.embed_conditions(state, times_B, class_labels, config=config)
    total = jnp.zeros((), hidden_BSD.dtype)
    for index in range(config.depth):
        block = reference.block_state(state, index)
        modulation_BD = modules.linear(block, "adaLN_modulation.1", jax.nn.silu(conditioning_BD))
        shift_1_BD, scale_1_BD, gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = jnp.split(modulation_BD, 6, axis=-1)
        modulated_BSD = layers.layer_norm_modulate(hidden_BSD, shift_1_BD, scale_1_BD, eps=NORM_EPS)
        hidden_BSD, modulated_BSD = layers.gated_residual_layer_norm_modulate(
            hidden_BSD, _attention(block, modulated_BSD, config), gate_1_BD, shift_2_BD, scale_2_BD, eps=config.norm_eps
        )
        out_BSD, loss = feed_forward(block, modulated_BSD)
        hidden_BSD, total = layers.gated_residual(hidden_BSD, out_BSD, gate_2_BD), total + loss
    return reference.final_layer(state, hidden_BSD, conditioning_BD, config=config).astype(latents.dtype), total


def _attention(block: State, modulated_BSD: jax.Array, config: DiTConfig) -> jax.Array:
    """Attend with queries, keys and values of three matrices, as `shard_state` has them."""
    qkv_3BSD = jnp.einsum("bsd,ted->tbse", modulated_BSD, block["attn.qkv.weight"], precision="highest")
    qkv_3BSD = qkv_3BSD + block["attn.qkv.bias"][:, None, None]
    query_BASF, key_BASF, value_BASF = (split_heads(each, config.num_heads) for each in qkv_3BSD)
    if "attn.q_norm.weight" in block:
        query_BASF = modules.layer_norm(block, "attn.q_norm", query_BASF, eps=NORM_EPS)
        key_BASF = modules.layer_norm(block, "attn.k_norm", key_BASF, eps=NORM_EPS)
    return modules.linear(block, "attn.proj", join_heads(attention(query_BASF, key_BASF, value_BASF)))


def _moe(block: State, modulated_BSD: jax.Array, *, config: DiTMoEConfig, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Run the MoE layer, each rank its experts on all tokens."""
    moe = states.part(block, "moe")
    batch_size, num_tokens, hidden_size = modulated_BSD.shape
    hidden_TD = modulated_BSD.reshape(batch_size * num_tokens, hidden_size)
    logits_TE = router_logits(hidden_TD, moe["gate.weight"])
    weights_TK, ids_TK = dit_moe_layers.gate(logits_TE, config)
    experts = expert_calls.swiglu(moe["experts.gate_up_proj"], moe["experts.down_proj"])
    out_TD = sum_replicated_tokens(hidden_TD, experts, weights_TK, ids_TK, mesh=mesh)
    out_TD = out_TD + shared_swiglu(hidden_TD, *shared_weights(moe, "shared_experts"))
    logits_BSE, ids_BSK = (each.reshape(batch_size, num_tokens, each.shape[1]) for each in (logits_TE, ids_TK))
    return out_TD.reshape(modulated_BSD.shape), dit_moe_layers.balance_loss(logits_BSE, ids_BSK, config)
