"""MMDiT of torch's fused operations, in the dtype of its inputs, with its blocks compiled by torch.compile or left as they are.

One compilation serves all blocks of a kind (with one attention or two, the last), so that its time does not grow with their
number; everything between the matrix products and `scaled_dot_product_attention` is fused. Results of products and of attention
are in the dtype of the latents; sums of products, and the inside of an operation, are float32.

Shapes: as in `reference.torch.mmdit`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

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
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.torch import layers
from gaugeblock.reference.torch.attention import join_heads, split_heads
from gaugeblock.reference.torch.mmdit import (
    FREQUENCY_EMBEDDING_SIZE,
    IMAGE_HEADS,
    NORM_EPS,
    TEXT_HEADS,
    State,
    embed_patches,
    state_shapes,
)

Norm: TypeAlias = Callable[..., torch.Tensor]
"""Of heads, a weight, and `eps`."""


def torch_rms_norm(heads: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize each head, in the dtype of the weight; the result has the heads' own."""
    return functional.rms_norm(heads.to(weight.dtype), heads.shape[-1:], weight, eps).to(heads.dtype)


def mmdit(
    state: State,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    config: MMDiTConfig,
) -> torch.Tensor:
    """Predict the velocity (noise - data) in latents of a text at a time.

    Args:
        state: The parameters by name, shapes as in `reference.torch.mmdit.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, height, width], floating; height and width are multiples of patch_size, up to
            pos_embed_max_size patches.
        encoder_hidden_states: [batch_size, num_text_tokens, joint_attention_dim], dtype of latents.
        pooled_projections: [batch_size, pooled_projection_dim], dtype of latents.
        timesteps: [batch_size], float32 or float64, in [0, 1000]: 1000 times the share of noise.
        config: The model.

    Returns:
        [batch_size, out_channels, height, width], dtype as latents. Differentiable once, by all but the times.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; or ranks, sizes or devices do not fit
            together.

    Source: `gaugeblock.reference.torch.mmdit.mmdit`.
    """
    return _predict(compiled, state, latents, encoder_hidden_states, pooled_projections, timesteps, config)


def mmdit_by_library(
    state: State,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    config: MMDiTConfig,
) -> torch.Tensor:
    """As `mmdit`, with nothing compiled: each operation of torch is fused in itself."""
    return _predict(as_it_is, state, latents, encoder_hidden_states, pooled_projections, timesteps, config)


def _predict(
    fuse: Fuse,
    state: State,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    config: MMDiTConfig,
) -> torch.Tensor:
    validation.mmdit(state, latents, encoder_hidden_states, pooled_projections, timesteps, config, state_shapes(config))
    return model_of_blocks(state, latents, encoder_hidden_states, pooled_projections, timesteps, config, fuse(block))


