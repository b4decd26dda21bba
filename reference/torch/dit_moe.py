"""DiT-MoE: a DiT whose feed-forward networks are MoE layers, each with a loss that keeps the load of its experts even.

Parameters are a flat dict with the names of the public code, but for the experts, which are stacked as in `dit_moe_layers`.
Shapes: as in `layers`.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import moe_states, states, validation
from gaugeblock.reference.configs import DiTMoEModelConfig
from gaugeblock.reference.expert_layouts import with_stacked_experts
from gaugeblock.reference.torch import dit, dit_moe_layers, layers, modules
from gaugeblock.reference.torch.attention import attention, join_heads, split_heads
from gaugeblock.reference.torch.dit import NORM_EPS
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.recomputation import recomputable

# what the public code calls the modules of an attention that computes with a flash kernel
FLASH_ATTENTION = {"attn.Wqkv": "attn.qkv", "attn.out_proj": "attn.proj"}


def dit_moe(
    state: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    *,
    config: DiTMoEModelConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the velocity or the noise (and with `learn_sigma` the variance) in latents of a class at a time.

        x = patches of the latents, embedded, + position table;  c = time embedding + class embedding
        x, loss = block(x, c), depth times;  auxiliary_loss = sum of the losses
        out = patches put together of linear(layer_norm_modulate(x, shift, scale)),  shift, scale = linear(silu(c))

    The auxiliary loss is to be added to what is differentiated with the factor 1 (`dit_moe_layers.dit_moe`); in inference it is
    left alone.

    Args:
        state: The parameters by name, shapes as in `state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, input_size, input_size], floating.
        timesteps: [batch_size], float32 or float64; for models trained on rectified flow in (0, 1), else in [0, 1000).
        class_labels: [batch_size], integer in 0 .. num_classes; num_classes is the label that was dropped.
        config: The model.

    Returns:
        out: [batch_size, out_channels, input_size, input_size], dtype as latents; computed in float32 (float64 for float64
            latents) and rounded once.
        auxiliary_loss: [], float32 (float64 for float64 latents).

    Raises:
        TypeError: An argument is not an array of the dtype above, or `config` not a DiTMoEModelConfig.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or a label names no class.

    Source: Fei et al. 2024 (arXiv:2407.11633), section 2; feizc/DiT-MoE models.py, class DiT. Its attention in float16, which is
    what its flash kernel takes, is not part of the model.
    """
    validation.dit(state, latents, timesteps, class_labels, config, state_shapes(config))
    validation.class_labels_in_range(class_labels, config.num_classes)
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    latents_BCHW = at_least_float32(latents)

    hidden_BSD = dit.embed_patches(state, latents_BCHW, config=config)
    times_B = timesteps.to(latents_BCHW.dtype) * config.timestep_scale
    conditioning_BD = dit.embed_conditions(state, times_B, class_labels, config=config)
    auxiliary_loss = latents_BCHW.new_zeros(())
    for index in range(config.depth):
        hidden_BSD, loss = block(dit.block_state(state, index), hidden_BSD, conditioning_BD, config=config)
        auxiliary_loss = auxiliary_loss + loss
    out_BCHW = dit.final_layer(state, hidden_BSD, conditioning_BD, config=config)
    return out_BCHW.to(latents.dtype), auxiliary_loss


