"""The UNets composed of norms and GEGLU that a realm brings (`model_parts`), beside torch's convolutions and products.

Everything is in the dtype of the latents. Results of convolutions, products and attention are rounded to that dtype; their sums,
and what is inside of a norm, are float32. What all ResNet blocks do to the embedding of the time is done once.

Shapes: as in `reference.torch.unet`.
"""

import torch
from torch.nn import functional

from gaugeblock.optimized.model_parts import Parts, State, affine, attend, linear, two_linears
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import UNetConfig
from gaugeblock.reference.torch import convolutions, layers, modules
from gaugeblock.reference.torch.unet import BLOCK_NORM_EPS, TRANSFORMER_NORM_EPS, Conditioning
from gaugeblock.reference.unet_states import state_shapes

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def unet(
    parts: Parts,
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    *,
    config: UNetConfig,
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.unet.unet`, of these parts."""
    validation.unet(state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config, state_shapes(config))
    parts.reject("latents", latents)
    return unchecked_unet(parts, state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config=config)


def unchecked_unet(
    parts: Parts,
    state: State,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    *,
    config: UNetConfig,
) -> torch.Tensor:
    """As `unet`, of a call that is known to be good."""
    time_BE = embed(state, "time_embedding", waves(timesteps, config.block_out_channels[0]).to(latents.dtype))
    return predict(parts, state, latents, Conditioning(time_BE, encoder_hidden_states, encoder_attention_mask), config)


def unet_text_time(
    parts: Parts,
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
    """As `gaugeblock.reference.torch.unet.unet_text_time`, of these parts."""
    validation.unet_text_time(
        state, latents, timesteps, encoder_hidden_states, text_embeds, time_ids, encoder_attention_mask, config,
        state_shapes(config),
    )  # fmt: skip
    parts.reject("latents", latents)
    conditions = encoder_hidden_states, text_embeds, time_ids, encoder_attention_mask
    return unchecked_unet_text_time(parts, state, latents, timesteps, *conditions, config=config)


def unchecked_unet_text_time(
    parts: Parts,
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
    """As `unet_text_time`, of a call that is known to be good."""
    time_BE = embed(state, "time_embedding", waves(timesteps, config.block_out_channels[0]).to(latents.dtype))
    batch_size, num_time_ids = time_ids.shape
    size = config.addition_time_embed_dim
    waves_BF = waves(time_ids.flatten(), size).to(latents.dtype).reshape(batch_size, num_time_ids * size)
    added_BE = embed(state, "add_embedding", torch.cat([text_embeds, waves_BF], dim=1))
    return predict(parts, state, latents, Conditioning(time_BE + added_BE, encoder_hidden_states, encoder_attention_mask), config)


def waves(times: torch.Tensor, embedding_size: int) -> torch.Tensor:
    """Return cosines and sines of times, in their dtype, since the angles reach 1000."""
    return layers.timestep_embedding(times, embedding_size=embedding_size, frequency_shift=0)


def embed(state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Apply the two linear layers of an embedding."""
    return two_linears(state, (f"{name}.linear_1", f"{name}.linear_2"), inputs)


def predict(parts: Parts, state: State, latents: torch.Tensor, conditioning: Conditioning, config: UNetConfig) -> torch.Tensor:
    """Go down and up through the levels with latents [B, in_channels, H, W]; [B, out_channels, H, W]."""
    conditioning = Conditioning(functional.silu(conditioning.time), conditioning.text, conditioning.mask)
    kept = [modules.convolution(state, "conv_in", latents.contiguous(memory_format=parts.memory_format))]
    for level in range(config.num_levels):
        block = states.part(state, f"down_blocks.{level}")
        for index in range(config.layers_per_block):
            kept.append(layer(parts, block, index, kept[-1], conditioning, level, config))
        if level < config.num_levels - 1:
            kept.append(modules.convolution(block, "downsamplers.0.conv", kept[-1], stride=2))
    images_BCHW = mid_block(parts, states.part(state, "mid_block"), kept[-1], conditioning, config)
    for place, level in enumerate(reversed(range(config.num_levels))):
        block = states.part(state, f"up_blocks.{place}")
        for index in range(config.layers_per_block + 1):
            both_BCHW = torch.cat([images_BCHW, kept.pop()], dim=1)
            images_BCHW = layer(parts, block, index, both_BCHW, conditioning, level, config)
        if level > 0:
            height, width = kept[-1].shape[2:]
            doubled_BCHW = convolutions.upsample(images_BCHW)[:, :, :height, :width]
            images_BCHW = modules.convolution(block, "upsamplers.0.conv", doubled_BCHW)
    own = {name: state[name] for name in state if name.startswith(("conv_norm_out.", "conv_out."))}
    return parts.block(last)(parts, own, images_BCHW, config).contiguous()


def mid_block(
    parts: Parts, block: State, images_BCHW: torch.Tensor, conditioning: Conditioning, config: UNetConfig
) -> torch.Tensor:
    """Apply a ResNet block, the last level's transformer, and another ResNet block."""
    images_BCHW = parts.block(resnet)(parts, states.part(block, "resnets.0"), images_BCHW, conditioning.time, config)
    images_BCHW = transformer(parts, states.part(block, "attentions.0"), images_BCHW, conditioning, config.num_levels - 1, config)
    return parts.block(resnet)(parts, states.part(block, "resnets.1"), images_BCHW, conditioning.time, config)


def layer(
    parts: Parts,
    block: State,
    index: int,
    images_BCHW: torch.Tensor,
    conditioning: Conditioning,
    level: int,
    config: UNetConfig,
) -> torch.Tensor:
    """Apply one of a level's ResNet blocks, and the transformer behind it, if the level has any."""
    own = states.part(block, f"resnets.{index}")
    images_BCHW = parts.block(resnet)(parts, own, images_BCHW, conditioning.time, config)
    if not config.has_transformers(level):
        return images_BCHW
    return transformer(parts, states.part(block, f"attentions.{index}"), images_BCHW, conditioning, level, config)


def resnet(parts: Parts, state: State, images_BCHW: torch.Tensor, active_BE: torch.Tensor, config: UNetConfig) -> torch.Tensor:
    """Add two convolutions with norms to images, and between them silu of the time."""
    hidden_BCHW = modules.convolution(state, "conv1", norm_silu(parts, state, "norm1", images_BCHW, config))
    hidden_BCHW = hidden_BCHW + linear(state, "time_emb_proj", active_BE)[:, :, None, None]
    hidden_BCHW = modules.convolution(state, "conv2", norm_silu(parts, state, "norm2", hidden_BCHW, config))
    if "conv_shortcut.weight" in state:
        images_BCHW = modules.convolution(state, "conv_shortcut", images_BCHW)
    return images_BCHW + hidden_BCHW


def norm_silu(parts: Parts, state: State, name: str, images_BCHW: torch.Tensor, config: UNetConfig) -> torch.Tensor:
    """Apply the GroupNorm of that name, and silu to its result."""
    return parts.group_norm_silu(images_BCHW, *affine(state, name), num_groups=config.norm_num_groups, eps=config.norm_eps)


def transformer(
    parts: Parts, state: State, images_BCHW: torch.Tensor, conditioning: Conditioning, level: int, config: UNetConfig
) -> torch.Tensor:
    """Let the pixels look at each other and at the text, and add the images."""
    normalized_BCHW = parts.group_norm(
        images_BCHW, *affine(state, "norm"), num_groups=config.norm_num_groups, eps=TRANSFORMER_NORM_EPS
    )
    tokens_BSC = project(state, "proj_in", normalized_BCHW.flatten(2).mT)
    mask = None if conditioning.mask is None else conditioning.mask[:, None, None]
    for index in range(config.transformer_layers_per_block[level]):
        block, num_heads = states.part(state, f"transformer_blocks.{index}"), config.attention_head_dim[level]
        tokens_BSC = parts.block(transformer_block)(parts, block, tokens_BSC, conditioning.text, mask, num_heads)
    return images_BCHW + project(state, "proj_out", tokens_BSC).mT.reshape(images_BCHW.shape)


def project(state: State, name: str, tokens_BSC: torch.Tensor) -> torch.Tensor:
    """Apply the matrix of that name, or the convolution of 1 x 1 pixels, which is one."""
    return functional.linear(tokens_BSC, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])


def transformer_block(
    parts: Parts, state: State, tokens_BSC: torch.Tensor, text_BTD: torch.Tensor, mask: torch.Tensor | None, num_heads: int
) -> torch.Tensor:
    """Add to tokens what they see in each other, then in the text, then what a feed-forward network makes of them."""
    own, cross = (tuple(f"{name}.{each}" for each in PROJECTIONS) for name in ("attn1", "attn2"))
    normalized_BSC = parts.layer_norm_affine(tokens_BSC, *affine(state, "norm1"), eps=BLOCK_NORM_EPS)
    tokens_BSC = tokens_BSC + attend(state, own, normalized_BSC, normalized_BSC, num_heads)
    normalized_BSC = parts.layer_norm_affine(tokens_BSC, *affine(state, "norm2"), eps=BLOCK_NORM_EPS)
    tokens_BSC = tokens_BSC + attend(state, cross, normalized_BSC, text_BTD, num_heads, attn_mask=mask)
    normalized_BSC = parts.layer_norm_affine(tokens_BSC, *affine(state, "norm3"), eps=BLOCK_NORM_EPS)
    up_BSI, gate_BSI = linear(state, "ff.net.0.proj", normalized_BSC).chunk(2, dim=-1)
    return tokens_BSC + linear(state, "ff.net.2", parts.geglu(gate_BSI, up_BSI, approximation="none"))


def last(parts: Parts, state: State, images_BCHW: torch.Tensor, config: UNetConfig) -> torch.Tensor:
    """Return what is predicted, of the images behind the last level."""
    return modules.convolution(state, "conv_out", norm_silu(parts, state, "conv_norm_out", images_BCHW, config))
