"""CLIP's text encoder, and its published sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

from gaugeblock.reference.configs.options import ClipActivation

LEGACY_EOS_TOKEN_ID = 2


@dataclass(frozen=True)
class CLIPTextConfig:
    """A causal transformer on the tokens of a caption; names as in transformers' CLIPTextConfig, but for the last two.

    As they stand, these are the sizes of CLIP ViT-L/14, the text encoder of Stable Diffusion 1.

    Attributes:
        vocab_size: Tokens there are.
        hidden_size: Width of a token; a multiple of `num_attention_heads`.
        intermediate_size: Width of a layer's hidden layer.
        num_hidden_layers: Layers.
        num_attention_heads: Attention heads of a layer.
        max_position_embeddings: Tokens that a caption has at most.
        hidden_act: "quick_gelu" is x * sigmoid(1.702 x), of OpenAI's models; "gelu" the exact one, of OpenCLIP's.
        layer_norm_eps: Added to the variance by every LayerNorm.
        eos_token_id: The token that ends a caption, at whose first place the result is pooled. 2, which old configurations
            have, stands for the highest id of each caption.
        projection_dim: Width of the pooled result, by a projection without bias; None for no projection. (In transformers the
            class says whether there is one: CLIPTextModel ignores this field, CLIPTextModelWithProjection does not.)
        returned_layer: Which hidden states are returned: 0 for the embeddings, n for the result of the n-th layer, or counted
            from the last as -1, -2. Stable Diffusion XL takes -2. What is pooled is always of the last layer.
        normalize_returned: Whether the final LayerNorm is applied to the hidden states that are returned, as Stable Diffusion 1
            and 2 do, and XL does not. What is pooled is always normalized.

    Raises:
        ValueError: Sizes are not positive or do not fit together, or a value is out of its range.

    Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4; the configurations of the checkpoints' `text_encoder`.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: ClipActivation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = LEGACY_EOS_TOKEN_ID
    projection_dim: int | None = None
    returned_layer: int = -1
    normalize_returned: bool = True

    def __post_init__(self) -> None:
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*positive, "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size must be a multiple of {self.num_attention_heads}, got {self.hidden_size}")
        if self.hidden_act not in get_args(ClipActivation):
            raise ValueError(f"hidden_act must be {' or '.join(map(repr, get_args(ClipActivation)))}, got {self.hidden_act!r}")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps must be positive and finite, got {self.layer_norm_eps}")
        if self.eos_token_id != LEGACY_EOS_TOKEN_ID and not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(f"eos_token_id must be in 0..{self.vocab_size - 1}, got {self.eos_token_id}")
        if self.projection_dim is not None and self.projection_dim < 1:
            raise ValueError(f"projection_dim must be positive or None, got {self.projection_dim}")
        if not -self.num_hidden_layers - 1 <= self.returned_layer <= self.num_hidden_layers:
            last = self.num_hidden_layers
            raise ValueError(f"returned_layer must be in {-last - 1}..{last}, got {self.returned_layer}")

    @property
    def pooled_size(self) -> int:
        """Width of the pooled result."""
        return self.hidden_size if self.projection_dim is None else self.projection_dim


CLIP_TEXT_PRESETS: Mapping[str, CLIPTextConfig] = MappingProxyType(
    {
        "clip-l": CLIPTextConfig(),  # of Stable Diffusion 1; Stable Diffusion XL returns its layer -2, not normalized
        # of Stable Diffusion 2: OpenCLIP ViT-H/14 without the last of its 24 layers, and the final LayerNorm after the 23rd
        "openclip-h": CLIPTextConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
        ),
        # of Stable Diffusion XL, its second one
        "openclip-bigg": CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
            returned_layer=-2,
            normalize_returned=False,
        ),
    }
)
