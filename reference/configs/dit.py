"""DiT, and its published sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer with adaLN-Zero blocks; names as in the code that came with the paper.

    Attributes:
        input_size: Height and width of the latents; a multiple of `patch_size`.
        patch_size: Height and width of a patch, which becomes one token.
        in_channels: Channels of the latents.
        hidden_size: Width of a token; a multiple of `num_heads`, and of 4 for the position embedding.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_ratio: Width of a block's hidden layer, in units of `hidden_size`.
        num_classes: Classes; the embedding table has one row more, for the label that was dropped.
        learn_sigma: Whether the variance is predicted too, which doubles the output channels.
        norm_eps: Added to the variance by the second LayerNorm of a block (diffusers: 1e-5); the first one and the final one
            have 1e-6.
        frequency_embedding_size: Width of the sinusoidal timestep embedding; even.
        frequency_shift: The lowest frequency is 1 / 10000 ** ((n - 1) / (n - frequency_shift)) with n of them; the paper's
            code has 0, diffusers 1.

    Raises:
        ValueError: Sizes are not positive or do not fit together.

    Source: Peebles and Xie 2022 (arXiv:2212.09748), section 3 and table 1; facebookresearch/DiT models.py.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    norm_eps: float = 1e-6
    frequency_embedding_size: int = 256
    frequency_shift: int = 0

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name, divisor in (("input_size", self.patch_size), ("hidden_size", self.num_heads), ("hidden_size", 4)):
            if getattr(self, name) % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {getattr(self, name)}")
        if self.frequency_embedding_size < 4 or self.frequency_embedding_size % 2:
            raise ValueError(f"frequency_embedding_size must be even and at least 4, got {self.frequency_embedding_size}")
        if self.frequency_shift not in (0, 1):
            raise ValueError(f"frequency_shift must be 0 or 1, got {self.frequency_shift}")

    @property
    def out_channels(self) -> int:
        """Channels of the result."""
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def intermediate_size(self) -> int:
        """Width of a block's hidden layer."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def num_patches(self) -> int:
        """Tokens of one image."""
        return (self.input_size // self.patch_size) ** 2


def _dit(hidden_size: int, depth: int, num_heads: int, patch_size: int) -> DiTConfig:
    return DiTConfig(hidden_size=hidden_size, depth=depth, num_heads=num_heads, patch_size=patch_size)


_DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
DIT_PRESETS: Mapping[str, DiTConfig] = MappingProxyType(
    {f"DiT-{name}/{patch}": _dit(*sizes, patch) for name, sizes in _DIT_SIZES.items() for patch in (2, 4, 8)}
)
