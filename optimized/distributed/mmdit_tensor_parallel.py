"""Tensor-parallel MMDiT: every rank has all tokens of image and text, some heads of each attention, some features of each hidden
layer.

Joint attention has one sum over the ranks each way, in which image and text travel together (`tensor_parallel.py`); backward,
with the gradients of the norms of heads, which every rank has whole and sends its own heads through. The image's second attention
and each feed-forward network have one each way as well. `partition_rules.MMDIT` says which parameters are cut, and how.
Embeddings, steering, norms of tokens and the final layer are computed on every rank alike, from the same numbers, so that no sum
is needed for their gradients.

Everything is in the dtype of the latents, results of products and of attention included, but for the sums over ranks, sums of
products, norms of heads, and what is inside of `reference.torch.layers`, which are float32 at least.

Shapes: as in `reference.torch.mmdit`.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.compiled.mmdit import (
    Branches,
    attended_alone,
    attended_jointly,
    block_of_branches,
    embed_conditions,
    final_patches,
    hidden_layer,
    projections,
)
from gaugeblock.optimized.distributed.mmdit_calls import agree_on_call
from gaugeblock.optimized.distributed.tensor_parallel import gradients_summed, parts_of_state, summed_linear, summed_linears
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.torch import layers, modules
from gaugeblock.reference.torch.mmdit import State, block_state, embed_patches
from gaugeblock.reference.torch.precision import at_least_float32


def mmdit(
    state: State,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    config: MMDiTConfig,
    mesh: DeviceMesh,
) -> torch.Tensor:
    """Predict the velocity (noise - data) in latents of a text at a time.

    Every rank of the mesh calls it with the same arguments, and calls backward where one does. Differentiable once, by all but
    the times; gradients are the whole ones on every rank. A training run keeps the parts of the state alone, and calls
    `mmdit_of_parts`.

    Args:
        state: The parameters by name, shapes as in `reference.torch.mmdit.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, height, width], floating; height and width are multiples of patch_size, up to
            pos_embed_max_size patches.
        encoder_hidden_states: [batch_size, num_text_tokens, joint_attention_dim], dtype of latents.
        pooled_projections: [batch_size, pooled_projection_dim], dtype of latents.
        timesteps: [batch_size], float32 or float64, in [0, 1000]: 1000 times the share of noise.
        config: The model; its num_attention_heads is a multiple of the world size.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        [batch_size, out_channels, height, width], dtype as latents; the same on every rank.

    Raises:
        TypeError: An argument of this rank is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or another rank's call raises, or does not fit to this one. Then all ranks raise.

    Source: `gaugeblock.reference.torch.mmdit.mmdit`; Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """
    arrays = latents, encoder_hidden_states, pooled_projections, timesteps
    agree_on_call(state, *arrays, config, mesh, partial(partition_rules.require_divisible, config, partition_rules.MMDIT))
    group = mesh.get_group()
    return mmdit_of_parts(parts_of_state(state, partition_rules.MMDIT, group), *arrays, config=config, group=group)


def mmdit_of_parts(
    parts: State,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    config: MMDiTConfig,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Do what `mmdit` does with this rank's parts of the parameters, as `parts_of_state` cuts them; nothing is checked."""
    hidden_BSD = embed_patches(parts, latents, config=config)
    text_BTD = modules.linear(parts, "context_embedder", encoder_hidden_states)
    active_BD = functional.silu(embed_conditions(parts, timesteps, pooled_projections))
    num_heads = config.num_attention_heads // dist.get_world_size(group)
    branches = Branches(
        partial(_joint_attention, num_heads=num_heads, group=group),
        partial(_self_attention, num_heads=num_heads, group=group),
        partial(_feed_forward, group=group),
    )
    for index in range(config.num_layers):
        kind = {"is_dual": index in config.dual_attention_layers, "is_last": index == config.num_layers - 1}
        hidden_BSD, text_BTD = block_of_branches(block_state(parts, index), hidden_BSD, text_BTD, active_BD, branches, **kind)
    patches_BSI = final_patches(parts, hidden_BSD, active_BD)
    return layers.unpatchify(patches_BSI, patch_size=config.patch_size, num_rows=latents.shape[2] // config.patch_size)


def _joint_attention(
    attention: State,
    modulated_BSD: torch.Tensor,
    text_modulated_BTD: torch.Tensor,
    *,
    is_last: bool,
    num_heads: int,
    group: dist.ProcessGroup,
) -> list[torch.Tensor]:
    """Attend with the heads of this rank."""
    attention, inputs_BSD, text_inputs_BTD = _shared(attention, group, modulated_BSD, text_modulated_BTD)
    attended = attended_jointly(attention, inputs_BSD, text_inputs_BTD, num_heads)
    streams = zip(attended, projections(is_last), strict=False)  # the last block has no projection of the text
    return summed_linears(group, *((each, *_linear(attention, name)) for each, name in streams))


def _self_attention(attention: State, modulated_BSD: torch.Tensor, num_heads: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Let the image attend to itself with the heads of this rank."""
    attention, inputs_BSD = _shared(attention, group, modulated_BSD)
    return summed_linear(attended_alone(attention, inputs_BSD, num_heads), *_linear(attention, "to_out.0"), group)


def _shared(attention: State, group: dist.ProcessGroup, *tokens: torch.Tensor) -> tuple[Any, ...]:
    """Return parameters and tokens of an attention; gradients of tokens and of norms of heads are added up over the ranks.

    Gradients of norms arrive in float32: rounded before they are added up, they would be further off than one rounding.
    """
    names = [name for name in attention if name.startswith("norm_")]
    summed = gradients_summed(group, *tokens, *(at_least_float32(attention[name]) for name in names))
    return {**attention, **dict(zip(names, summed[len(tokens) :], strict=True))}, *summed[: len(tokens)]


def _feed_forward(block: State, name: str, modulated_BSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Apply the features of this rank."""
    (inputs_BSD,) = gradients_summed(group, modulated_BSD)
    return summed_linear(hidden_layer(block, name, inputs_BSD), *_linear(block, f"{name}.net.2"), group)


def _linear(state: State, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]
