"""The UNets of torch's fused operations, in the dtype of the latents, their layers compiled or left as they are.

Compiled, they have the channels last: a GPU's convolutions need no transpositions, and pixels are tokens as they lie. What lies
between convolutions and matrix products (GroupNorm, silu, LayerNorm, GEGLU, residual sums) is fused; a ResNet block, and a
transformer block, are compiled once for all levels. Results of convolutions, products and attention are in the dtype of the
latents; their sums, and what is inside of a norm, are float32.

Shapes: as in `reference.torch.unet`.
"""

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled.library_layers import (
    Fuse,
    State,
    compiled,
    laid_out,
    layer_norm,
    linear,
    two_linears,
    uncompiled,
)
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import UNetConfig
from gaugeblock.reference.torch import convolutions, layers, modules
from gaugeblock.reference.torch.attention import join_heads, split_heads
from gaugeblock.reference.torch.unet import BLOCK_NORM_EPS, TRANSFORMER_NORM_EPS, Conditioning
from gaugeblock.reference.unet_states import state_shapes

_T = torch.Tensor
Arrays = tuple[_T, _T, _T, _T, _T]


def unet(
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    *,
    config: UNetConfig,
) -> torch.Tensor:
    """Predict the noise or the velocity in latents of a text at a time, as Stable Diffusion 1 and 2 do.

    Args:
        state: The parameters by name, shapes as in `unet_states.state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, height, width], floating.
        timesteps: [batch_size], float32 or float64, usually in [0, 1000).
        encoder_hidden_states: [batch_size, text_length, cross_attention_dim], dtype of latents.
        encoder_attention_mask: [batch_size, text_length], bool, True where the text may be looked at; by default everywhere.
        config: The model, without added embeddings.

    Returns:
        [batch_size, out_channels, height, width], dtype as latents. Differentiable once, by latents, text and state.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or the config has added embeddings.

    Source: `gaugeblock.reference.torch.unet.unet`.
    """
    return _steered_by_text(compiled, state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config)


def unet_by_library(
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    *,
    config: UNetConfig,
) -> torch.Tensor:
    """As `unet`, with nothing compiled: each operation of torch is fused in itself."""
    return _steered_by_text(uncompiled, state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config)


def _steered_by_text(
    fuse: Fuse,
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None,
    config: UNetConfig,
) -> torch.Tensor:
    validation.unet(state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config, state_shapes(config))
    time_BE = embed(state, "time_embedding", waves(timesteps, config.block_out_channels[0]).to(latents.dtype))
    return _predict(fuse, state, latents, Conditioning(time_BE, encoder_hidden_states, encoder_attention_mask), config)


def unet_text_time(
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    text_embeds: torch.Tensor,
    time_ids: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    *,
    config: UNetConfig,
) -> torch.Tensor:
    """Predict the noise in latents of a text, an image's size and its crop at a time, as Stable Diffusion XL does.

    Args:
        state, latents, timesteps, encoder_hidden_states, encoder_attention_mask: As of `unet`.
        text_embeds: [batch_size, text_embed_dim], dtype of latents.
        time_ids: [batch_size, num_time_ids], float32 or float64.
        config: The model, with added embeddings.

    Returns: as `unet`; differentiable by text_embeds, too.

    Raises: as `unet`, but where the config has no added embeddings.

    Source: `gaugeblock.reference.torch.unet.unet_text_time`.
    """
    arrays = latents, timesteps, encoder_hidden_states, text_embeds, time_ids
    return _steered_by_text_and_sizes(compiled, state, arrays, encoder_attention_mask, config)


def unet_text_time_by_library(
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    text_embeds: torch.Tensor,
    time_ids: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    *,
    config: UNetConfig,
) -> torch.Tensor:
    """As `unet_text_time`, with nothing compiled: each operation of torch is fused in itself."""
    arrays = latents, timesteps, encoder_hidden_states, text_embeds, time_ids
    return _steered_by_text_and_sizes(uncompiled, state, arrays, encoder_attention_mask, config)


