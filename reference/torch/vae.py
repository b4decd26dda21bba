"""AutoencoderKL: images to Gaussian latents an eighth as high and wide, and back, by residual blocks of convolutions.

Parameters are a flat dict with the names of diffusers' checkpoints. An encoder is called with its half of it or with the whole,
and so is a decoder.

Shapes: B batch_size, C channels, H height, W width (both shrink and grow on the way), S places of an image, S = H * W.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import VAEConfig
from gaugeblock.reference.torch import convolutions, modules
from gaugeblock.reference.torch.attention import attention, join_heads, split_heads
from gaugeblock.reference.torch.precision import at_least_float32

NORM_EPS = 1e-6  # of every GroupNorm
SMALLEST_LOGVAR, LARGEST_LOGVAR = -30.0, 20.0

# what older versions of diffusers called the matrices of attention
DEPRECATED_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

State = Mapping[str, torch.Tensor]


def encode(state: State, images: torch.Tensor, *, config: VAEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log variance of the latents of images.

        x = convolution(images);  x = down_block(x), one for each resolution;  x = mid_block(x)
        mean, logvar = halves of quant_conv(convolution(silu(group_norm(x)))),  logvar clamped to [-30, 20]

    Args:
        state: The encoder's parameters by name, shapes as in `encoder_shapes`, dtype of images; those of the decoder may be
            there and are left alone.
        images: [batch_size, in_channels, height, width], floating, usually in [-1, 1].
        config: The model.

    Returns:
        mean, logvar: [batch_size, latent_channels, height // downsampling, width // downsampling] each, dtype as images;
        computed in float32 (float64 for float64 images) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or an image is smaller than one place of its latents.

    Source: Rombach et al. 2021 (arXiv:2112.10752), section 3.1; Esser et al. 2020 (arXiv:2012.09841), table 7; diffusers
    models/autoencoders/vae.py, Encoder and DiagonalGaussianDistribution.
    """
    validation.vae_encode(state, images, config, encoder_shapes(config), decoder_shapes(config))
    state = {name: at_least_float32(state[name]) for name in encoder_shapes(config)}

    hidden_BCHW = modules.convolution(state, "encoder.conv_in", at_least_float32(images))
    for index in range(len(config.block_out_channels)):
        hidden_BCHW = down_block(states.part(state, f"encoder.down_blocks.{index}"), hidden_BCHW, config=config)
    hidden_BCHW = mid_block(states.part(state, "encoder.mid_block"), hidden_BCHW, config=config)
    active_BCHW = norm_silu(state, "encoder.conv_norm_out", hidden_BCHW, config=config)
    moments_BCHW = modules.convolution(state, "encoder.conv_out", active_BCHW)
    if config.use_quant_conv:
        moments_BCHW = modules.convolution(state, "quant_conv", moments_BCHW)
    mean_BCHW, logvar_BCHW = moments_BCHW.chunk(2, dim=1)
    return mean_BCHW.to(images.dtype), logvar_BCHW.clamp(SMALLEST_LOGVAR, LARGEST_LOGVAR).to(images.dtype)


