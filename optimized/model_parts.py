"""What a realm brings to the models that are composed of norms, gated activations and torch's products: UNets, VAE, CLIP text.

`unet_composition`, `vae_composition` and `clip_text_composition` have the models, `compiled/model_parts.py` and
`triton/model_parts.py` what these are made of.

Shapes: B batch_size, C channels, H height, W width, S tokens, T tokens that are looked at, D hidden_size, A num_heads, F features
of a head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from gaugeblock.reference.torch.attention import join_heads, split_heads

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Functions with the signatures of those of their names in `gaugeblock.reference.torch`."""

    group_norm: Callable[..., torch.Tensor]
    group_norm_silu: Callable[..., torch.Tensor]
    layer_norm_affine: Callable[..., torch.Tensor]
    geglu: Callable[..., torch.Tensor]
    memory_format: torch.memory_format
    """In which images lie: with the channels last a GPU's convolutions need no transpositions, and pixels are tokens already."""
    block: Callable[[Callable[..., Any]], Callable[..., Any]]
    """What becomes of a block of a model before it is called: it is compiled, or stays as it is."""
    reject: Callable[[str, torch.Tensor], None]
    """Raise TypeError where the tensor of that name has a dtype that these functions do not take."""


def linear(state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Apply the linear layer of that name, with or without a bias, to the last axis."""
    # contiguous, as in reference.torch.layers.linear
    return functional.linear(inputs, state[f"{name}.weight"].contiguous(), state.get(f"{name}.bias"))


def two_linears(state: State, names: tuple[str, str], inputs: torch.Tensor) -> torch.Tensor:
    """Apply two linear layers with a silu between them."""
    return linear(state, names[1], functional.silu(linear(state, names[0], inputs)))


def as_it_is(block: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a block, whose operations run one by one."""
    return block


def affine(state: State, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the norm of that name."""
    return state[f"{name}.weight"], state[f"{name}.bias"]


def attend(
    state: State, names: tuple[str, ...], tokens_BSD: torch.Tensor, seen: torch.Tensor, num_heads: int, **options: Any
) -> torch.Tensor:
    """Let tokens look at others, [B, T, any], with projections of four names; [B, S, D]. torch is given the options."""
    *projections, out = names
    query_BASF, key_BATF, value_BATF = (
        split_heads(linear(state, name, each), num_heads)
        for name, each in zip(projections, (tokens_BSD, seen, seen), strict=True)
    )
    attended_BASF = functional.scaled_dot_product_attention(query_BASF, key_BATF, value_BATF, **options)
    return linear(state, out, join_heads(attended_BASF))
