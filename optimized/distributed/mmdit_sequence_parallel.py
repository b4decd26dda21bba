"""Sequence-parallel MMDiT: every rank has all parameters and some of the tokens of image and text.

Both streams are cut each by itself, filled up with tokens that count for nothing to a multiple of the ranks: a text of 77 + 256
tokens has few divisors. The exchanges around an attention (`sequence_parallel.py`) carry them, and attention leaves them out, so
that they reach no other token. The gradients of all parameters are added up over the ranks at the end of the backward pass, in
one exchange.

Everything is float32 at least, and rounded once: a rank's part of a parameter's gradient that is rounded to bfloat16 before the
ranks' parts are added up is further from the whole than its rounding allows.

Shapes: as in `reference.torch.mmdit`; S and T are the tokens of this rank.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from gaugeblock.optimized.compiled.mmdit import (
    Branches,
    block_of_branches,
    embed_conditions,
    feed_forward,
    final_patches,
    heads,
    projections,
)
from gaugeblock.optimized.distributed.collectives import replicated
from gaugeblock.optimized.distributed.mmdit_calls import agree_on_call
from gaugeblock.optimized.distributed.sequence_parallel import (
    all_tokens,
    attention_over_ranks,
    filled_up,
    own_tokens,
    places_of_tokens,
)
from gaugeblock.optimized.partition_rules import require_multiple
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.torch import layers, modules
from gaugeblock.reference.torch.attention import join_heads
from gaugeblock.reference.torch.mmdit import IMAGE_HEADS, TEXT_HEADS, State, block_state, embed_patches


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
    the times; gradients are the whole ones on every rank.

    Args:
        state: The parameters by name, shapes as in `reference.torch.mmdit.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, height, width], floating; height and width are multiples of patch_size, up to
            pos_embed_max_size patches. Any number of patches.
        encoder_hidden_states: [batch_size, num_text_tokens, joint_attention_dim], dtype of latents. Any number of tokens.
        pooled_projections: [batch_size, pooled_projection_dim], dtype of latents.
        timesteps: [batch_size], float32 or float64, in [0, 1000]: 1000 times the share of noise.
        config: The model; its num_attention_heads is a multiple of the world size.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        [batch_size, out_channels, height, width], dtype as latents; the same on every rank; computed in float32 (float64 for
        float64 latents) and rounded once.

    Raises:
        TypeError: An argument of this rank is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or another rank's call raises, or does not fit to this one. Then all ranks raise.

    Source: `gaugeblock.reference.torch.mmdit.mmdit`; Jacobs et al. 2023 (arXiv:2309.14509), section 3.
    """
    fitting = partial(require_multiple, "num_attention_heads", config.num_attention_heads)
    agree_on_call(state, latents, encoder_hidden_states, pooled_projections, timesteps, config, mesh, fitting)
    group, ranks, dtype = mesh.get_group(), mesh.size(), latents.dtype
    latents, text, pooled, *parameters = replicated(group, latents, encoder_hidden_states, pooled_projections, *state.values())
    state = dict(zip(state, parameters, strict=True))

    patches_BSD = embed_patches(state, latents, config=config)
    hidden_BSD = own_tokens(filled_up(patches_BSD, ranks), group)
    text_BTD = modules.linear(state, "context_embedder", own_tokens(filled_up(text, ranks), group))
    active_BD = functional.silu(embed_conditions(state, timesteps, pooled))
    num_patches = patches_BSD.shape[1]
    joint_places, own_places = places_of_tokens((num_patches, text.shape[1]), ranks), places_of_tokens((num_patches,), ranks)
    num_heads = config.num_attention_heads
    branches = Branches(
        partial(_joint_attention, places=joint_places, num_heads=num_heads, group=group),
        partial(_self_attention, places=own_places, num_heads=num_heads, group=group),
        feed_forward,
    )
    for index in range(config.num_layers):
        kind = {"is_dual": index in config.dual_attention_layers, "is_last": index == config.num_layers - 1}
        hidden_BSD, text_BTD = block_of_branches(block_state(state, index), hidden_BSD, text_BTD, active_BD, branches, **kind)
    patches_BSI = all_tokens(final_patches(state, hidden_BSD, active_BD), group)[:, :num_patches]
    rows = latents.shape[2] // config.patch_size
    return layers.unpatchify(patches_BSI, patch_size=config.patch_size, num_rows=rows).to(dtype)


def _joint_attention(
    attention: State,
    modulated_BSD: torch.Tensor,
    text_modulated_BTD: torch.Tensor,
    *,
    is_last: bool,
    places: list[int],
    num_heads: int,
    group: dist.ProcessGroup,
) -> list[torch.Tensor]:
    """Let this rank's tokens of image and text attend to all."""
    of_image = heads(attention, IMAGE_HEADS, modulated_BSD, num_heads)
    of_text = heads(attention, TEXT_HEADS, text_modulated_BTD, num_heads)
    joined = torch.cat([torch.stack(of_image), torch.stack(of_text)], dim=3)
    attended_BND = join_heads(attention_over_ranks(joined, group, places))
    attended = attended_BND.split([modulated_BSD.shape[1], text_modulated_BTD.shape[1]], dim=1)
    return [modules.linear(attention, name, each) for name, each in zip(projections(is_last), attended, strict=False)]


def _self_attention(
    attention: State, modulated_BSD: torch.Tensor, places: list[int], num_heads: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Let this rank's tokens of the image attend to all of the image."""
    of_image = torch.stack(heads(attention, IMAGE_HEADS, modulated_BSD, num_heads))
    return modules.linear(attention, "to_out.0", join_heads(attention_over_ranks(of_image, group, places)))