def sample(mean: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return latents drawn from the Gaussians that `encode` gives: mean + exp(logvar / 2) * noise.

    Args:
        mean: [batch_size, latent_channels, height, width], floating.
        logvar: As mean.
        noise: As mean, from the standard normal distribution.

    Returns:
        As mean; computed in float32 (float64 for float64 arguments) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Shapes or devices differ.

    Source: Kingma and Welling 2013 (arXiv:1312.6114), section 2.4.
    """
    validation.vae_sample(mean, logvar, noise)
    deviation_BCHW = torch.exp(at_least_float32(logvar) / 2)
    return (at_least_float32(mean) + deviation_BCHW * at_least_float32(noise)).to(mean.dtype)


def scale_latents(latents: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Return what a diffusion model is given of latents [B, C, H, W]: (latents - shift_factor) * scaling_factor.

    Source: Rombach et al. 2021 (arXiv:2112.10752), section 4.3.2; diffusers pipelines/stable_diffusion_3.
    """
    validation.vae_latents(latents, config)
    return ((at_least_float32(latents) - config.shift_factor) * config.scaling_factor).to(latents.dtype)


def unscale_latents(latents: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Return what the decoder is given of a diffusion model's latents [B, C, H, W]: latents / scaling_factor + shift_factor."""
    validation.vae_latents(latents, config)
    return (at_least_float32(latents) / config.scaling_factor + config.shift_factor).to(latents.dtype)


def decode(state: State, latents: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Return the images of latents.

        x = convolution(post_quant_conv(latents));  x = mid_block(x);  x = up_block(x), one for each resolution
        out = convolution(silu(group_norm(x)))

    Args:
        state: The decoder's parameters by name, shapes as in `decoder_shapes`, dtype of latents; those of the encoder may be
            there and are left alone.
        latents: [batch_size, latent_channels, height, width], floating; not scaled (`unscale_latents`).
        config: The model.

    Returns:
        [batch_size, out_channels, height * downsampling, width * downsampling], dtype as latents, not clamped; computed in
        float32 (float64 for float64 latents) and rounded once.

    Raises: as `encode`.

    Source: as of `encode`; diffusers models/autoencoders/vae.py, Decoder.
    """
    validation.vae_decode(state, latents, config, decoder_shapes(config), encoder_shapes(config))
    state = {name: at_least_float32(state[name]) for name in decoder_shapes(config)}

    hidden_BCHW = at_least_float32(latents)
    if config.use_post_quant_conv:
        hidden_BCHW = modules.convolution(state, "post_quant_conv", hidden_BCHW)
    hidden_BCHW = modules.convolution(state, "decoder.conv_in", hidden_BCHW)
    hidden_BCHW = mid_block(states.part(state, "decoder.mid_block"), hidden_BCHW, config=config)
    for index in range(len(config.block_out_channels)):
        hidden_BCHW = up_block(states.part(state, f"decoder.up_blocks.{index}"), hidden_BCHW, config=config)
    active_BCHW = norm_silu(state, "decoder.conv_norm_out", hidden_BCHW, config=config)
    return modules.convolution(state, "decoder.conv_out", active_BCHW).to(latents.dtype)


def down_block(state: State, images: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Apply the encoder's residual blocks of one resolution to [B, C, H, W], and halve it, rounded down, unless it is the last.

    The convolution that halves has a column and a row of zeros after the last ones, and none before the first.
    """
    for index in range(config.layers_per_block):
        images = resnet_block(states.part(state, f"resnets.{index}"), images, config=config)
    if "downsamplers.0.conv.weight" not in state:
        return images
    padded_BCHW = torch.nn.functional.pad(images, (0, 1, 0, 1))
    return modules.convolution(state, "downsamplers.0.conv", padded_BCHW, stride=2, padding=0)


def up_block(state: State, images: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Apply the decoder's residual blocks of one resolution to [B, C, H, W], and double it, unless it is the last."""
    for index in range(config.layers_per_block + 1):
        images = resnet_block(states.part(state, f"resnets.{index}"), images, config=config)
    if "upsamplers.0.conv.weight" not in state:
        return images
    return modules.convolution(state, "upsamplers.0.conv", convolutions.upsample(images))


def mid_block(state: State, images: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Apply two residual blocks to [B, C, H, W], with attention between them."""
    images = resnet_block(states.part(state, "resnets.0"), images, config=config)
    if config.mid_block_add_attention:
        images = attention_block(states.part(state, "attentions.0"), images, config=config)
    return resnet_block(states.part(state, "resnets.1"), images, config=config)


def resnet_block(state: State, images: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Add two normalized convolutions to [B, C, H, W], which a 1 x 1 convolution brings to as many channels if need be.

    x = shortcut(x) + conv2(silu(group_norm(conv1(silu(group_norm(x))))))
    """
    inner_BCHW = modules.convolution(state, "conv1", norm_silu(state, "norm1", images, config=config))
    branch_BCHW = modules.convolution(state, "conv2", norm_silu(state, "norm2", inner_BCHW, config=config))
    if "conv_shortcut.weight" in state:
        images = modules.convolution(state, "conv_shortcut", images)
    return images + branch_BCHW


def attention_block(state: State, images: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Let each place of [B, C, H, W] attend to all places of its image, with one head, and add what it sees."""
    normalized_BCHW = modules.group_norm(state, "group_norm", images, num_groups=config.norm_num_groups, eps=NORM_EPS)
    tokens_BSC = normalized_BCHW.flatten(2).mT
    query, key, value = (split_heads(modules.linear(state, name, tokens_BSC), 1) for name in ("to_q", "to_k", "to_v"))
    attended_BSC = modules.linear(state, "to_out.0", join_heads(attention(query, key, value)))
    return images + attended_BSC.mT.reshape(images.shape)


def norm_silu(state: State, name: str, images: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Apply the GroupNorm of that name to [B, C, H, W], and silu to its result."""
    return modules.group_norm_silu(state, name, images, num_groups=config.norm_num_groups, eps=NORM_EPS)


def state_shapes(config: VAEConfig) -> states.Shapes:
    """Return the shape of every parameter by name."""
    return encoder_shapes(config) | decoder_shapes(config)


def encoder_shapes(config: VAEConfig) -> states.Shapes:
    """Return the shape of every parameter of the encoder by name."""
    channels, moments = config.block_out_channels, 2 * config.latent_channels
    shapes = states.under("encoder.conv_in", states.convolution_shapes(channels[0], config.in_channels, 3))
    for index, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False)):
        block = f"encoder.down_blocks.{index}"
        for layer in range(config.layers_per_block):
            shapes |= states.under(f"{block}.resnets.{layer}", resnet_shapes(after if layer else before, after))
        if index + 1 < len(channels):
            shapes |= states.under(f"{block}.downsamplers.0.conv", states.convolution_shapes(after, after, 3))
    shapes |= states.under("encoder.mid_block", mid_block_shapes(config))
    shapes |= states.under("encoder.conv_norm_out", states.norm_shapes(channels[-1]))
    shapes |= states.under("encoder.conv_out", states.convolution_shapes(moments, channels[-1], 3))
    if config.use_quant_conv:
        shapes |= states.under("quant_conv", states.convolution_shapes(moments, moments, 1))
    return shapes


def decoder_shapes(config: VAEConfig) -> states.Shapes:
    """Return the shape of every parameter of the decoder by name."""
    channels, latent_channels = config.block_out_channels[::-1], config.latent_channels
    shapes: states.Shapes = {}
    if config.use_post_quant_conv:
        shapes |= states.under("post_quant_conv", states.convolution_shapes(latent_channels, latent_channels, 1))
    shapes |= states.under("decoder.conv_in", states.convolution_shapes(channels[0], latent_channels, 3))
    shapes |= states.under("decoder.mid_block", mid_block_shapes(config))
    for index, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False)):
        block = f"decoder.up_blocks.{index}"
        for layer in range(config.layers_per_block + 1):
            shapes |= states.under(f"{block}.resnets.{layer}", resnet_shapes(after if layer else before, after))
        if index + 1 < len(channels):
            shapes |= states.under(f"{block}.upsamplers.0.conv", states.convolution_shapes(after, after, 3))
    shapes |= states.under("decoder.conv_norm_out", states.norm_shapes(channels[-1]))
    return shapes | states.under("decoder.conv_out", states.convolution_shapes(config.out_channels, channels[-1], 3))


def mid_block_shapes(config: VAEConfig) -> states.Shapes:
    """Return the shape of every parameter of a middle block by its own name."""
    channels = config.block_out_channels[-1]
    shapes = states.under("resnets.0", resnet_shapes(channels, channels))
    if config.mid_block_add_attention:
        shapes |= states.under("attentions.0.group_norm", states.norm_shapes(channels))
        for name in DEPRECATED_NAMES.values():
            shapes |= states.under(f"attentions.0.{name}", states.linear_shapes(channels, channels))
    return shapes | states.under("resnets.1", resnet_shapes(channels, channels))


def resnet_shapes(in_channels: int, out_channels: int) -> states.Shapes:
    """Return the shape of every parameter of a residual block by its own name."""
    shapes = states.under("norm1", states.norm_shapes(in_channels))
    shapes |= states.under("conv1", states.convolution_shapes(out_channels, in_channels, 3))
    shapes |= states.under("norm2", states.norm_shapes(out_channels))
    shapes |= states.under("conv2", states.convolution_shapes(out_channels, out_channels, 3))
    if in_channels != out_channels:
        shapes |= states.under("conv_shortcut", states.convolution_shapes(out_channels, in_channels, 1))
    return shapes


def load_state(state: State, *, config: VAEConfig) -> dict[str, torch.Tensor]:
    """Return a checkpoint of diffusers as `encode` and `decode` take it, also one of an older version with other names.

    Parameters keep their dtype.

    Args:
        state: Floating arrays by name; the matrices of attention may be called `query`, `key`, `value` and `proj_attn`.
        config: The model.

    Raises:
        TypeError: An entry is not a floating array.
        ValueError: An entry is missing, unexpected or of another shape.

    Source: diffusers models/modeling_utils.py, `_fix_state_dict_keys_on_load`.
    """
    state = {current_name(name): entry for name, entry in state.items()}
    validation.state_entries(state, state_shapes(config))
    return {name: state[name] for name in state_shapes(config)}


def current_name(name: str) -> str:
    """Return a parameter's name of today: `attentions.0.to_q.weight` for `attentions.0.query.weight`."""
    for deprecated, current in DEPRECATED_NAMES.items():
        name = name.replace(f".attentions.0.{deprecated}.", f".attentions.0.{current}.")
    return name
