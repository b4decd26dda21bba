"""Tensor-parallel Flux: every rank has all tokens, some heads of each attention and some features of each hidden layer.

A block with two streams has one sum over the ranks for both attention branches and one for both feed-forward branches, a block
with one stream has one sum for all it adds; as many backward (`tensor_parallel.py`). `partition_rules.FLUX` says which parameters
are cut, and how. Embeddings, modulations, LayerNorms and the final layer are computed on every rank alike, from the same
numbers, so that no sum is needed for their gradients. Norms of queries and keys have one weight for all heads, of which a rank
sees its own: their gradients are added up with those of the tokens.

Everything is in the dtype of the tokens, results of products and of attention included, but for the sums over ranks, sums of
products, norms and rotations of queries and keys, and what is inside of `reference.torch.layers`, which are float32 at least.

Shapes: as in `reference.torch.flux`.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.compiled.flux import (
    MakesHeads,
    Table,
    attended_streams,
    block_of_branches,
    heads,
    hidden_layer,
    model_of_blocks,
    single_block_of_branch,
    single_inner,
)
from gaugeblock.optimized.distributed.flux_calls import agree_on_call
from gaugeblock.optimized.distributed.tensor_parallel import gradients_summed, parts_of_state, summed_linear, summed_linears
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch.flux import HEADS, TEXT_HEADS, State
from gaugeblock.reference.torch.precision import at_least_float32


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
    mesh: DeviceMesh,
) -> torch.Tensor:
    """Predict the velocity of packed latents at a time, as a text describes them.

    Every rank of the mesh calls it with the same arguments, and calls backward where one does. Differentiable once, by the first
    four; gradients are the whole ones on every rank. A training run keeps the parts of the state alone,
    and calls `flux_of_parts`.

    Args:
        state: The parameters by name, shapes as in `reference.torch.flux.state_shapes`, dtype of hidden_states.
        hidden_states: [batch_size, num_image_tokens, in_channels], floating.
        encoder_hidden_states: [batch_size, num_text_tokens, joint_attention_dim], dtype of hidden_states.
        pooled_projections: [batch_size, pooled_projection_dim], dtype of hidden_states.
        timesteps: [batch_size], float32 or float64, in [0, 1].
        guidance: [batch_size], float32 or float64; read where the config has `guidance_embeds`.
        img_ids: [num_image_tokens, axes], float32 or float64.
        txt_ids: [num_text_tokens, axes], float32 or float64.
        config: The model; its num_attention_heads is a multiple of the world size.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        [batch_size, num_image_tokens, out_features], dtype as hidden_states; the same on every rank.

    Raises:
        TypeError: An argument of this rank is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or another rank's call raises, or does not fit to this one. Then all ranks raise.

    Source: `gaugeblock.reference.torch.flux.flux`; Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """
    arrays = hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids
    rules, group = partition_rules.FLUX, mesh.get_group()
    agree_on_call(state, arrays, config, mesh, partial(partition_rules.require_divisible, config, rules))
    return flux_of_parts(parts_of_state(state, rules, group), arrays, config=config, group=group)


def flux_of_parts(parts: State, arrays: Sequence[torch.Tensor], *, config: FluxConfig, group: dist.ProcessGroup) -> torch.Tensor:
    """Do what `flux` does with this rank's parts of the parameters, as `parts_of_state` cuts them; nothing is checked.

    Args:
        arrays: All arguments of `flux` from hidden_states to txt_ids.
    """
    own_heads = partial(heads, num_heads=config.num_attention_heads // dist.get_world_size(group))
    attention, feed_forwards = partial(_joint_attention, heads=own_heads, group=group), partial(_feed_forwards, group=group)
    block = partial(block_of_branches, joint_attention=attention, feed_forwards=feed_forwards)
    single_block = partial(single_block_of_branch, single_branch=partial(_single_branch, heads=own_heads, group=group))
    return model_of_blocks(parts, arrays, config, block, single_block)


def _joint_attention(
    block: State, image_BSD: torch.Tensor, text_BTD: torch.Tensor, table: Table, heads: MakesHeads, group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Attend with the heads of this rank."""
    block, (image_BSD, text_BTD) = _summed_backward(block, (*HEADS[3:], *TEXT_HEADS[3:]), group, image_BSD, text_BTD)
    attended = attended_streams(block, image_BSD, text_BTD, table, heads)
    return _summed_outs(block, ("attn.to_out.0", "attn.to_add_out"), attended, group)


def _feed_forwards(block: State, image_BSD: torch.Tensor, text_BTD: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Apply the features of this rank."""
    names, tokens = ("ff", "ff_context"), gradients_summed(group, image_BSD, text_BTD)
    inner = [hidden_layer(block, f"{name}.net.0.proj", each) for name, each in zip(names, tokens, strict=True)]
    return _summed_outs(block, [f"{name}.net.2" for name in names], inner, group)


def _single_branch(
    block: State, joint_BJD: torch.Tensor, table: Table, heads: MakesHeads, group: dist.ProcessGroup
) -> torch.Tensor:
    """Apply the heads and the features of this rank."""
    block, (inputs_BJD,) = _summed_backward(block, HEADS[3:], group, joint_BJD)
    inner_BJI = single_inner(block, inputs_BJD, table, heads)
    return summed_linear(inner_BJI, block["proj_out.weight"], block["proj_out.bias"], group)


def _summed_backward(
    block: State, norms: Sequence[str], group: dist.ProcessGroup, *tokens: torch.Tensor
) -> tuple[State, Sequence[torch.Tensor]]:
    """Return parameters and tokens of which the norms' weights and the tokens get the gradients of all ranks, in one exchange."""
    names = [f"{norm}.weight" for norm in norms]
    # in float32, so that a weight's gradient is rounded once, when it is added up
    summed = gradients_summed(group, *tokens, *(at_least_float32(block[name]) for name in names))
    return {**block, **dict(zip(names, summed[len(tokens) :], strict=True))}, summed[: len(tokens)]


def _summed_outs(
    block: State, names: Sequence[str], inner: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Multiply this rank's features of each stream by the last layer of that name."""
    layers = ((each, block[f"{name}.weight"], block[f"{name}.bias"]) for name, each in zip(names, inner, strict=True))
    return summed_linears(group, *layers)
