"""The UNets of Stable Diffusion: ResNet blocks on images of several sizes, between them transformers that look at a text.

Parameters are a flat dict with diffusers' names. Shapes: B batch_size, C channels of a level, H height, W width, S pixels of an
image as tokens (S = H * W), T tokens of the text, D cross_attention_dim, E time_embed_dim, N num_time_ids, A num_heads,
F features of a head, or frequencies of an embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import UNetConfig
from gaugeblock.reference.jax import convolutions, layers, modules
from gaugeblock.reference.jax.attention import attention, join_heads, split_heads
from gaugeblock.reference.jax.gated_activations import geglu
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.recomputation import recomputable
from gaugeblock.reference.unet_states import state_shapes

TRANSFORMER_NORM_EPS = 1e-6  # of the GroupNorm before the blocks of a transformer; that of ResNet blocks is the config's
BLOCK_NORM_EPS = 1e-5  # of the LayerNorms in a transformer block


@dataclass(frozen=True)
class Conditioning:
    """What steers the blocks."""

    time: jax.Array
    """[batch_size, time_embed_dim]: of time, and in SDXL of the pooled text and the additional numbers."""
    text: jax.Array
    """[batch_size, text_length, cross_attention_dim]."""
    mask: jax.Array | None
    """[batch_size, text_length], bool, True where there is text to look at; None for everywhere."""


def unet(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    encoder_attention_mask: jax.Array | None = None,
    *,
    config: UNetConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.unet.unet`."""
    validation.unet(state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config, state_shapes(config))
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    latents_BCHW, text_BTD = at_least_float32(latents), at_least_float32(encoder_hidden_states)

    time_BE = embed_times(state, timesteps.astype(latents_BCHW.dtype), config=config)
    conditioning = Conditioning(time_BE, text_BTD, encoder_attention_mask)
    return predict(state, latents_BCHW, conditioning, config=config).astype(latents.dtype)