@recomputable
def block(
    state: Mapping[str, torch.Tensor], hidden_states: torch.Tensor, conditioning: torch.Tensor, *, config: DiTMoEModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply one adaLN-Zero block: attention, then an MoE layer, each modulated before and gated after.

        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = sixths of linear(silu(c))
        x = x + gate_1 * self_attention(layer_norm_modulate(x, shift_1, scale_1))
        x = x + gate_2 * dit_moe(layer_norm_modulate(x, shift_2, scale_2))

    Args:
        state: The block's parameters by their own names (`moe.gate.weight`), as `dit.block_state` returns them.
        hidden_states: [batch_size, num_tokens, hidden_size], floating; state and conditioning have its dtype.
        conditioning: [batch_size, hidden_size].
        config: The model.

    Returns:
        hidden_states_out: [batch_size, num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for
            float64 inputs) and rounded once.
        auxiliary_loss: [], float32 (float64 for float64 inputs), of the layer.

    Raises: as `dit.block`, and
        TypeError: `config` is not a DiTMoEModelConfig.

    Source: Fei et al. 2024 (arXiv:2407.11633), section 2; `DiTBlock` of feizc/DiT-MoE models.py.
    """
    validation.dit_block(state, hidden_states, conditioning, block_shapes(config))
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    hidden_BSD, active_BD = at_least_float32(hidden_states), torch.nn.functional.silu(at_least_float32(conditioning))

    modulation_B6D = modules.linear(state, "adaLN_modulation.1", active_BD)
    shift_1_BD, scale_1_BD, gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = modulation_B6D.chunk(6, dim=-1)
    modulated_BSD = layers.layer_norm_modulate(hidden_BSD, shift_1_BD, scale_1_BD, eps=NORM_EPS)
    attended_BSD = self_attention(states.part(state, "attn"), modulated_BSD, config=config)
    hidden_BSD, modulated_BSD = layers.gated_residual_layer_norm_modulate(
        hidden_BSD, attended_BSD, gate_1_BD, shift_2_BD, scale_2_BD, eps=config.norm_eps
    )
    experts_BSD, _, _, loss = dit_moe_layers.dit_moe(modulated_BSD, states.part(state, "moe"), config=config.moe)
    return layers.gated_residual(hidden_BSD, experts_BSD, gate_2_BD).to(hidden_states.dtype), loss


def self_attention(state: Mapping[str, torch.Tensor], hidden_states: torch.Tensor, *, config: DiTMoEModelConfig) -> torch.Tensor:
    """Let each token [B, S, D] attend to all tokens of its example; with `qk_norm`, queries and keys are normalized first."""
    qkv_BS3D = modules.linear(state, "qkv", hidden_states)
    query_BASF, key_BASF, value_BASF = (split_heads(each, config.num_heads) for each in qkv_BS3D.chunk(3, dim=-1))
    if config.qk_norm:
        query_BASF = modules.layer_norm(state, "q_norm", query_BASF, eps=NORM_EPS)
        key_BASF = modules.layer_norm(state, "k_norm", key_BASF, eps=NORM_EPS)
    return modules.linear(state, "proj", join_heads(attention(query_BASF, key_BASF, value_BASF)))


def state_shapes(config: DiTMoEModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, in the order of the public code."""
    return dit.shapes_around_blocks(block_shapes(config), config=config)


def block_shapes(config: DiTMoEModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of one block by its own name.

    Raises:
        TypeError: `config` is not a DiTMoEModelConfig.
    """
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


def load_state(state: Mapping[str, torch.Tensor], *, config: DiTMoEModelConfig) -> dict[str, torch.Tensor]:
    """Return a checkpoint of the public code as `dit_moe` takes it.

    Parameters keep their dtype. The fixed position table may be among them, and is left out.

    Args:
        state: Floating arrays by name, as in feizc/DiT-MoE: experts one by one (`blocks.0.moe.experts.0.gate_proj.weight`), and
            attention as `attn.qkv` and `attn.proj`, or as `attn.Wqkv` and `attn.out_proj`. Or as `state_shapes` has them.
        config: The model.

    Raises:
        TypeError: An entry is not a floating array.
        ValueError: An entry is missing, unexpected or of another shape; or a position table is not the fixed one.

    Source: feizc/DiT-MoE models.py, classes MoeMLP, SparseMoeBlock and FlashSelfMHAModified.
    """
    state = dict(state)
    if "pos_embed" in state:
        dit.check_position_table(state.pop("pos_embed"), config=config)
    for theirs, ours in FLASH_ATTENTION.items():
        state = {name.replace(f".{theirs}.", f".{ours}."): parameter for name, parameter in state.items()}
    for index in range(config.depth):
        state = with_stacked_experts(state, f"blocks.{index}.moe.experts.", config.num_experts)
    validation.state_entries(state, state_shapes(config))
    return {name: state[name] for name in state_shapes(config)}
