"""Tensor-parallel DiT: every rank has all tokens, some heads of each attention and some features of each hidden layer.

A block has one sum over the ranks for each branch, forward and backward (`tensor_parallel.py`); `partition_rules.DIT` says which
parameters are cut, and how. Embeddings, modulations, norms and the final layer are computed on every rank alike, from the
same numbers, so that no sum is needed for their gradients.

Everything is in the dtype of the latents, results of products and of attention included, but for the sums over ranks, sums of
products, and what is inside of `reference.torch.layers`, which are float32 at least.

Shapes: as in `reference.torch.layers`.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.compiled.dit import attended_heads, block_of_branches, embed_conditions, final_patches, hidden_layer
from gaugeblock.optimized.distributed.dit_calls import agree_on_call
from gaugeblock.optimized.distributed.tensor_parallel import gradients_summed, parts_of_state, summed_linear
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch import layers
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
    and state; gradients are the whole ones on every rank. A training run keeps the parts of the state alone, and calls
    `dit_of_parts`.

    Args:
        state: The parameters by name, shapes as in `reference.torch.dit.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, input_size, input_size], floating.
        timesteps: [batch_size], float32 or float64, usually in [0, 1000).
        class_labels: [batch_size], integer in 0 .. num_classes; num_classes is the label that was dropped.
        config: The model; its num_heads and intermediate_size are multiples of the world size.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        [batch_size, out_channels, input_size, input_size], dtype as latents; the same on every rank.

    Raises:
        TypeError: An argument of this rank is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; a label names no class; or another rank's call raises, or does not fit to this one. Then all ranks raise.

    Source: `gaugeblock.reference.torch.dit.dit`; Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """
    agree_on_call(
        state,
        latents,
        timesteps,
        class_labels,
        config,
        mesh,
        partial(partition_rules.require_divisible, config, partition_rules.DIT),
    )
    group = mesh.get_group()
    parts = parts_of_state(state, partition_rules.DIT, group)
    return dit_of_parts(parts, latents, timesteps, class_labels, config=config, group=group)


def dit_of_parts(
    parts: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    *,
    config: DiTConfig,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Do what `dit` does with this rank's parts of the parameters, as `parts_of_state` cuts them; nothing is checked."""
    hidden_BSD = embed_patches(parts, latents, config=config)
    active_BD = functional.silu(embed_conditions(parts, timesteps, class_labels, config))
    attention, feed_forward = partial(_attention, config=config, group=group), partial(_mlp, group=group)
    for index in range(config.depth):
        hidden_BSD = block_of_branches(block_state(parts, index), hidden_BSD, active_BD, attention, feed_forward, config.norm_eps)
    return layers.unpatchify(final_patches(parts, hidden_BSD, active_BD), patch_size=config.patch_size)


def _attention(block: State, modulated_BSD: torch.Tensor, config: DiTConfig, group: dist.ProcessGroup) -> torch.Tensor:
    """Attend with the heads of this rank."""
    (inputs_BSD,) = gradients_summed(group, modulated_BSD)
    attended_BSD = attended_heads(block, inputs_BSD, config.num_heads // dist.get_world_size(group))
    return summed_linear(attended_BSD, block["attn.proj.weight"], block["attn.proj.bias"], group)


def _mlp(block: State, modulated_BSD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Apply the features of this rank."""
    (inputs_BSD,) = gradients_summed(group, modulated_BSD)
    return summed_linear(hidden_layer(block, inputs_BSD), block["mlp.fc2.weight"], block["mlp.fc2.bias"], group)
