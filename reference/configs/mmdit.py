"""MMDiT, the transformer of Stable Diffusion 3, and its published sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

from gaugeblock.reference.configs.options import QkNorm


@dataclass(frozen=True)
class MMDiTConfig:
    """A diffusion transformer on the tokens of an image and of a text; names and defaults as in diffusers.

    Attributes:
        sample_size: Height and width of the latents that it was made for; others are taken too.
        patch_size: Height and width of a patch, which becomes one token.
        in_channels: Channels of the latents.
        num_layers: Number of blocks; of the last one, what becomes of the text is not used.
        attention_head_dim: Features of an attention head.
        num_attention_heads: Attention heads of a block.
        joint_attention_dim: Width of a token of the text.
        caption_projection_dim: Width to which the tokens of the text are brought, that of the image's tokens (`hidden_size`).
        pooled_projection_dim: Width of the vector that stands for the whole text.
        out_channels: Channels of the result.
        pos_embed_max_size: Rows and columns of the table of positions, of which latents are given the middle; in patches.
        dual_attention_layers: Blocks in which the image's tokens attend to themselves once more.
        qk_norm: "rms_norm" if each head of queries and keys is normalized, None if not.

    Raises:
        ValueError: Sizes are not positive or do not fit together, or an option is unknown.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 4; diffusers SD3Transformer2DModel.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: QkNorm | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dual_attention_layers", tuple(self.dual_attention_layers))  # JSON has lists
        for name in (
            "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
            "joint_attention_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.caption_projection_dim != self.hidden_size:
            raise ValueError(
                f"caption_projection_dim must be num_attention_heads * attention_head_dim = {self.hidden_size}, "
                f"got {self.caption_projection_dim}"
            )
        if not all(0 <= layer < self.num_layers for layer in self.dual_attention_layers):
            raise ValueError(f"dual_attention_layers must be in 0..{self.num_layers - 1}, got {self.dual_attention_layers}")
        if self.qk_norm not in (None, *get_args(QkNorm)):
            raise ValueError(f"qk_norm must be None or {' or '.join(map(repr, get_args(QkNorm)))}, got {self.qk_norm!r}")

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim


MMDIT_PRESETS: Mapping[str, MMDiTConfig] = MappingProxyType(
    {
        "sd3-medium": MMDiTConfig(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        ),
        "sd3.5-large": MMDiTConfig(
            num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
        ),
        "sd3.5-medium": MMDiTConfig(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
    }
)  # fmt: skip
