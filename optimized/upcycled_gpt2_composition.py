"""The upcycled GPT-2 composed of a LayerNorm and an MoE layer that a realm brings, beside torch's products and attention.

Everything is in the dtype of the parameters but routers and what is inside of experts and norms, which is float32. Results of
products and of attention are rounded to it. Attention is told that it is causal: a GPU's kernel leaves out what no token sees.

Shapes: as in `reference.torch.upcycled_gpt2`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from gaugeblock.optimized.model_parts import Parts, State, affine
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import UpcycledGPT2Config
from gaugeblock.reference.torch.attention import join_heads, split_heads
from gaugeblock.reference.torch.upcycled_gpt2 import TOKENS, Routing, embed_tokens, of_all_layers, routing_of, state_shapes

Layer = Callable[..., tuple[torch.Tensor, ...]]
"""As `gaugeblock.reference.torch.biased_moe_layers.upcycled_gpt2_moe`."""
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def upcycled_gpt2(
    parts: Parts,
    layer: Layer,
    state: State,
    input_ids: torch.Tensor,
    noise: torch.Tensor,
    *,
    training: bool,
    config: UpcycledGPT2Config,
) -> Outputs:
    """As `gaugeblock.reference.torch.upcycled_gpt2.upcycled_gpt2`, of these parts and this layer."""
    validation.upcycled_gpt2(state, input_ids, noise, config, state_shapes(config))
    parts.reject("state", state[TOKENS])
    validation.gpt2_input_ids_in_range(input_ids, config)
    return unchecked_upcycled_gpt2(parts, layer, state, input_ids, noise, training=training, config=config)


def unchecked_upcycled_gpt2(
    parts: Parts,
    layer: Layer,
    state: State,
    input_ids: torch.Tensor,
    noise: torch.Tensor,
    *,
    training: bool,
    config: UpcycledGPT2Config,
) -> Outputs:
    """As `upcycled_gpt2`, of a call that is known to be good."""
    hidden_BSD = embed_tokens(state, input_ids.long())
    noise_BSLE = noise.detach().to(torch.promote_types(hidden_BSD.dtype, torch.float32))
    routings: list[Routing] = []
    for index in range(config.num_hidden_layers):
        own = states.part(state, f"transformer.h.{index}")
        if index in config.moe_layers:
            noise_BSE = noise_BSLE[:, :, len(routings)]
            hidden_BSD, *said = parts.block(moe_block)(parts, layer, own, hidden_BSD, noise_BSE, training, config)
            routings.append(Routing(*said))
        else:
            hidden_BSD = parts.block(dense_block)(parts, own, hidden_BSD, config)
    normalized_BSD = norm(parts, state, "transformer.ln_f", hidden_BSD, config)
    return functional.linear(normalized_BSD, state[TOKENS].contiguous()), *of_all_layers(routings, noise_BSLE)


def dense_block(parts: Parts, state: State, hidden_BSD: torch.Tensor, config: UpcycledGPT2Config) -> torch.Tensor:
    """Return what a block of GPT-2 makes of tokens, [B, S, D]."""
    hidden_BSD = attend(parts, state, hidden_BSD, config)
    inner_BSI = projection(state, "mlp.c_fc", norm(parts, state, "ln_2", hidden_BSD, config))
    return hidden_BSD + projection(state, "mlp.c_proj", functional.gelu(inner_BSI, approximate="tanh"))


def moe_block(
    parts: Parts,
    layer: Layer,
    state: State,
    hidden_BSD: torch.Tensor,
    noise_BSE: torch.Tensor,
    training: bool,
    config: UpcycledGPT2Config,
) -> tuple[torch.Tensor, ...]:
    """Return what a block with experts makes of tokens, [B, S, D], and what its router says (`Routing`)."""
    hidden_BSD = attend(parts, state, hidden_BSD, config)
    tokens, noise = norm(parts, state, "ln_2", hidden_BSD, config).flatten(0, 1), noise_BSE.flatten(0, 1)
    options: dict[str, Any] = {"top_k": config.top_k, "noise_std": 1.0, "training": training}
    out, logits, ids, probs, entropy, _ = layer(tokens, states.part(state, "mlp"), noise, **options)
    routing = routing_of(logits.view(noise_BSE.shape), probs.view(noise_BSE.shape), entropy, ids)
    return hidden_BSD + out.view(hidden_BSD.shape), *routing


def attend(parts: Parts, state: State, hidden_BSD: torch.Tensor, config: UpcycledGPT2Config) -> torch.Tensor:
    """Add attention to tokens, [B, S, D]."""
    thirds = projection(state, "attn.c_attn", norm(parts, state, "ln_1", hidden_BSD, config)).chunk(3, dim=-1)
    query_BASF, key_BASF, value_BASF = (split_heads(each, config.num_attention_heads) for each in thirds)
    attended_BASF = functional.scaled_dot_product_attention(query_BASF, key_BASF, value_BASF, is_causal=True)
    return hidden_BSD + projection(state, "attn.c_proj", join_heads(attended_BASF))


def projection(state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Apply the layer of that name, whose matrix is [in, out], to the last axis."""
    # contiguous, as in reference.torch.layers.linear
    return functional.linear(inputs, state[f"{name}.weight"].contiguous().mT, state[f"{name}.bias"])


def norm(parts: Parts, state: State, name: str, hidden_BSD: torch.Tensor, config: UpcycledGPT2Config) -> torch.Tensor:
    """Return the LayerNorm of that name of [..., D]."""
    return parts.layer_norm_affine(hidden_BSD, *affine(state, name), eps=config.layer_norm_eps)
