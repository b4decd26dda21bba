"""Sequence-parallel Flux: every rank has all parameters, and of each example some tokens of the image and some of the text.

A block has two exchanges, around its attention (`sequence_parallel.py`). Both streams are cut at the entrance, with their places,
and lie side by side on every rank from there on, so that all but attention is as on one rank. The gradients of all parameters are
added up over the ranks at the end of the backward pass, in one exchange.

Everything is float32 at least, and rounded once, as in `dit_sequence_parallel.py`.

Shapes: as in `reference.torch.flux`; S, T and J are the tokens of this rank.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.compiled.flux import (
    block_of_branches,
    feed_forwards,
    heads,
    joint_attention,
    model_of_blocks,
    single_block_of_branch,
    single_branch,
)
from gaugeblock.optimized.distributed.collectives import replicated
from gaugeblock.optimized.distributed.flux_calls import agree_on_call
from gaugeblock.optimized.distributed.sequence_parallel import all_tokens, attention_over_ranks, own_tokens
from gaugeblock.optimized.partition_rules import require_multiple
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch.flux import State


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
    four; gradients are the whole ones on every rank. num_image_tokens and
    num_text_tokens are multiples of the world size.

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
        [batch_size, num_image_tokens, out_features], dtype as hidden_states; the same on every rank;
        computed in float32 (float64 for float64 hidden_states) and rounded once.

    Raises:
        TypeError: An argument of this rank is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or another rank's call raises, or does not fit to this one. Then all ranks raise.

    Source: `gaugeblock.reference.torch.flux.flux`; Jacobs et al. 2023 (arXiv:2309.14509), section 3.
    """
    arrays = hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids

    def require_fitting(ranks: int) -> None:
        require_multiple("num_attention_heads", config.num_attention_heads, ranks)
        require_multiple("num_image_tokens", hidden_states.shape[1], ranks)
        require_multiple("num_text_tokens", encoder_hidden_states.shape[1], ranks)

    agree_on_call(state, arrays, config, mesh, require_fitting)
    group = mesh.get_group()
    image_BSC, text_BTI, pooled_BI, *parameters = replicated(group, *arrays[:3], *state.values())
    state = dict(zip(state, parameters, strict=True))

    tokens = own_tokens(image_BSC, group), own_tokens(text_BTI, group)
    places = (own_tokens(each[None], group)[0] for each in (img_ids, txt_ids))
    all_heads, attention = partial(heads, num_heads=config.num_attention_heads), partial(_attention, group=group)
    block = partial(
        block_of_branches,
        joint_attention=partial(joint_attention, heads=all_heads, attention=attention),
        feed_forwards=feed_forwards,
    )
    branch = partial(single_branch, heads=all_heads, attention=attention)
    single_block = partial(single_block_of_branch, single_branch=branch)
    out_BSI = model_of_blocks(state, (*tokens, pooled_BI, timesteps, guidance, *places), config, block, single_block)
    return all_tokens(out_BSI, group).to(hidden_states.dtype)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Let this rank's tokens attend to all."""
    return attention_over_ranks(torch.stack([query, key, value]), group)
