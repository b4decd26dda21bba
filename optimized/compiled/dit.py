"""DiT of torch's fused operations, in the dtype of its inputs, with its block compiled by torch.compile or left as it is.

One compilation serves all blocks, so that its time does not grow with the depth; everything between the matrix products
and `scaled_dot_product_attention` is fused. Sums of products, and what is inside of an operation, are float32.

Shapes: as in `reference.torch.layers`.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled.library_layers import (
    Fuse,
    compiled,
    gated_residual,
    gated_residual_layer_norm_modulate,
    layer_norm_modulate,
)
from gaugeblock.optimized.model_parts import as_it_is, linear, two_linears
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch import layers
from gaugeblock.reference.torch.dit import NORM_EPS, embed_patches, state_shapes

State = Mapping[str, torch.Tensor]
Branch = Callable[[State, torch.Tensor], torch.Tensor]


def dit(
    state: State, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, *, config: DiTConfig
) -> torch.Tensor:
    """Predict the noise or the velocity (and with `learn_sigma` the variance) in latents of a class at a time.

    Args:
        state: The parameters by name, shapes as in `reference.torch.dit.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, input_size, input_size], floating.
        timesteps: [batch_size], float32 or float64, usually in [0, 1000).
        class_labels: [batch_size], integer in 0 .. num_classes; num_classes is the label that was dropped.
        config: The model.

    Returns:
        [batch_size, out_channels, input_size, input_size], dtype as latents. Differentiable once, by latents and state.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or a label names no class.

    Source: `gaugeblock.reference.torch.dit.dit`.
    """
    return _predict(compiled, state, latents, timesteps, class_labels, config)


def dit_by_library(
    state: State, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, *, config: DiTConfig
) -> torch.Tensor:
    """As `dit`, with nothing compiled: each operation of torch is fused in itself."""
    return _predict(as_it_is, state, latents, timesteps, class_labels, config)


def _predict(
    fuse: Fuse, state: State, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, config: DiTConfig
) -> torch.Tensor:
    validation.dit(state, latents, timesteps, class_labels, config, state_shapes(config))
    validation.class_labels_in_range(class_labels, config.num_classes)
    return model_of_blocks(state, latents, timesteps, class_labels, config, fuse(block))


def model_of_blocks(
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    config: DiTConfig,
    block: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Run the model; `block` takes what the one below takes. Nothing is checked."""
    hidden_BSD = embed_patches(state, latents, config=config)
    active_BD = functional.silu(embed_conditions(state, timesteps, class_labels, config))
    for own in states.parts(state, "blocks", config.depth):
        hidden_BSD = block(own, hidden_BSD, active_BD, config.num_heads, config.norm_eps)
    return layers.unpatchify(final_patches(state, hidden_BSD, active_BD), patch_size=config.patch_size)


def block(state: State, hidden_BSD: torch.Tensor, active_BD: torch.Tensor, num_heads: int, norm_eps: float) -> torch.Tensor:
    """Apply a block to tokens [B, S, D]."""
    return block_of_branches(state, hidden_BSD, active_BD, partial(attention, num_heads=num_heads), mlp, norm_eps)


def block_of_branches(
    block: State, hidden_BSD: torch.Tensor, active_BD: torch.Tensor, attention: Branch, mlp: Branch, norm_eps: float
) -> torch.Tensor:
    """Apply a block whose branches are given, each as a function of the block's parameters and its tokens, [B, S, D]."""
    hidden_BSD, modulated_BSD, gate_BD = before_feed_forward(block, hidden_BSD, active_BD, attention, norm_eps)
    return gated_residual(hidden_BSD, mlp(block, modulated_BSD), gate_BD)


def before_feed_forward(
    block: State, hidden_BSD: torch.Tensor, active_BD: torch.Tensor, attention: Branch, norm_eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a block's tokens after attention, the same modulated for its second branch, and the gate of that, [B, D]."""
    modulation_BD = linear(block, "adaLN_modulation.1", active_BD)
    shift_1_BD, scale_1_BD, gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = modulation_BD.chunk(6, dim=-1)
    modulated_BSD = layer_norm_modulate(hidden_BSD, shift_1_BD, scale_1_BD, eps=NORM_EPS)
    hidden_BSD, modulated_BSD = gated_residual_layer_norm_modulate(
        hidden_BSD, attention(block, modulated_BSD), gate_1_BD, shift_2_BD, scale_2_BD, eps=norm_eps
    )
    return hidden_BSD, modulated_BSD, gate_2_BD


def final_patches(state: State, hidden_BSD: torch.Tensor, active_BD: torch.Tensor) -> torch.Tensor:
    """Return the final layer's patches, [B, S, patch_size**2 * out_channels]."""
    shift_BD, scale_BD = linear(state, "final_layer.adaLN_modulation.1", active_BD).chunk(2, dim=-1)
    return linear(state, "final_layer.linear", layer_norm_modulate(hidden_BSD, shift_BD, scale_BD, eps=NORM_EPS))


def embed_conditions(state: State, timesteps: torch.Tensor, class_labels: torch.Tensor, config: DiTConfig) -> torch.Tensor:
    """Return what steers the blocks, [B, D]; the waves are computed in float32 at least, since the angles reach 1000."""
    waves_BF = layers.timestep_embedding(
        timesteps, embedding_size=config.frequency_embedding_size, frequency_shift=config.frequency_shift
    )
    table = state["y_embedder.embedding_table.weight"]
    time_BD = two_linears(state, ("t_embedder.mlp.0", "t_embedder.mlp.2"), waves_BF.to(table.dtype))
    return time_BD + table[class_labels.long()]


def attention(block: State, modulated_BSD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the attention branch of a block, [B, S, D]."""
    return linear(block, "attn.proj", attended_heads(block, modulated_BSD, num_heads))


def attended_heads(block: State, modulated_BSD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return what the heads of `attn.qkv` attend to, side by side: [B, S, num_heads * features]."""
    attended_BASF = functional.scaled_dot_product_attention(*split_heads(block, modulated_BSD, num_heads))
    return attended_BASF.transpose(1, 2).flatten(2)


def split_heads(block: State, modulated_BSD: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values, each [B, A, S, F]."""
    heads_3BASF = linear(block, "attn.qkv", modulated_BSD).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    query_BASF, key_BASF, value_BASF = heads_3BASF.unbind()
    return query_BASF, key_BASF, value_BASF


def mlp(block: State, modulated_BSD: torch.Tensor) -> torch.Tensor:
    """Return the feed-forward branch of a block, [B, S, D]."""
    return linear(block, "mlp.fc2", hidden_layer(block, modulated_BSD))


def hidden_layer(block: State, modulated_BSD: torch.Tensor) -> torch.Tensor:
    """Return the hidden layer of the feed-forward branch, [B, S, I]."""
    return functional.gelu(linear(block, "mlp.fc1", modulated_BSD), approximate="tanh")
