"""CLIP's text encoder of torch's fused operations, in the dtype of its parameters, its layer compiled or left as it is.

One compilation serves all layers, so that its time does not grow with the depth; everything between the matrix products
and `scaled_dot_product_attention` is fused. Results of products and of attention are in the dtype of the parameters; sums of
products, and what is inside of a norm, are float32. Without a mask attention is told that it is causal, and a GPU's kernel
leaves out what no token sees.

Shapes: as in `reference.torch.clip_text`.
"""

from functools import partial

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled.library_layers import Fuse, State, compiled, layer_norm, linear, uncompiled
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import CLIPTextConfig
from gaugeblock.reference.torch.attention import join_heads, split_heads
from gaugeblock.reference.torch.clip_text import (
    PROJECTIONS,
    QUICK_GELU_SLOPE,
    causal_mask,
    embed_tokens,
    eos_places,
    state_shapes,
)


def clip_text(
    state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, config: CLIPTextConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode captions as hidden states of each token, and as one vector each.

    Args:
        state: The parameters by name, shapes as in `reference.torch.clip_text.state_shapes`, all of one floating dtype.
        input_ids: [batch_size, num_tokens], int32 or int64 in 0 .. vocab_size - 1.
        attention_mask: [batch_size, num_tokens], bool, True for what is no padding; all by default.
        config: The model.

    Returns:
        hidden_states: [batch_size, num_tokens, hidden_size], dtype of the state.
        pooled: [batch_size, pooled_size], dtype of the state. Both are differentiable once, by the state.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; an id names no token, or a caption does not end.

    Source: `gaugeblock.reference.torch.clip_text.clip_text`.
    """
    return _encode(compiled, state, input_ids, attention_mask, config)


def clip_text_by_library(
    state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, config: CLIPTextConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `clip_text`, with nothing compiled: each operation of torch is fused in itself."""
    return _encode(uncompiled, state, input_ids, attention_mask, config)


def _encode(
    fuse: Fuse, state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: CLIPTextConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    validation.clip_text(state, input_ids, attention_mask, config, state_shapes(config))
    validation.clip_input_ids_in_range(input_ids, config)
    input_ids = input_ids.long()
    hidden_BSD = embed_tokens(states.part(state, "text_model.embeddings"), input_ids)
    mask_BAST = None if attention_mask is None else causal_mask(input_ids, attention_mask)
    all_hidden = [hidden_BSD]
    for block in states.parts(state, "text_model.encoder.layers", config.num_hidden_layers):
        hidden_BSD = fuse(layer)(block, hidden_BSD, mask_BAST, config)
        all_hidden.append(hidden_BSD)

    last_norm = partial(layer_norm, state, "text_model.final_layer_norm", eps=config.layer_norm_eps)
    ends = torch.arange(len(input_ids), device=input_ids.device), eos_places(input_ids, config=config)
    pooled_BV = last_norm(hidden_BSD[ends])
    if config.projection_dim is not None:
        pooled_BV = linear(state, "text_projection", pooled_BV)
    returned_BSD = all_hidden[config.returned_layer]
    return last_norm(returned_BSD) if config.normalize_returned else returned_BSD, pooled_BV


def layer(state: State, hidden_BSD: torch.Tensor, mask_BAST: torch.Tensor | None, config: CLIPTextConfig) -> torch.Tensor:
    """Return what a layer makes of tokens, [B, S, D]."""
    normalized_BSD = layer_norm(state, "layer_norm1", hidden_BSD, eps=config.layer_norm_eps)
    hidden_BSD = hidden_BSD + attention(state, normalized_BSD, mask_BAST, config)
    normalized_BSD = layer_norm(state, "layer_norm2", hidden_BSD, eps=config.layer_norm_eps)
    return hidden_BSD + mlp(state, normalized_BSD, config)


def attention(state: State, normalized_BSD: torch.Tensor, mask_BAST: torch.Tensor | None, config: CLIPTextConfig) -> torch.Tensor:
    """Return the attention branch of a layer, [B, S, D]."""
    query_BASF, key_BASF, value_BASF = (
        split_heads(linear(state, f"self_attn.{name}", normalized_BSD), config.num_attention_heads) for name in PROJECTIONS[:3]
    )
    attended_BASF = functional.scaled_dot_product_attention(
        query_BASF, key_BASF, value_BASF, attn_mask=mask_BAST, is_causal=mask_BAST is None
    )
    return linear(state, "self_attn.out_proj", join_heads(attended_BASF))


def mlp(state: State, normalized_BSD: torch.Tensor, config: CLIPTextConfig) -> torch.Tensor:
    """Return the feed-forward branch of a layer, [B, S, D]."""
    inner_BSI = linear(state, "mlp.fc1", normalized_BSD)
    is_quick = config.hidden_act == "quick_gelu"
    active_BSI = inner_BSI * torch.sigmoid(QUICK_GELU_SLOPE * inner_BSI) if is_quick else functional.gelu(inner_BSI)
    return linear(state, "mlp.fc2", active_BSI)
