"""GPT-2 with MoE layers in place of some of its MLPs, and its sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True)
class UpcycledGPT2Config:
    """A GPT-2; names as in transformers' GPT2Config, by the names that it shares with other configs, but for the last three.

    As they stand, these are the sizes of the small GPT-2, and of moe-emergence's runs on it.

    Attributes:
        vocab_size: Tokens there are.
        hidden_size: Width of a token; a multiple of `num_attention_heads` (`n_embd`).
        intermediate_size: Width of the hidden layer of an MLP, and so of an expert (`n_inner`).
        num_hidden_layers: Blocks (`n_layer`).
        num_attention_heads: Attention heads of a block (`n_head`).
        max_position_embeddings: Tokens that a sequence has at most (`n_positions`).
        layer_norm_eps: Added to the variance by every LayerNorm (`layer_norm_epsilon`).
        moe_layers: Places of the blocks that have an MoE layer, ascending; none of a dense GPT-2.
        num_experts: Of each MoE layer.
        top_k: Experts per token.

    Raises:
        ValueError: Sizes are not positive or do not fit together, or a value is out of its range.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3; sumitdotml/moe-emergence,
    `moe_emergence/gpt2_moe.py`.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    moe_layers: tuple[int, ...] = (8, 9, 10, 11)
    num_experts: int = 8
    top_k: int = 1

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "max_position_embeddings", "num_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size must be a multiple of {self.num_attention_heads}, got {self.hidden_size}")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps must be positive and finite, got {self.layer_norm_eps}")
        if self.moe_layers != tuple(sorted(set(self.moe_layers) & set(range(self.num_hidden_layers)))):
            places = f"a tuple of places in 0..{self.num_hidden_layers - 1} that ascend"
            raise ValueError(f"moe_layers must be {places}, got {self.moe_layers}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be in 1..num_experts={self.num_experts}, got {self.top_k}")


_UPCYCLED = UpcycledGPT2Config()
UPCYCLED_GPT2_PRESETS: Mapping[str, UpcycledGPT2Config] = MappingProxyType(
    {
        "moe-main": _UPCYCLED,
        "top2": replace(_UPCYCLED, top_k=2),
        "dense": replace(_UPCYCLED, moe_layers=()),
    }
)
