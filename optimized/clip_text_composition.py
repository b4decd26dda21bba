"""CLIP's text encoder composed of a LayerNorm that a realm brings (`model_parts`), beside torch's products and attention.

Everything is in the dtype of the parameters. Results of products and of attention are rounded to it; sums of products, and what
is inside of a norm, are float32. Without a mask attention is told that it is causal, and a GPU's kernel leaves out what no token
sees. For what is pooled only the tokens that end captions are normalized.

Shapes: as in `reference.torch.clip_text`.
"""

import torch
from torch.nn import functional

from gaugeblock.optimized.model_parts import Parts, State, affine, attend, linear
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import CLIPTextConfig
from gaugeblock.reference.torch.clip_text import (
    PROJECTIONS,
    QUICK_GELU_SLOPE,
    causal_mask,
    embed_tokens,
    eos_places,
    state_shapes,
)

ATTENTION = tuple(f"self_attn.{name}" for name in PROJECTIONS)
LAST_NORM = "text_model.final_layer_norm"


def clip_text(
    parts: Parts, state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, config: CLIPTextConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.clip_text.clip_text`, of these parts."""
    validation.clip_text(state, input_ids, attention_mask, config, state_shapes(config))
    parts.reject("state", state[f"{LAST_NORM}.weight"])
    validation.clip_input_ids_in_range(input_ids, config)
    return unchecked_clip_text(parts, state, input_ids, attention_mask, config=config)


def unchecked_clip_text(
    parts: Parts, state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, config: CLIPTextConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `clip_text`, of a call that is known to be good."""
    input_ids = input_ids.long()
    hidden_BSD = embed_tokens(states.part(state, "text_model.embeddings"), input_ids)
    mask_BAST = None if attention_mask is None else causal_mask(input_ids, attention_mask)
    all_hidden = [hidden_BSD]
    for index in range(config.num_hidden_layers):
        block = states.part(state, f"text_model.encoder.layers.{index}")
        hidden_BSD = parts.block(layer)(parts, block, hidden_BSD, mask_BAST, config)
        all_hidden.append(hidden_BSD)

    ends = torch.arange(len(input_ids), device=input_ids.device), eos_places(input_ids, config=config)
    pooled_BV = norm(parts, state, LAST_NORM, hidden_BSD[ends], config)
    if config.projection_dim is not None:
        pooled_BV = linear(state, "text_projection", pooled_BV)
    returned_BSD = all_hidden[config.returned_layer]
    return norm(parts, state, LAST_NORM, returned_BSD, config) if config.normalize_returned else returned_BSD, pooled_BV


def layer(
    parts: Parts, state: State, hidden_BSD: torch.Tensor, mask_BAST: torch.Tensor | None, config: CLIPTextConfig
) -> torch.Tensor:
    """Return what a layer makes of tokens, [B, S, D]."""
    normalized_BSD = norm(parts, state, "layer_norm1", hidden_BSD, config)
    options = {"attn_mask": mask_BAST, "is_causal": mask_BAST is None}
    hidden_BSD = hidden_BSD + attend(state, ATTENTION, normalized_BSD, normalized_BSD, config.num_attention_heads, **options)
    inner_BSI = linear(state, "mlp.fc1", norm(parts, state, "layer_norm2", hidden_BSD, config))
    is_quick = config.hidden_act == "quick_gelu"
    active_BSI = inner_BSI * torch.sigmoid(QUICK_GELU_SLOPE * inner_BSI) if is_quick else functional.gelu(inner_BSI)
    return hidden_BSD + linear(state, "mlp.fc2", active_BSI)


def norm(parts: Parts, state: State, name: str, hidden_BSD: torch.Tensor, config: CLIPTextConfig) -> torch.Tensor:
    """Return the LayerNorm of that name of [..., D]."""
    return parts.layer_norm_affine(hidden_BSD, *affine(state, name), eps=config.layer_norm_eps)