def unet_text_time(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    text_embeds: jax.Array,
    time_ids: jax.Array,
    encoder_attention_mask: jax.Array | None = None,
    *,
    config: UNetConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.unet.unet_text_time`."""
    validation.unet_text_time(
        state, latents, timesteps, encoder_hidden_states, text_embeds, time_ids, encoder_attention_mask, config,
        state_shapes(config),
    )  # fmt: skip
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    latents_BCHW, text_BTD = at_least_float32(latents), at_least_float32(encoder_hidden_states)

    time_BE = embed_times(state, timesteps.astype(latents_BCHW.dtype), config=config)
    added_BE = embed_added(state, at_least_float32(text_embeds), time_ids.astype(latents_BCHW.dtype), config=config)
    conditioning = Conditioning(time_BE + added_BE, text_BTD, encoder_attention_mask)
    return predict(state, latents_BCHW, conditioning, config=config).astype(latents.dtype)


def embed_times(state: modules.State, timesteps: jax.Array, *, config: UNetConfig) -> jax.Array:
    """Embed times [B], in the dtype of the state, as [B, E]."""
    waves_BF = layers.timestep_embedding(timesteps, embedding_size=config.block_out_channels[0], frequency_shift=0)
    return modules.two_linears(state, ("time_embedding.linear_1", "time_embedding.linear_2"), waves_BF)


def embed_added(state: modules.State, text_embeds: jax.Array, time_ids: jax.Array, *, config: UNetConfig) -> jax.Array:
    """Embed a pooled text [B, text_embed_dim] and numbers [B, N], in the dtype of the state, as [B, E]."""
    batch_size, num_time_ids = time_ids.shape
    size = config.addition_time_embed_dim
    waves_NF = layers.timestep_embedding(time_ids.flatten(), embedding_size=size, frequency_shift=0)
    added_BF = jnp.concatenate([text_embeds, waves_NF.reshape(batch_size, num_time_ids * size)], axis=1)
    return modules.two_linears(state, ("add_embedding.linear_1", "add_embedding.linear_2"), added_BF)


def predict(state: modules.State, latents: jax.Array, conditioning: Conditioning, *, config: UNetConfig) -> jax.Array:
    """Go down and up through the levels with latents [B, in_channels, H, W]; [B, out_channels, H, W], dtype of the state."""
    kept = [modules.convolution(state, "conv_in", latents)]
    for level in range(config.num_levels):
        kept += down_block(states.part(state, f"down_blocks.{level}"), kept[-1], conditioning, level=level, config=config)
    images_BCHW = mid_block(states.part(state, "mid_block"), kept[-1], conditioning, config=config)
    for index, level in enumerate(reversed(range(config.num_levels))):
        kept, skips = kept[: -config.layers_per_block - 1], kept[-config.layers_per_block - 1 :]
        block = states.part(state, f"up_blocks.{index}")
        images_BCHW = up_block(block, images_BCHW, skips, conditioning, level=level, config=config)
        if kept:
            images_BCHW = upsample(block, images_BCHW, like=kept[-1])
    normalized_BCHW = norm_silu(state, "conv_norm_out", images_BCHW, config=config)
    return modules.convolution(state, "conv_out", normalized_BCHW)


def down_block(
    state: modules.State, images: jax.Array, conditioning: Conditioning, *, level: int, config: UNetConfig
) -> list[jax.Array]:
    """Return images after each layer of a level on the way down, and then, but at the last level, with half height and width."""
    kept = []
    for index in range(config.layers_per_block):
        images = layer(state, index, images, conditioning, level=level, config=config)
        kept.append(images)
    if level < config.num_levels - 1:
        kept.append(modules.convolution(state, "downsamplers.0.conv", images, stride=2))
    return kept


def mid_block(state: modules.State, images: jax.Array, conditioning: Conditioning, *, config: UNetConfig) -> jax.Array:
    """Apply a ResNet block, the last level's transformer, and another ResNet block."""
    first, transformers, second = (states.part(state, name) for name in ("resnets.0", "attentions.0", "resnets.1"))
    hidden_BCHW = resnet(first, images, conditioning, config=config)
    hidden_BCHW = transformer(transformers, hidden_BCHW, conditioning, level=config.num_levels - 1, config=config)
    return resnet(second, hidden_BCHW, conditioning, config=config)


def up_block(
    state: modules.State,
    images: jax.Array,
    skips: list[jax.Array],
    conditioning: Conditioning,
    *,
    level: int,
    config: UNetConfig,
) -> jax.Array:
    """Apply the layers of a level on the way up, each to images and to what was kept on the way down, the last of it first."""
    for index, skip in enumerate(reversed(skips)):
        both_BCHW = jnp.concatenate([images, skip], axis=1)
        images = layer(state, index, both_BCHW, conditioning, level=level, config=config)
    return images


def upsample(state: modules.State, images: jax.Array, *, like: jax.Array) -> jax.Array:
    """Double images, cut them to height and width of `like`, and convolve them."""
    doubled_BCHW = convolutions.upsample(images)[:, :, : like.shape[2], : like.shape[3]]
    return modules.convolution(state, "upsamplers.0.conv", doubled_BCHW)


def layer(
    state: modules.State, index: int, images: jax.Array, conditioning: Conditioning, *, level: int, config: UNetConfig
) -> jax.Array:
    """Apply one of a level's ResNet blocks, and the transformer behind it, if the level has any."""
    images = resnet(states.part(state, f"resnets.{index}"), images, conditioning, config=config)
    if not config.has_transformers(level):
        return images
    return transformer(states.part(state, f"attentions.{index}"), images, conditioning, level=level, config=config)


@recomputable
def resnet(state: modules.State, images: jax.Array, conditioning: Conditioning, *, config: UNetConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.unet.resnet`."""
    hidden_BCHW = modules.convolution(state, "conv1", norm_silu(state, "norm1", images, config=config))
    time_BC = modules.linear(state, "time_emb_proj", jax.nn.silu(conditioning.time))
    hidden_BCHW = hidden_BCHW + time_BC[:, :, None, None]
    hidden_BCHW = modules.convolution(state, "conv2", norm_silu(state, "norm2", hidden_BCHW, config=config))
    return hidden_BCHW + (modules.convolution(state, "conv_shortcut", images) if "conv_shortcut.weight" in state else images)


def norm_silu(state: modules.State, name: str, images: jax.Array, *, config: UNetConfig) -> jax.Array:
    """Apply the GroupNorm of that name to [B, C, H, W], with the config's groups and eps, and silu to its result."""
    return modules.group_norm_silu(state, name, images, num_groups=config.norm_num_groups, eps=config.norm_eps)


def transformer(
    state: modules.State, images: jax.Array, conditioning: Conditioning, *, level: int, config: UNetConfig
) -> jax.Array:
    """Let the pixels of images [B, C, H, W] look at each other and at the text, and add the images; [B, C, H, W]."""
    normalized_BCHW = modules.group_norm(state, "norm", images, num_groups=config.norm_num_groups, eps=TRANSFORMER_NORM_EPS)
    tokens_BSC = project(state, "proj_in", normalized_BCHW.reshape(*images.shape[:2], images.shape[2] * images.shape[3]).mT)
    for index in range(config.transformer_layers_per_block[level]):
        block = states.part(state, f"transformer_blocks.{index}")
        tokens_BSC = transformer_block(block, tokens_BSC, conditioning, num_heads=config.attention_head_dim[level])
    return images + project(state, "proj_out", tokens_BSC).mT.reshape(images.shape)


def project(state: modules.State, name: str, tokens: jax.Array) -> jax.Array:
    """Apply the matrix of that name, or the convolution of 1 x 1 pixels, which is one, to tokens [B, S, C]."""
    return layers.linear(tokens, state[f"{name}.weight"].reshape(tokens.shape[-1], tokens.shape[-1]), state[f"{name}.bias"])


@recomputable
def transformer_block(state: modules.State, tokens: jax.Array, conditioning: Conditioning, *, num_heads: int) -> jax.Array:
    """Add to tokens [B, S, C] what they see in each other, then in the text, then what a feed-forward network makes of them."""
    normalized_BSC = modules.layer_norm(state, "norm1", tokens, eps=BLOCK_NORM_EPS)
    tokens_BSC = tokens + attend(states.part(state, "attn1"), normalized_BSC, normalized_BSC, num_heads=num_heads)
    normalized_BSC = modules.layer_norm(state, "norm2", tokens_BSC, eps=BLOCK_NORM_EPS)
    mask = None if conditioning.mask is None else conditioning.mask[:, None, None]
    cross, text_BTD = states.part(state, "attn2"), conditioning.text
    tokens_BSC = tokens_BSC + attend(cross, normalized_BSC, text_BTD, mask=mask, num_heads=num_heads)
    normalized_BSC = modules.layer_norm(state, "norm3", tokens_BSC, eps=BLOCK_NORM_EPS)
    return tokens_BSC + feed_forward(states.part(state, "ff"), normalized_BSC)


def attend(
    state: modules.State, tokens: jax.Array, asked: jax.Array, *, num_heads: int, mask: jax.Array | None = None
) -> jax.Array:
    """Let tokens [B, S, C] look at others [B, T, D], through a mask that broadcasts to [B, A, S, T]; [B, S, C]."""
    query_BASF = split_heads(modules.linear(state, "to_q", tokens), num_heads)
    key_BATF, value_BATF = (split_heads(modules.linear(state, name, asked), num_heads) for name in ("to_k", "to_v"))
    return modules.linear(state, "to_out.0", join_heads(attention(query_BASF, key_BATF, value_BATF, mask=mask)))


def feed_forward(state: modules.State, tokens: jax.Array) -> jax.Array:
    """Apply a network of one hidden layer with exact GEGLU to tokens [B, S, C]: first what is gated, then the gates."""
    up_BSI, gate_BSI = jnp.split(modules.linear(state, "net.0.proj", tokens), 2, axis=-1)
    return modules.linear(state, "net.2", geglu(gate_BSI, up_BSI, approximation="none"))
