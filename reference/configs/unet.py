"""The UNets of Stable Diffusion, and their published sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

UNetBlock = Literal["CrossAttnDownBlock2D", "DownBlock2D"]


@dataclass(frozen=True)
class UNetConfig:
    """A UNet that is steered by a time and by text; names as in diffusers' configs, whose other options no such model uses.

    Where a public config has one number for all levels, it stands here for each.

    Attributes:
        in_channels: Channels of the latents.
        out_channels: Channels of the result.
        block_out_channels: Channels of each level, of which each has half the height and width of the one before; multiples of
            `norm_num_groups`.
        down_block_types: Of each level, whether its ResNet blocks are followed by transformers; the way up is the mirror image.
        layers_per_block: ResNet blocks of a level on the way down; there is one more on the way up.
        transformer_layers_per_block: Transformer blocks after a ResNet block, for each level; the middle has those of the last.
        attention_head_dim: Number (sic) of attention heads, for each level; divides its channels.
        cross_attention_dim: Width of a token of the text.
        use_linear_projection: Whether the checkpoint has the matrices before and after a transformer as such, not as kernels of
            1 x 1 convolutions.
        norm_num_groups: Groups of every GroupNorm.
        norm_eps: Added to the variance by the GroupNorms of the ResNet blocks and the last one; those before transformers have
            1e-6.
        addition_time_embed_dim: Width of the sinusoidal embedding of each of the additional numbers that steer SDXL; even.
            0 where there are none.
        projection_class_embeddings_input_dim: Width of the pooled text and of the embeddings of all additional numbers together;
            0 where there are none.

    Raises:
        ValueError: Sizes are not positive or do not fit together.

    Source: Rombach et al. 2021 (arXiv:2112.10752), section 3 and appendix E; Podell et al. 2023 (arXiv:2307.01952), table 1;
    diffusers' UNet2DConditionModel.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[UNetBlock, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    addition_time_embed_dim: int = 0
    projection_class_embeddings_input_dim: int = 0

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.block_out_channels:
            raise ValueError("block_out_channels must have an entry for each level, got none")
        for name in ("down_block_types", "transformer_layers_per_block", "attention_head_dim"):
            if len(getattr(self, name)) != self.num_levels:
                raise ValueError(f"{name} must have {self.num_levels} entries, one for each level, got {getattr(self, name)}")
        for each in self.down_block_types:
            if each not in get_args(UNetBlock):
                raise ValueError(f"down_block_types must be {' or '.join(get_args(UNetBlock))}, got {each}")
        for name, divisor in (("block_out_channels", self.norm_num_groups), ("attention_head_dim", 1)):
            for size in getattr(self, name):
                if size < 1 or size % divisor:
                    raise ValueError(f"{name} must be positive multiples of {divisor}, got {getattr(self, name)}")
        for level, num_heads in enumerate(self.attention_head_dim):
            if self.block_out_channels[level] % num_heads:
                raise ValueError(f"attention_head_dim must divide {self.block_out_channels[level]} channels, got {num_heads}")
        if min(self.transformer_layers_per_block) < 1:
            raise ValueError(f"transformer_layers_per_block must be positive, got {self.transformer_layers_per_block}")
        if self.block_out_channels[0] < 4 or self.block_out_channels[0] % 2:
            raise ValueError(f"block_out_channels must begin with an even number from 4 on, got {self.block_out_channels[0]}")
        self._check_added_embeddings()

    def _check_added_embeddings(self) -> None:
        each, together = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if each == together == 0:
            return
        if each < 4 or each % 2:
            raise ValueError(f"addition_time_embed_dim must be even and at least 4, or 0 without added embeddings, got {each}")
        if together < each:
            raise ValueError(f"projection_class_embeddings_input_dim must be at least {each}, got {together}")

    @property
    def num_levels(self) -> int:
        """Resolutions, of which each has half the height and width of the one before."""
        return len(self.block_out_channels)

    @property
    def time_embed_dim(self) -> int:
        """Width of what steers the ResNet blocks."""
        return 4 * self.block_out_channels[0]

    @property
    def gcd_of_heads(self) -> int:
        """Greatest common divisor of the attention heads of all transformers: what divides it can share each of them.

        The middle has those of the last level, whether or not that has transformers of its own.
        """
        at_levels = (heads for level, heads in enumerate(self.attention_head_dim) if self.has_transformers(level))
        return math.gcd(self.attention_head_dim[-1], *at_levels)

    def has_transformers(self, level: int) -> bool:
        """Whether the ResNet blocks of a level are followed by transformers."""
        return self.down_block_types[level] == "CrossAttnDownBlock2D"


_SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=1280 + 6 * 256,  # both sizes, the corner of the crop
)
_SDXL_REFINER = UNetConfig(
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    transformer_layers_per_block=(4, 4, 4, 4),
    attention_head_dim=(6, 12, 24, 24),
    cross_attention_dim=1280,
    use_linear_projection=True,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=1280 + 5 * 256,  # one size, the corner of the crop, an aesthetic score
)
UNET_PRESETS: Mapping[str, UNetConfig] = MappingProxyType(
    {
        "SD-1.5": UNetConfig(),
        "SD-2.1": UNetConfig(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True),
        "SDXL-base": _SDXL,
        "SDXL-refiner": _SDXL_REFINER,
    }
)
