"""Masked and block diffusion language models, and their published sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, TypeAlias


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What the language models have in common: pre-norm layers of grouped-query attention and gated networks, an untied head.

    Names are those of transformers' configurations.

    Attributes:
        vocab_size: Tokens there are.
        hidden_size: Width of a token.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of queries; a multiple of `num_key_value_heads`.
        num_key_value_heads: Heads of keys and values; each serves as many consecutive heads of queries.
        head_dim: Features of a head, even; heads together may be wider than a token.
        rms_norm_eps: Added to the mean square by every RMSNorm.
        rope_theta: Of the longest wave of the rotary embedding.
        mask_token_id: The token that stands where one is to be decoded; to the model it is a token like others.

    Raises:
        ValueError: Sizes are not positive or do not fit together, or a value is out of its range.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mask_token_id: int

    has_qk_norm: ClassVar[bool] = False
    """Whether each head of queries and keys is normalized before it is turned."""
    has_qkv_bias: ClassVar[bool] = False
    """Whether the projections to queries, keys and values have a bias."""

    def __post_init__(self) -> None:
        for name in self.positive():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_key_value_heads}, got {self.num_attention_heads}"
            raise ValueError(f"num_attention_heads must be a multiple of {heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id must be in 0..{self.vocab_size - 1}, got {self.mask_token_id}")

    def positive(self) -> tuple[str, ...]:
        """The sizes that must be positive."""
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
        return "vocab_size", "hidden_size", "num_hidden_layers", *heads


@dataclass(frozen=True, kw_only=True)
class DenseDecoderConfig(DecoderConfig):
    """A `DecoderConfig` whose feed-forward networks are dense.

    Attributes:
        intermediate_size: Width of a layer's hidden layer.
    """

    intermediate_size: int

    def positive(self) -> tuple[str, ...]:
        """The sizes that must be positive."""
        return *super().positive(), "intermediate_size"


@dataclass(frozen=True, kw_only=True)
class SDARConfig(DenseDecoderConfig):
    """SDAR: Qwen3's layers, tokens of a block seeing each other and all blocks before.

    Attributes:
        block_length: Tokens of a block.

    Source: Cheng et al. 2025 (arXiv:2510.06303).
    """

    block_length: int

    has_qk_norm: ClassVar[bool] = True

    def positive(self) -> tuple[str, ...]:
        """The sizes that must be positive."""
        return *super().positive(), "block_length"


@dataclass(frozen=True, kw_only=True)
class SDARMoEConfig(DecoderConfig):
    """SDAR with MoE layers: those of Qwen3-MoE.

    Attributes:
        block_length: Tokens of a block.
        num_experts: Experts of a layer.
        num_experts_per_tok: Experts that a token passes, 1 to num_experts.
        moe_intermediate_size: Width of an expert's hidden layer.
        norm_topk_prob: Whether the probabilities of the chosen experts are divided by their sum.

    Source: Cheng et al. 2025 (arXiv:2510.06303); transformers models/qwen3_moe.
    """

    block_length: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True

    has_qk_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok must be in 1..{self.num_experts}, got {self.num_experts_per_tok}")

    def positive(self) -> tuple[str, ...]:
        """The sizes that must be positive."""
        return *super().positive(), "block_length", "num_experts", "moe_intermediate_size"


@dataclass(frozen=True, kw_only=True)
class LLaDAConfig(DenseDecoderConfig):
    """LLaDA: Llama's layers, all tokens seeing each other.

    Source: Nie et al. 2025 (arXiv:2502.09992).
    """


@dataclass(frozen=True, kw_only=True)
class DreamConfig(DenseDecoderConfig):
    """Dream: Qwen2.5's layers, all tokens seeing each other; each token's logits are given by the token before it.

    Source: Ye et al. 2025 (arXiv:2508.15487).
    """

    has_qkv_bias: ClassVar[bool] = True


LanguageModelConfig: TypeAlias = SDARConfig | SDARMoEConfig | LLaDAConfig | DreamConfig

SDAR_PRESETS: Mapping[str, SDARConfig] = MappingProxyType(
    {
        "SDAR-8B": SDARConfig(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mask_token_id=151669,
            block_length=4,
        )
    }
)
SDAR_MOE_PRESETS: Mapping[str, SDARMoEConfig] = MappingProxyType(
    {
        "SDAR-30B-A3B": SDARMoEConfig(
            vocab_size=151936,
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mask_token_id=151669,
            block_length=4,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        )
    }
)
LLADA_PRESETS: Mapping[str, LLaDAConfig] = MappingProxyType(
    {
        "LLaDA-8B": LLaDAConfig(
            vocab_size=126464,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=5e5,
            mask_token_id=126336,
        )
    }
)
DREAM_PRESETS: Mapping[str, DreamConfig] = MappingProxyType(
    {
        "Dream-7B": DreamConfig(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mask_token_id=151666,
        )
    }
)
