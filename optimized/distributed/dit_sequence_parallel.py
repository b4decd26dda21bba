"""Sequence-parallel DiT: every rank has all parameters and some of the tokens of each example.

A block has two exchanges, around its attention (`sequence_parallel.py`). The gradients of all parameters are added up over the
ranks at the end of the backward pass, in one exchange.

Everything is float32 at least, and rounded once: a rank's part of a parameter's gradient that is rounded to bfloat16 before the
ranks' parts are added up was found up to 4 times as far from the whole as its rounding allows.

Shapes: as in `reference.torch.layers`; S is the tokens of this rank.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from gaugeblock.optimized.compiled.dit import block_of_branches, embed_conditions, final_patches, linear, mlp
from gaugeblock.optimized.distributed.collectives import replicated
from gaugeblock.optimized.distributed.dit_calls import agree_on_call
from gaugeblock.optimized.distributed.sequence_parallel import all_tokens, attention_over_ranks, own_tokens
from gaugeblock.optimized.partition_rules import require_multiple
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch import layers
from gaugeblock.reference.torch.attention import join_heads
from gaugeblock.reference.torch.dit import block_state, embed_patches

State = Mapping[str, torch.Tensor]


def dit(
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    *,
    config: DiTConfig,
    mesh: DeviceMesh,
) -> torch.Tensor:
    """Predict the noise or the velocity (and with `learn_sigma` the variance) in latents of a class at a time.

    Every rank of the mesh calls it with the same arguments, and calls backward where one does. Differentiable once, by latents
    and state; gradients are the whole ones on every rank.

    Args:
        state: The parameters by name, shapes as in `reference.torch.dit.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, input_size, input_size], floating.
        timesteps: [batch_size], float32 or float64, usually in [0, 1000).
        class_labels: [batch_size], integer in 0 .. num_classes; num_classes is the label that was dropped.
        config: The model; its num_patches and num_heads are multiples of the world size.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        [batch_size, out_channels, input_size, input_size], dtype as latents; the same on every rank; computed in float32 (float64
        for float64 latents) and rounded once.

    Raises:
        TypeError: An argument of this rank is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; a label names no class; or another rank's call raises, or does not fit to this one. Then all ranks raise.

    Source: `gaugeblock.reference.torch.dit.dit`; Jacobs et al. 2023 (arXiv:2309.14509), section 3.
    """

    def require_fitting(ranks: int) -> None:
        for name in ("num_patches", "num_heads"):
            require_multiple(name, getattr(config, name), ranks)

    agree_on_call(state, latents, timesteps, class_labels, config, mesh, require_fitting)
    group = mesh.get_group()
    dtype = latents.dtype
    latents, *parameters = replicated(group, latents, *state.values())
    state = dict(zip(state, parameters, strict=True))

    hidden_BSD = own_tokens(embed_patches(state, latents, config=config), group)
    active_BD = functional.silu(embed_conditions(state, timesteps, class_labels, config))
    attention = partial(_attention, config=config, group=group)
    for index in range(config.depth):
        hidden_BSD = block_of_branches(block_state(state, index), hidden_BSD, active_BD, attention, mlp, config.norm_eps)
    patches_BSI = all_tokens(final_patches(state, hidden_BSD, active_BD), group)
    return layers.unpatchify(patches_BSI, patch_size=config.patch_size).to(dtype)


def _attention(block: State, modulated_BSD: torch.Tensor, config: DiTConfig, group: dist.ProcessGroup) -> torch.Tensor:
    """Let this rank's tokens attend to all."""
    heads_3BASF = linear(block, "attn.qkv", modulated_BSD).unflatten(-1, (3, config.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return linear(block, "attn.proj", join_heads(attention_over_ranks(heads_3BASF, group)))