def model_of_blocks(
    state: State,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    config: MMDiTConfig,
    block: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Run the model; `block` takes what the one below takes. Nothing is checked."""
    hidden_BSD = embed_patches(state, latents, config=config)
    text_BTD = linear(state, "context_embedder", encoder_hidden_states)
    active_BD = functional.silu(embed_conditions(state, timesteps, pooled_projections))
    for index, own in enumerate(states.parts(state, "transformer_blocks", config.num_layers)):
        kind = index in config.dual_attention_layers, index == config.num_layers - 1
        hidden_BSD, text_BTD = block(own, hidden_BSD, text_BTD, active_BD, config.num_attention_heads, *kind)
    patches_BSI = final_patches(state, hidden_BSD, active_BD)
    return layers.unpatchify(patches_BSI, patch_size=config.patch_size, num_rows=latents.shape[2] // config.patch_size)


class Branches(NamedTuple):
    """What a block's branches are made by; of the attentions by the block's parameters under `attn` and `attn2`."""

    joint_attention: Callable[..., Sequence[torch.Tensor]]
    """Of parameters, modulated tokens of image and text, and `is_last`: both branches, of the last block the image's alone."""
    self_attention: Callable[[State, torch.Tensor], torch.Tensor]
    """Of parameters and modulated tokens of the image."""
    feed_forward: Callable[[State, str, torch.Tensor], torch.Tensor]
    """Of the block's parameters, the network's name, and modulated tokens."""


def block(
    state: State,
    hidden_BSD: torch.Tensor,
    text_BTD: torch.Tensor,
    active_BD: torch.Tensor,
    num_heads: int,
    is_dual: bool,
    is_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a block to tokens of image and text, [B, S, D] and [B, T, D]."""
    attentions = partial(joint_attention, num_heads=num_heads), partial(self_attention, num_heads=num_heads)
    branches = Branches(*attentions, feed_forward)
    return block_of_branches(state, hidden_BSD, text_BTD, active_BD, branches, is_dual=is_dual, is_last=is_last)


def block_of_branches(
    state: State,
    hidden_BSD: torch.Tensor,
    text_BTD: torch.Tensor,
    active_BD: torch.Tensor,
    branches: Branches,
    *,
    is_dual: bool,
    is_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a block whose branches are given; the last one leaves the text as it came."""
    shift_1_BD, scale_1_BD, gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD, *dual = steering(state, "norm1", active_BD)
    text_shift_1_BD, text_scale_1_BD, *text_others = text_steering(state, active_BD, is_last=is_last)
    modulated_BSD = layer_norm_modulate(hidden_BSD, shift_1_BD, scale_1_BD, eps=NORM_EPS)
    text_modulated_BTD = layer_norm_modulate(text_BTD, text_shift_1_BD, text_scale_1_BD, eps=NORM_EPS)
    attended = branches.joint_attention(states.part(state, "attn"), modulated_BSD, text_modulated_BTD, is_last=is_last)
    if is_dual:
        shift_3_BD, scale_3_BD, gate_3_BD = dual
        modulated_BSD = layer_norm_modulate(hidden_BSD, shift_3_BD, scale_3_BD, eps=NORM_EPS)
        more_BSD = branches.self_attention(states.part(state, "attn2"), modulated_BSD)
        hidden_BSD = gated_residual(hidden_BSD, more_BSD, gate_3_BD)
    own_feed_forward = partial(branches.feed_forward, state, "ff")
    hidden_BSD = _rest(own_feed_forward, hidden_BSD, attended[0], gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD)
    if is_last:
        return hidden_BSD, text_BTD
    return hidden_BSD, _rest(partial(branches.feed_forward, state, "ff_context"), text_BTD, attended[1], *text_others)


def _rest(
    feed_forward: Callable[[torch.Tensor], torch.Tensor],
    hidden_BSD: torch.Tensor,
    attended_BSD: torch.Tensor,
    gate_1_BD: torch.Tensor,
    shift_2_BD: torch.Tensor,
    scale_2_BD: torch.Tensor,
    gate_2_BD: torch.Tensor,
) -> torch.Tensor:
    """What follows attention, for image or text."""
    hidden_BSD, modulated_BSD = gated_residual_layer_norm_modulate(
        hidden_BSD, attended_BSD, gate_1_BD, shift_2_BD, scale_2_BD, eps=NORM_EPS
    )
    return gated_residual(hidden_BSD, feed_forward(modulated_BSD), gate_2_BD)


def final_patches(state: State, hidden_BSD: torch.Tensor, active_BD: torch.Tensor) -> torch.Tensor:
    """Return the final layer's patches, [B, S, patch_size**2 * out_channels]."""
    scale_BD, shift_BD = linear(state, "norm_out.linear", active_BD).chunk(2, dim=-1)
    return linear(state, "proj_out", layer_norm_modulate(hidden_BSD, shift_BD, scale_BD, eps=NORM_EPS))


def embed_conditions(state: State, timesteps: torch.Tensor, pooled_projections: torch.Tensor) -> torch.Tensor:
    """Return what steers the blocks, [B, D]; the waves are computed in float32 at least, since the angles reach 1000."""
    waves_BF = layers.timestep_embedding(timesteps, embedding_size=FREQUENCY_EMBEDDING_SIZE, frequency_shift=0)
    time, text = (f"time_text_embed.{embedder}_embedder" for embedder in ("timestep", "text"))
    time_BD = two_linears(state, (f"{time}.linear_1", f"{time}.linear_2"), waves_BF.to(pooled_projections.dtype))
    return time_BD + two_linears(state, (f"{text}.linear_1", f"{text}.linear_2"), pooled_projections)


def steering(state: State, name: str, active_BD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return all shifts, scales and gates that a layer of that name makes, [B, D] each."""
    steering_BD = linear(state, f"{name}.linear", active_BD)
    return steering_BD.unflatten(-1, (-1, active_BD.shape[-1])).unbind(1)


def text_steering(state: State, active_BD: torch.Tensor, *, is_last: bool) -> tuple[torch.Tensor, ...]:
    """Return a block's for the text; the last block's are shift and scale alone, of which the checkpoint has the scale first."""
    parts = steering(state, "norm1_context", active_BD)
    return parts[::-1] if is_last else parts


def joint_attention(
    state: State,
    modulated_BSD: torch.Tensor,
    text_modulated_BTD: torch.Tensor,
    num_heads: int,
    *,
    is_last: bool,
    norm: Norm = torch_rms_norm,
) -> list[torch.Tensor]:
    """Return the attention branches of image and, but for the last block's, of text, [B, S, D] and [B, T, D]."""
    attended = attended_jointly(state, modulated_BSD, text_modulated_BTD, num_heads, norm)
    return [linear(state, name, each) for name, each in zip(projections(is_last), attended, strict=False)]


def projections(is_last: bool) -> tuple[str, ...]:
    """Name what follows joint attention.

    The text of the last block is dropped after its queries were made, so that their parameters have a gradient, of 0.
    """
    return ("to_out.0",) if is_last else ("to_out.0", "to_add_out")


def attended_jointly(
    state: State, modulated_BSD: torch.Tensor, text_modulated_BTD: torch.Tensor, num_heads: int, norm: Norm = torch_rms_norm
) -> tuple[torch.Tensor, ...]:
    """Return what the heads of image and text attend to, side by side: [B, S, num_heads * features] and the text's."""
    of_image = heads(state, IMAGE_HEADS, modulated_BSD, num_heads, norm)
    of_text = heads(state, TEXT_HEADS, text_modulated_BTD, num_heads, norm)
    query, key, value = (torch.cat(both, dim=2) for both in zip(of_image, of_text, strict=True))
    attended_BND = join_heads(functional.scaled_dot_product_attention(query, key, value))
    return attended_BND.split([modulated_BSD.shape[1], text_modulated_BTD.shape[1]], dim=1)


def self_attention(state: State, modulated_BSD: torch.Tensor, num_heads: int, norm: Norm = torch_rms_norm) -> torch.Tensor:
    """Return the second attention branch of the image, [B, S, D]."""
    return linear(state, "to_out.0", attended_alone(state, modulated_BSD, num_heads, norm))


def attended_alone(state: State, modulated_BSD: torch.Tensor, num_heads: int, norm: Norm = torch_rms_norm) -> torch.Tensor:
    """Return what the heads of the image attend to by itself, side by side: [B, S, num_heads * features]."""
    return join_heads(functional.scaled_dot_product_attention(*heads(state, IMAGE_HEADS, modulated_BSD, num_heads, norm)))


def heads(
    state: State, names: tuple[str, ...], tokens_BSD: torch.Tensor, num_heads: int, norm: Norm = torch_rms_norm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return heads of queries, keys and values, [B, A, S, F] each; of the first two normalized where the state has weights."""
    query, key, value = (split_heads(linear(state, name, tokens_BSD), num_heads) for name in names[:3])
    if f"{names[3]}.weight" in state:
        query, key = (
            norm(each, state[f"{name}.weight"], eps=NORM_EPS) for name, each in zip(names[3:], (query, key), strict=True)
        )
    return query, key, value


def feed_forward(state: State, name: str, modulated_BSD: torch.Tensor) -> torch.Tensor:
    """Return the feed-forward branch of image or text."""
    return linear(state, f"{name}.net.2", hidden_layer(state, name, modulated_BSD))


def hidden_layer(state: State, name: str, modulated_BSD: torch.Tensor) -> torch.Tensor:
    """Return the hidden layer of that branch, [B, S, 4 * D]."""
    return functional.gelu(linear(state, f"{name}.net.0.proj", modulated_BSD), approximate="tanh")
