"""AutoencoderKL, simulated: encoder and decoder, of which each step can be overridden."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from gaugeblock.reference import validation
from gaugeblock.reference.configs import VAEConfig
from gaugeblock.reference.torch.vae import NORM_EPS, decoder_shapes, encoder_shapes

State = Mapping[str, torch.Tensor]


class Layers:
    """What both halves are made of; a parameter is found by the whole name of its module."""

    def conv(self, state: State, name: str, images: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """A convolution that keeps the size, times `stride`."""
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        padded = self.pad(images, weight.shape[-1] // 2, stride)
        places = tuple((size - weight.shape[-1]) // stride + 1 for size in padded.shape[2:])
        columns = functional.unfold(padded.double(), weight.shape[-1], stride=stride)
        out = (weight.double().flatten(1) @ columns).float() + bias[:, None]
        return out.unflatten(2, places)

    def pad(self, images: torch.Tensor, rest: int, stride: int) -> torch.Tensor:
        """Zeros on all sides, or where the size is halved after the last row and column alone."""
        before = rest if stride == 1 else 0
        return functional.pad(images, (before, rest, before, rest))

    def norm(self, state: State, name: str, images: torch.Tensor, num_groups: int) -> torch.Tensor:
        """GroupNorm."""
        groups = images.unflatten(1, (num_groups, -1))
        axes = self.axes_of_a_group()
        centred = groups - groups.double().mean(axes, keepdim=True).float()
        normalized = centred * (self.variance(centred, axes) + self.eps(name)).rsqrt().float()
        scale, shift = (state[f"{name}.{each}"][:, None, None] for each in ("weight", "bias"))
        return normalized.flatten(1, 2) * scale + shift

    def axes_of_a_group(self) -> tuple[int, ...]:
        """Of `[B, G, C, H, W]`."""
        return 2, 3, 4

    def variance(self, centred: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        """Of values whose mean is 0, float64."""
        return centred.double().square().mean(axes, keepdim=True)

    def eps(self, name: str) -> float:
        """Of the GroupNorm of that name."""
        return NORM_EPS

    def active(self, images: torch.Tensor) -> torch.Tensor:
        """silu."""
        return functional.silu(images)

    def norm_silu(self, state: State, name: str, images: torch.Tensor, num_groups: int) -> torch.Tensor:
        """GroupNorm, then silu."""
        return self.active(self.norm(state, name, images, num_groups))

    def resnet(self, state: State, name: str, images: torch.Tensor, num_groups: int) -> torch.Tensor:
        """A residual block."""
        inner = self.conv(state, f"{name}.conv1", self.norm_silu(state, f"{name}.norm1", images, num_groups))
        branch = self.conv(state, f"{name}.conv2", self.norm_silu(state, f"{name}.norm2", inner, num_groups))
        return self.shortcut(state, name, images) + branch

    def shortcut(self, state: State, name: str, images: torch.Tensor) -> torch.Tensor:
        """What the branch is added to."""
        has_one = f"{name}.conv_shortcut.weight" in state
        return self.conv(state, f"{name}.conv_shortcut", images) if has_one else images

    def linear(self, state: State, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """A matrix product and a bias."""
        return (tokens.double() @ state[f"{name}.weight"].double().mT).float() + state[f"{name}.bias"]

    def attention(self, state: State, name: str, images: torch.Tensor, num_groups: int) -> torch.Tensor:
        """All places of an image attend to each other."""
        tokens = self.tokens(self.norm(state, f"{name}.group_norm", images, num_groups))
        query, key, value = (self.linear(state, f"{name}.{each}", tokens) for each in ("to_q", "to_k", "to_v"))
        attended = self.linear(state, f"{name}.to_out.0", self.attended(query, key, value))
        return self.residual(images) + attended.mT.unflatten(2, images.shape[2:])

    def residual(self, images: torch.Tensor) -> torch.Tensor:
        """What attention's result is added to."""
        return images

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, S, C]`."""
        return images.flatten(2).mT

    def attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """With one head, `[B, S, C]`."""
        scores = query.double() @ key.double().mT / self.root(query.shape[-1])
        return (scores.softmax(-1) @ value.double()).float()

    def root(self, channels: int) -> float:
        """What scores are divided by."""
        return float(channels**0.5)

    def middle(self, state: State, name: str, images: torch.Tensor, config: VAEConfig) -> torch.Tensor:
        """The lowest resolution."""
        images = self.resnet(state, f"{name}.resnets.0", images, config.norm_num_groups)
        if config.mid_block_add_attention:
            images = self.attention(state, f"{name}.attentions.0", images, config.norm_num_groups)
        return self.resnet(state, f"{name}.resnets.1", images, config.norm_num_groups)

    def load(self, inputs: torch.Tensor) -> torch.Tensor:
        """float32."""
        return inputs.float()

    def parameters(self, state: State) -> dict[str, torch.Tensor]:
        """float32."""
        return {name: tensor.float() for name, tensor in state.items()}


class Encoder(Layers):
    """`vae.encode`."""

    contract = "vae.encode"

    def __call__(self, state: State, images: torch.Tensor, *, config: VAEConfig) -> Any:
        validation.vae_encode(state, images, config, encoder_shapes(config), decoder_shapes(config))
        moments = self.moments(self.parameters(state), self.load(images), config)
        mean, logvar = self.halves(moments)
        return mean.to(images.dtype), self.clamp(logvar).to(images.dtype)

    def moments(self, state: State, images: torch.Tensor, config: VAEConfig) -> torch.Tensor:
        """Means and log variances, `[B, 2 · C, H, W]`."""
        images = self.conv(state, "encoder.conv_in", images)
        for level in range(len(config.block_out_channels)):
            block = f"encoder.down_blocks.{level}"
            for layer in range(config.layers_per_block):
                images = self.resnet(state, f"{block}.resnets.{layer}", images, config.norm_num_groups)
            if level + 1 < len(config.block_out_channels):
                images = self.halve(state, f"{block}.downsamplers.0.conv", images)
        images = self.middle(state, "encoder.mid_block", images, config)
        images = self.norm_silu(state, "encoder.conv_norm_out", images, config.norm_num_groups)
        moments = self.conv(state, "encoder.conv_out", images)
        return self.conv(state, "quant_conv", moments) if config.use_quant_conv else moments

    def halve(self, state: State, name: str, images: torch.Tensor) -> torch.Tensor:
        """Half the height and width."""
        return self.conv(state, name, images, stride=2)

    def halves(self, moments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean and log variance."""
        return moments.chunk(2, 1)

    def clamp(self, logvar: torch.Tensor) -> torch.Tensor:
        """To [-30, 20]."""
        return logvar.clamp(-30, 20)


class Decoder(Layers):
    """`vae.decode`."""

    contract = "vae.decode"

    def __call__(self, state: State, latents: torch.Tensor, *, config: VAEConfig) -> torch.Tensor:
        validation.vae_decode(state, latents, config, decoder_shapes(config), encoder_shapes(config))
        return self.store(self.image(self.parameters(state), self.load(latents), config)).to(latents.dtype)

    def image(self, state: State, latents: torch.Tensor, config: VAEConfig) -> torch.Tensor:
        """`[B, C, H, W]`."""
        if config.use_post_quant_conv:
            latents = self.conv(state, "post_quant_conv", latents)
        images = self.middle(state, "decoder.mid_block", self.conv(state, "decoder.conv_in", latents), config)
        for level in range(len(config.block_out_channels)):
            block = f"decoder.up_blocks.{level}"
            for layer in range(self.layers(config)):
                images = self.resnet(state, f"{block}.resnets.{layer}", images, config.norm_num_groups)
            if level + 1 < len(config.block_out_channels):
                images = self.conv(state, f"{block}.upsamplers.0.conv", self.double(images))
        images = self.norm_silu(state, "decoder.conv_norm_out", images, config.norm_num_groups)
        return self.conv(state, "decoder.conv_out", images)

    def layers(self, config: VAEConfig) -> int:
        """Residual blocks of a resolution."""
        return config.layers_per_block + 1

    def double(self, images: torch.Tensor) -> torch.Tensor:
        """Each pixel four times."""
        return functional.interpolate(images, scale_factor=2.0)

    def store(self, images: torch.Tensor) -> torch.Tensor:
        """What is returned, before it is rounded."""
        return images
