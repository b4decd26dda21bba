"""AutoencoderKL of torch's fused operations, in the dtype of its inputs, its blocks compiled or left as they are.

Compiled, it has the channels last: a GPU's convolutions need no transpositions, and attention finds the tokens as it wants
them. What lies between convolutions (GroupNorm, silu, residual sums, the doubling of an image) is fused; a block of one kind is
compiled once for all resolutions. Results of convolutions, products and attention are in the dtype of the inputs; their sums,
and what is inside of a norm, are float32.

Shapes: as in `reference.torch.vae`.
"""

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled.library_layers import Fuse, State, compiled, laid_out, linear, uncompiled
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import VAEConfig
from gaugeblock.reference.torch import convolutions, modules
from gaugeblock.reference.torch.vae import LARGEST_LOGVAR, NORM_EPS, SMALLEST_LOGVAR, decoder_shapes, encoder_shapes


def encode(state: State, images: torch.Tensor, *, config: VAEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log variance of the latents of images.

    Args:
        state: The encoder's parameters by name, shapes as in `reference.torch.vae.encoder_shapes`, dtype of images; those of
            the decoder may be there and are left alone.
        images: [batch_size, in_channels, height, width], floating, usually in [-1, 1].
        config: The model.

    Returns:
        mean, logvar: [batch_size, latent_channels, height // downsampling, width // downsampling] each, dtype as images.
        Differentiable once, by images and state.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or an image is smaller than one place of its latents.

    Source: `gaugeblock.reference.torch.vae.encode`.
    """
    return _encode(compiled, state, images, config)


def encode_by_library(state: State, images: torch.Tensor, *, config: VAEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode`, with nothing compiled: each operation of torch is fused in itself."""
    return _encode(uncompiled, state, images, config)


def _encode(fuse: Fuse, state: State, images: torch.Tensor, config: VAEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    validation.vae_encode(state, images, config, encoder_shapes(config), decoder_shapes(config))
    hidden_BCHW = modules.convolution(state, "encoder.conv_in", laid_out(fuse, images))
    for index in range(len(config.block_out_channels)):
        block = states.part(state, f"encoder.down_blocks.{index}")
        hidden_BCHW = _resnets(fuse, block, hidden_BCHW, config)
        if "downsamplers.0.conv.weight" in block:
            padded_BCHW = functional.pad(hidden_BCHW, (0, 1, 0, 1))
            hidden_BCHW = modules.convolution(block, "downsamplers.0.conv", padded_BCHW, stride=2, padding=0)
    hidden_BCHW = _mid_block(fuse, states.part(state, "encoder.mid_block"), hidden_BCHW, config)
    moments_BCHW = fuse(_last)(states.part(state, "encoder"), hidden_BCHW, config.norm_num_groups)
    if config.use_quant_conv:
        moments_BCHW = modules.convolution(state, "quant_conv", moments_BCHW)
    mean_BCHW, logvar_BCHW = moments_BCHW.contiguous().chunk(2, dim=1)
    return mean_BCHW, logvar_BCHW.clamp(SMALLEST_LOGVAR, LARGEST_LOGVAR)


def decode(state: State, latents: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """Return the images of latents.

    Args:
        state: The decoder's parameters by name, shapes as in `reference.torch.vae.decoder_shapes`, dtype of latents; those of
            the encoder may be there and are left alone.
        latents: [batch_size, latent_channels, height, width], floating; not scaled.
        config: The model.

    Returns:
        [batch_size, out_channels, height * downsampling, width * downsampling], dtype as latents, not clamped. Differentiable
        once, by latents and state.

    Raises: as `encode`.

    Source: `gaugeblock.reference.torch.vae.decode`.
    """
    return _decode(compiled, state, latents, config)


def decode_by_library(state: State, latents: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """As `decode`, with nothing compiled: each operation of torch is fused in itself."""
    return _decode(uncompiled, state, latents, config)


def _decode(fuse: Fuse, state: State, latents: torch.Tensor, config: VAEConfig) -> torch.Tensor:
    validation.vae_decode(state, latents, config, decoder_shapes(config), encoder_shapes(config))
    hidden_BCHW = laid_out(fuse, latents)
    if config.use_post_quant_conv:
        hidden_BCHW = modules.convolution(state, "post_quant_conv", hidden_BCHW)
    hidden_BCHW = modules.convolution(state, "decoder.conv_in", hidden_BCHW)
    hidden_BCHW = _mid_block(fuse, states.part(state, "decoder.mid_block"), hidden_BCHW, config)
    for index in range(len(config.block_out_channels)):
        block = states.part(state, f"decoder.up_blocks.{index}")
        hidden_BCHW = _resnets(fuse, block, hidden_BCHW, config)
        if "upsamplers.0.conv.weight" in block:
            hidden_BCHW = modules.convolution(block, "upsamplers.0.conv", convolutions.upsample(hidden_BCHW))
    return fuse(_last)(states.part(state, "decoder"), hidden_BCHW, config.norm_num_groups).contiguous()


def _resnets(fuse: Fuse, block: State, images_BCHW: torch.Tensor, config: VAEConfig) -> torch.Tensor:
    index = 0
    while f"resnets.{index}.conv1.weight" in block:
        images_BCHW = fuse(_resnet_block)(states.part(block, f"resnets.{index}"), images_BCHW, config.norm_num_groups)
        index += 1
    return images_BCHW


def _mid_block(fuse: Fuse, block: State, images_BCHW: torch.Tensor, config: VAEConfig) -> torch.Tensor:
    images_BCHW = fuse(_resnet_block)(states.part(block, "resnets.0"), images_BCHW, config.norm_num_groups)
    if config.mid_block_add_attention:
        images_BCHW = fuse(_attention_block)(states.part(block, "attentions.0"), images_BCHW, config.norm_num_groups)
    return fuse(_resnet_block)(states.part(block, "resnets.1"), images_BCHW, config.norm_num_groups)


def _resnet_block(state: State, images_BCHW: torch.Tensor, num_groups: int) -> torch.Tensor:
    inner_BCHW = modules.convolution(state, "conv1", _norm_silu(state, "norm1", images_BCHW, num_groups))
    branch_BCHW = modules.convolution(state, "conv2", _norm_silu(state, "norm2", inner_BCHW, num_groups))
    if "conv_shortcut.weight" in state:
        images_BCHW = modules.convolution(state, "conv_shortcut", images_BCHW)
    return images_BCHW + branch_BCHW


def _attention_block(state: State, images_BCHW: torch.Tensor, num_groups: int) -> torch.Tensor:
    tokens_BSC = _norm(state, "group_norm", images_BCHW, num_groups).flatten(2).mT
    query, key, value = (linear(state, name, tokens_BSC)[:, None] for name in ("to_q", "to_k", "to_v"))
    attended_BSC = functional.scaled_dot_product_attention(query, key, value)[:, 0]
    return images_BCHW + linear(state, "to_out.0", attended_BSC).mT.reshape(images_BCHW.shape)


def _last(state: State, images_BCHW: torch.Tensor, num_groups: int) -> torch.Tensor:
    return modules.convolution(state, "conv_out", _norm_silu(state, "conv_norm_out", images_BCHW, num_groups))


def _norm(state: State, name: str, images_BCHW: torch.Tensor, num_groups: int) -> torch.Tensor:
    return functional.group_norm(images_BCHW, num_groups, state[f"{name}.weight"], state[f"{name}.bias"], NORM_EPS)


def _norm_silu(state: State, name: str, images_BCHW: torch.Tensor, num_groups: int) -> torch.Tensor:
    return functional.silu(_norm(state, name, images_BCHW, num_groups))
