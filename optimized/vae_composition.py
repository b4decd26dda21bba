"""AutoencoderKL composed of norms that a realm brings (`model_parts`), beside torch's convolutions and products.

Everything is in the dtype of the inputs and with the channels last: a GPU's convolutions then need no transpositions, and
attention finds the tokens as it wants them. Results of convolutions, products and attention are rounded to that dtype; their
sums, and what is inside of a norm, are float32.

Shapes: as in `reference.torch.vae`.
"""

import torch
from torch.nn import functional

from gaugeblock.optimized.model_parts import Parts, State, affine, attend
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import VAEConfig
from gaugeblock.reference.torch import convolutions, modules
from gaugeblock.reference.torch.vae import LARGEST_LOGVAR, NORM_EPS, SMALLEST_LOGVAR, decoder_shapes, encoder_shapes

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def encode(parts: Parts, state: State, images: torch.Tensor, *, config: VAEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.vae.encode`, of these parts."""
    validation.vae_encode(state, images, config, encoder_shapes(config), decoder_shapes(config))
    parts.reject("images", images)
    return unchecked_encode(parts, state, images, config=config)


def unchecked_encode(parts: Parts, state: State, images: torch.Tensor, *, config: VAEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode`, of a call that is known to be good."""
    hidden_BCHW = modules.convolution(state, "encoder.conv_in", images.contiguous(memory_format=parts.memory_format))
    for index in range(len(config.block_out_channels)):
        block = states.part(state, f"encoder.down_blocks.{index}")
        hidden_BCHW = resnets(parts, block, hidden_BCHW, config.layers_per_block, config)
        if "downsamplers.0.conv.weight" in block:
            padded_BCHW = functional.pad(hidden_BCHW, (0, 1, 0, 1))
            hidden_BCHW = modules.convolution(block, "downsamplers.0.conv", padded_BCHW, stride=2, padding=0)
    hidden_BCHW = mid_block(parts, states.part(state, "encoder.mid_block"), hidden_BCHW, config)
    moments_BCHW = parts.block(last)(parts, states.part(state, "encoder"), hidden_BCHW, config.norm_num_groups)
    if config.use_quant_conv:
        moments_BCHW = modules.convolution(state, "quant_conv", moments_BCHW)
    mean_BCHW, logvar_BCHW = moments_BCHW.contiguous().chunk(2, dim=1)
    return mean_BCHW, logvar_BCHW.clamp(SMALLEST_LOGVAR, LARGEST_LOGVAR)


def decode(parts: Parts, state: State, latents: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """As `gaugeblock.reference.torch.vae.decode`, of these parts."""
    validation.vae_decode(state, latents, config, decoder_shapes(config), encoder_shapes(config))
    parts.reject("latents", latents)
    return unchecked_decode(parts, state, latents, config=config)


def unchecked_decode(parts: Parts, state: State, latents: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
    """As `decode`, of a call that is known to be good."""
    hidden_BCHW = latents.contiguous(memory_format=parts.memory_format)
    if config.use_post_quant_conv:
        hidden_BCHW = modules.convolution(state, "post_quant_conv", hidden_BCHW)
    hidden_BCHW = modules.convolution(state, "decoder.conv_in", hidden_BCHW)
    hidden_BCHW = mid_block(parts, states.part(state, "decoder.mid_block"), hidden_BCHW, config)
    for index in range(len(config.block_out_channels)):
        block = states.part(state, f"decoder.up_blocks.{index}")
        hidden_BCHW = resnets(parts, block, hidden_BCHW, config.layers_per_block + 1, config)
        if "upsamplers.0.conv.weight" in block:
            hidden_BCHW = modules.convolution(block, "upsamplers.0.conv", convolutions.upsample(hidden_BCHW))
    return parts.block(last)(parts, states.part(state, "decoder"), hidden_BCHW, config.norm_num_groups).contiguous()


def resnets(parts: Parts, block: State, images_BCHW: torch.Tensor, count: int, config: VAEConfig) -> torch.Tensor:
    """Apply the residual blocks of one resolution."""
    for index in range(count):
        images_BCHW = parts.block(resnet)(parts, states.part(block, f"resnets.{index}"), images_BCHW, config.norm_num_groups)
    return images_BCHW


def mid_block(parts: Parts, block: State, images_BCHW: torch.Tensor, config: VAEConfig) -> torch.Tensor:
    """Apply two residual blocks, with attention between them."""
    groups = config.norm_num_groups
    images_BCHW = parts.block(resnet)(parts, states.part(block, "resnets.0"), images_BCHW, groups)
    if config.mid_block_add_attention:
        images_BCHW = parts.block(attention)(parts, states.part(block, "attentions.0"), images_BCHW, groups)
    return parts.block(resnet)(parts, states.part(block, "resnets.1"), images_BCHW, groups)


def resnet(parts: Parts, state: State, images_BCHW: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Add two normalized convolutions to images, which a 1 x 1 convolution brings to as many channels if need be."""
    inner_BCHW = modules.convolution(state, "conv1", norm_silu(parts, state, "norm1", images_BCHW, num_groups))
    branch_BCHW = modules.convolution(state, "conv2", norm_silu(parts, state, "norm2", inner_BCHW, num_groups))
    if "conv_shortcut.weight" in state:
        images_BCHW = modules.convolution(state, "conv_shortcut", images_BCHW)
    return images_BCHW + branch_BCHW


def attention(parts: Parts, state: State, images_BCHW: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Let each place attend to all places of its image, with one head, and add what it sees."""
    normalized_BCHW = parts.group_norm(images_BCHW, *affine(state, "group_norm"), num_groups=num_groups, eps=NORM_EPS)
    tokens_BSC = normalized_BCHW.flatten(2).mT
    return images_BCHW + attend(state, PROJECTIONS, tokens_BSC, tokens_BSC, 1).mT.reshape(images_BCHW.shape)


def norm_silu(parts: Parts, state: State, name: str, images_BCHW: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Apply the GroupNorm of that name, and silu to its result."""
    return parts.group_norm_silu(images_BCHW, *affine(state, name), num_groups=num_groups, eps=NORM_EPS)


def last(parts: Parts, state: State, images_BCHW: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the last convolution of a half, of what its blocks have made."""
    return modules.convolution(state, "conv_out", norm_silu(parts, state, "conv_norm_out", images_BCHW, num_groups))