def _steered_by_text_and_sizes(
    fuse: Fuse, state: State, arrays: Arrays, mask: torch.Tensor | None, config: UNetConfig
) -> torch.Tensor:
    """Take latents, times, text, pooled text and sizes."""
    validation.unet_text_time(state, *arrays, mask, config, state_shapes(config))
    latents, timesteps, encoder_hidden_states, text_embeds, time_ids = arrays
    time_BE = embed(state, "time_embedding", waves(timesteps, config.block_out_channels[0]).to(latents.dtype))
    batch_size, num_time_ids = time_ids.shape
    size = config.addition_time_embed_dim
    waves_BF = waves(time_ids.flatten(), size).to(latents.dtype).reshape(batch_size, num_time_ids * size)
    added_BE = embed(state, "add_embedding", torch.cat([text_embeds, waves_BF], dim=1))
    return _predict(fuse, state, latents, Conditioning(time_BE + added_BE, encoder_hidden_states, mask), config)


def waves(times: torch.Tensor, embedding_size: int) -> torch.Tensor:
    """Return cosines and sines of times, in their dtype, since the angles reach 1000."""
    return layers.timestep_embedding(times, embedding_size=embedding_size, frequency_shift=0)


def embed(state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Apply the two linear layers of an embedding."""
    return two_linears(state, (f"{name}.linear_1", f"{name}.linear_2"), inputs)


def _predict(fuse: Fuse, state: State, latents: torch.Tensor, conditioning: Conditioning, config: UNetConfig) -> torch.Tensor:
    active_BE = functional.silu(conditioning.time)  # once for all ResNet blocks
    conditioning = Conditioning(active_BE, conditioning.text, conditioning.mask)
    kept = [modules.convolution(state, "conv_in", laid_out(fuse, latents))]
    for level in range(config.num_levels):
        block = states.part(state, f"down_blocks.{level}")
        for index in range(config.layers_per_block):
            kept.append(_layer(fuse, block, index, kept[-1], conditioning, level, config))
        if level < config.num_levels - 1:
            kept.append(modules.convolution(block, "downsamplers.0.conv", kept[-1], stride=2))
    images_BCHW = _mid_block(fuse, states.part(state, "mid_block"), kept[-1], conditioning, config)
    for place, level in enumerate(reversed(range(config.num_levels))):
        block = states.part(state, f"up_blocks.{place}")
        for index in range(config.layers_per_block + 1):
            both_BCHW = torch.cat([images_BCHW, kept.pop()], dim=1)
            images_BCHW = _layer(fuse, block, index, both_BCHW, conditioning, level, config)
        if level > 0:
            height, width = kept[-1].shape[2:]
            doubled_BCHW = convolutions.upsample(images_BCHW)[:, :, :height, :width]
            images_BCHW = modules.convolution(block, "upsamplers.0.conv", doubled_BCHW)
    return fuse(_last)(_heads_of(state), images_BCHW, config).contiguous()


def _heads_of(state: State) -> dict[str, torch.Tensor]:
    return {name: state[name] for name in state if name.startswith(("conv_norm_out.", "conv_out."))}


def _mid_block(
    fuse: Fuse, block: State, images_BCHW: torch.Tensor, conditioning: Conditioning, config: UNetConfig
) -> torch.Tensor:
    images_BCHW = fuse(_resnet)(states.part(block, "resnets.0"), images_BCHW, conditioning.time, config)
    own = states.part(block, "attentions.0")
    images_BCHW = _transformer(fuse, own, images_BCHW, conditioning, config.num_levels - 1, config)
    return fuse(_resnet)(states.part(block, "resnets.1"), images_BCHW, conditioning.time, config)


def _layer(
    fuse: Fuse, block: State, index: int, images_BCHW: torch.Tensor, conditioning: Conditioning, level: int, config: UNetConfig
) -> torch.Tensor:
    images_BCHW = fuse(_resnet)(states.part(block, f"resnets.{index}"), images_BCHW, conditioning.time, config)
    if not config.has_transformers(level):
        return images_BCHW
    return _transformer(fuse, states.part(block, f"attentions.{index}"), images_BCHW, conditioning, level, config)


def _resnet(state: State, images_BCHW: torch.Tensor, active_BE: torch.Tensor, config: UNetConfig) -> torch.Tensor:
    hidden_BCHW = modules.convolution(state, "conv1", _norm_silu(state, "norm1", images_BCHW, config))
    hidden_BCHW = hidden_BCHW + linear(state, "time_emb_proj", active_BE)[:, :, None, None]
    hidden_BCHW = modules.convolution(state, "conv2", _norm_silu(state, "norm2", hidden_BCHW, config))
    if "conv_shortcut.weight" in state:
        images_BCHW = modules.convolution(state, "conv_shortcut", images_BCHW)
    return images_BCHW + hidden_BCHW


def _transformer(
    fuse: Fuse, state: State, images_BCHW: torch.Tensor, conditioning: Conditioning, level: int, config: UNetConfig
) -> torch.Tensor:
    groups = config.norm_num_groups
    normalized_BCHW = _group_norm(state, "norm", images_BCHW, groups, TRANSFORMER_NORM_EPS)
    tokens_BSC = _project(state, "proj_in", normalized_BCHW.flatten(2).mT)
    mask = None if conditioning.mask is None else conditioning.mask[:, None, None]
    for block in states.parts(state, "transformer_blocks", config.transformer_layers_per_block[level]):
        tokens_BSC = fuse(_transformer_block)(block, tokens_BSC, conditioning.text, mask, config.attention_head_dim[level])
    return images_BCHW + _project(state, "proj_out", tokens_BSC).mT.reshape(images_BCHW.shape)


def _transformer_block(
    state: State, tokens_BSC: torch.Tensor, text_BTD: torch.Tensor, mask: torch.Tensor | None, num_heads: int
) -> torch.Tensor:
    normalized_BSC = layer_norm(state, "norm1", tokens_BSC, eps=BLOCK_NORM_EPS)
    tokens_BSC = tokens_BSC + _attend(state, "attn1", normalized_BSC, normalized_BSC, None, num_heads)
    tokens_BSC = tokens_BSC + _attend(
        state, "attn2", layer_norm(state, "norm2", tokens_BSC, eps=BLOCK_NORM_EPS), text_BTD, mask, num_heads
    )
    up_BSI, gate_BSI = linear(state, "ff.net.0.proj", layer_norm(state, "norm3", tokens_BSC, eps=BLOCK_NORM_EPS)).chunk(2, dim=-1)
    return tokens_BSC + linear(state, "ff.net.2", up_BSI * functional.gelu(gate_BSI))


def _attend(
    state: State, name: str, tokens_BSC: torch.Tensor, asked: torch.Tensor, mask: torch.Tensor | None, num_heads: int
) -> torch.Tensor:
    query_BASF = split_heads(linear(state, f"{name}.to_q", tokens_BSC), num_heads)
    key_BATF, value_BATF = (split_heads(linear(state, f"{name}.{each}", asked), num_heads) for each in ("to_k", "to_v"))
    attended_BASF = functional.scaled_dot_product_attention(query_BASF, key_BATF, value_BATF, attn_mask=mask)
    return linear(state, f"{name}.to_out.0", join_heads(attended_BASF))


def _project(state: State, name: str, tokens_BSC: torch.Tensor) -> torch.Tensor:
    return functional.linear(tokens_BSC, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])


def _group_norm(state: State, name: str, images_BCHW: torch.Tensor, num_groups: int, eps: float) -> torch.Tensor:
    return functional.group_norm(images_BCHW, num_groups, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _norm_silu(state: State, name: str, images_BCHW: torch.Tensor, config: UNetConfig) -> torch.Tensor:
    return functional.silu(_group_norm(state, name, images_BCHW, config.norm_num_groups, config.norm_eps))


def _last(state: State, images_BCHW: torch.Tensor, config: UNetConfig) -> torch.Tensor:
    return modules.convolution(state, "conv_out", _norm_silu(state, "conv_norm_out", images_BCHW, config))
