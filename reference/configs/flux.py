"""Flux, and its published models."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class FluxConfig:
    """A transformer on packed latents and text, first in two streams and then in one; names as in diffusers' config.

    Attributes:
        patch_size: What the width of a result is multiplied by, squared; of public models 1, since latents are packed before.
        in_channels: Width of a token of the image: 4 times the channels of the latents.
        out_channels: Width of a token of the result, in units of `patch_size` squared; None for `in_channels`.
        num_layers: Blocks with two streams.
        num_single_layers: Blocks with one stream, after them.
        attention_head_dim: Features of an attention head.
        num_attention_heads: Attention heads of a block.
        joint_attention_dim: Width of a token of the text.
        pooled_projection_dim: Width of the text's pooled embedding.
        guidance_embeds: Whether the guidance that the model was distilled for is an input (dev), or fixed (schnell).
        axes_dims_rope: Features of a head that each axis of the tokens' places turns; even, together `attention_head_dim`.

    Raises:
        ValueError: Sizes are not positive or do not fit together.

    Source: diffusers models/transformers/transformer_flux.py, FluxTransformer2DModel; black-forest-labs/flux util.py.
    """

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        for name in (
            "patch_size", "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
            "joint_attention_dim", "pooled_projection_dim",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.out_channels is not None and self.out_channels < 1:
            raise ValueError(f"out_channels must be positive or None, got {self.out_channels}")
        axes = tuple(self.axes_dims_rope)  # of a config file, a list
        object.__setattr__(self, "axes_dims_rope", axes)
        if any(size < 2 or size % 2 for size in axes):
            raise ValueError(f"axes_dims_rope must be even and positive, got {axes}")
        if sum(axes) != self.attention_head_dim:
            raise ValueError(f"axes_dims_rope must add up to attention_head_dim={self.attention_head_dim}, got {axes}")

    @property
    def hidden_size(self) -> int:
        """Width of a token inside the model."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def intermediate_size(self) -> int:
        """Width of a feed-forward network's hidden layer."""
        return 4 * self.hidden_size

    @property
    def out_features(self) -> int:
        """Width of a token of the result."""
        return self.patch_size**2 * (self.in_channels if self.out_channels is None else self.out_channels)


FLUX_PRESETS: Mapping[str, FluxConfig] = MappingProxyType(
    {"FLUX.1-dev": FluxConfig(guidance_embeds=True), "FLUX.1-schnell": FluxConfig()}
)
