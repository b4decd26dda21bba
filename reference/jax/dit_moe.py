"""DiT-MoE: a DiT whose feed-forward networks are MoE layers, each with a loss that keeps the load of its experts even.

Parameters are a flat dict with the names of the public code, but for the experts, which are stacked as in `dit_moe_layers`.
Shapes: as in `layers`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import moe_states, states, validation
from gaugeblock.reference.configs import DiTMoEModelConfig
from gaugeblock.reference.expert_layouts import with_stacked_experts
from gaugeblock.reference.jax import dit, dit_moe_layers, layers, modules
from gaugeblock.reference.jax.attention import attention, join_heads, split_heads
from gaugeblock.reference.jax.dit import NORM_EPS
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.recomputation import recomputable

# what the public code calls the modules of an attention that computes with a flash kernel
FLASH_ATTENTION = {"attn.Wqkv": "attn.qkv", "attn.out_proj": "attn.proj"}


def dit_moe(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    timesteps: jax.Array,
    class_labels: jax.Array,
    *,
    config: DiTMoEModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.dit_moe.dit_moe`."""
    validation.dit(state, latents, timesteps, class_labels, config, state_shapes(config))
    validation.class_labels_in_range(class_labels, config.num_classes)
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    latents_BCHW = at_least_float32(latents)

    hidden_BSD = dit.embed_patches(state, latents_BCHW, config=config)
    times_B = timesteps.astype(latents_BCHW.dtype) * config.timestep_scale
    conditioning_BD = dit.embed_conditions(state, times_B, class_labels, config=config)
    auxiliary_loss = jnp.zeros((), latents_BCHW.dtype)
    for index in range(config.depth):
        hidden_BSD, loss = block(dit.block_state(state, index), hidden_BSD, conditioning_BD, config=config)
        auxiliary_loss = auxiliary_loss + loss
    out_BCHW = dit.final_layer(state, hidden_BSD, conditioning_BD, config=config)
    return out_BCHW.astype(latents.dtype), auxiliary_loss


@recomputable
def block(
    state: Mapping[str, jax.Array], hidden_states: jax.Array, conditioning: jax.Array, *, config: DiTMoEModelConfig
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.dit_moe.block`."""
    validation.dit_block(state, hidden_states, conditioning, block_shapes(config))
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    hidden_BSD, active_BD = at_least_float32(hidden_states), jax.nn.silu(at_least_float32(conditioning))

    modulation_B6D = modules.linear(state, "adaLN_modulation.1", active_BD)
    shift_1_BD, scale_1_BD, gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = jnp.split(modulation_B6D, 6, axis=-1)
    modulated_BSD = layers.layer_norm_modulate(hidden_BSD, shift_1_BD, scale_1_BD, eps=NORM_EPS)
    attended_BSD = self_attention(states.part(state, "attn"), modulated_BSD, config=config)
    hidden_BSD, modulated_BSD = layers.gated_residual_layer_norm_modulate(
        hidden_BSD, attended_BSD, gate_1_BD, shift_2_BD, scale_2_BD, eps=config.norm_eps
    )
    experts_BSD, _, _, loss = dit_moe_layers.dit_moe(modulated_BSD, states.part(state, "moe"), config=config.moe)
    return layers.gated_residual(hidden_BSD, experts_BSD, gate_2_BD).astype(hidden_states.dtype), loss


def self_attention(state: Mapping[str, jax.Array], hidden_states: jax.Array, *, config: DiTMoEModelConfig) -> jax.Array:
    """Let each token [B, S, D] attend to all tokens of its example; with `qk_norm`, queries and keys are normalized first."""
    qkv_BS3D = modules.linear(state, "qkv", hidden_states)
    query_BASF, key_BASF, value_BASF = (split_heads(each, config.num_heads) for each in jnp.split(qkv_BS3D, 3, axis=-1))
    if config.qk_norm:
        query_BASF = modules.layer_norm(state, "q_norm", query_BASF, eps=NORM_EPS)
        key_BASF = modules.layer_norm(state, "k_norm", key_BASF, eps=NORM_EPS)
    return modules.linear(state, "proj", join_heads(attention(query_BASF, key_BASF, value_BASF)))


def state_shapes(config: DiTMoEModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, in the order of the public code."""
    return dit.shapes_around_blocks(block_shapes(config), config=config)


def block_shapes(config: DiTMoEModelConfig) -> dict[str, tuple[int, ...]]:
    """As `gaugeblock.reference.torch.dit_moe.block_shapes`."""
    validation.dit_moe_config(config)
    features = states.norm_shapes(config.hidden_size // config.num_heads)
    attention_shapes = {
        name: shape for name, shape in dit.block_shapes(config).items() if name.startswith(("attn.", "adaLN_modulation."))
    }
    sizes = {
        "num_experts": config.num_experts,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "two_intermediate_sizes": 2 * config.intermediate_size,
        "shared_intermediate_size": config.shared_intermediate_size,
    }
    moe_shapes = {name: tuple(sizes[axis] for axis in axes) for name, axes in moe_states.DIT_MOE.items()}
    norms = states.under("attn.q_norm", features) | states.under("attn.k_norm", features) if config.qk_norm else {}
    return attention_shapes | norms | states.under("moe", moe_shapes)


def load_state(state: Mapping[str, jax.Array], *, config: DiTMoEModelConfig) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.dit_moe.load_state`."""
    state = dict(state)
    if "pos_embed" in state:
        dit.check_position_table(state.pop("pos_embed"), config=config)
    for theirs, ours in FLASH_ATTENTION.items():
        state = {name.replace(f".{theirs}.", f".{ours}."): parameter for name, parameter in state.items()}
    for index in range(config.depth):
        state = with_stacked_experts(state, f"blocks.{index}.moe.experts.", config.num_experts)
    validation.state_entries(state, state_shapes(config))
    return {name: state[name] for name in state_shapes(config)}
