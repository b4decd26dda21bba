"""CLIP's text encoder: a transformer whose tokens look back, never ahead, pooled at the token that ends the caption.

Parameters are a flat dict with the names of public checkpoints (`text_model.encoder.layers.0.self_attn.q_proj.weight`).

Shapes: B batch_size, S tokens of a caption, D hidden_size, A num_heads, F features of a head, V pooled_size.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import LEGACY_EOS_TOKEN_ID, CLIPTextConfig
from gaugeblock.reference.jax import gated_activations, modules
from gaugeblock.reference.jax.attention import attention, join_heads, split_heads
from gaugeblock.reference.jax.precision import at_least_float32

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
QUICK_GELU_SLOPE = 1.702
POSITION_IDS = "text_model.embeddings.position_ids"  # 0, 1, 2, ..., which old checkpoints hold

State = Mapping[str, jax.Array]


def clip_text(
    state: State, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, config: CLIPTextConfig
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.clip_text.clip_text`."""
    validation.clip_text(state, input_ids, attention_mask, config, state_shapes(config))
    validation.clip_input_ids_in_range(input_ids, config)
    dtype = state["text_model.final_layer_norm.weight"].dtype
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}

    hidden_BSD = embed_tokens(states.part(state, "text_model.embeddings"), input_ids)
    mask_BAST = causal_mask(input_ids, attention_mask)
    all_hidden = [hidden_BSD]
    for index in range(config.num_hidden_layers):
        hidden_BSD = layer(states.part(state, f"text_model.encoder.layers.{index}"), hidden_BSD, mask_BAST, config=config)
        all_hidden.append(hidden_BSD)

    normalized_BSD = modules.layer_norm(state, "text_model.final_layer_norm", hidden_BSD, eps=config.layer_norm_eps)
    pooled_BV = normalized_BSD[jnp.arange(len(input_ids)), eos_places(input_ids, config=config)]
    if config.projection_dim is not None:
        pooled_BV = modules.linear(state, "text_projection", pooled_BV)
    returned_BSD = all_hidden[config.returned_layer]
    if config.normalize_returned:
        returned_BSD = modules.layer_norm(state, "text_model.final_layer_norm", returned_BSD, eps=config.layer_norm_eps)
    return returned_BSD.astype(dtype), pooled_BV.astype(dtype)


def embed_tokens(state: State, input_ids: jax.Array) -> jax.Array:
    """Embed token ids [B, S] and their places, [B, S, D]."""
    return state["token_embedding.weight"][input_ids] + state["position_embedding.weight"][: input_ids.shape[1]]


def causal_mask(input_ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """Return where a token [B, S] may look, [B or 1, 1, S, S] bool: not ahead, and at no padding."""
    place_S = jnp.arange(input_ids.shape[1])
    mask_BAST = (place_S[None, :] <= place_S[:, None])[None, None]
    return mask_BAST if attention_mask is None else mask_BAST & attention_mask[:, None, None, :]


def layer(state: State, hidden_states: jax.Array, mask: jax.Array, *, config: CLIPTextConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.clip_text.layer`."""
    normalized_BSD = modules.layer_norm(state, "layer_norm1", hidden_states, eps=config.layer_norm_eps)
    query, key, value = (
        split_heads(modules.linear(state, f"self_attn.{name}", normalized_BSD), config.num_attention_heads)
        for name in PROJECTIONS[:3]
    )
    attended_BSD = join_heads(attention(query, key, value, mask=mask))
    hidden_states = hidden_states + modules.linear(state, "self_attn.out_proj", attended_BSD)
    normalized_BSD = modules.layer_norm(state, "layer_norm2", hidden_states, eps=config.layer_norm_eps)
    inner_BSI = activation(modules.linear(state, "mlp.fc1", normalized_BSD), config=config)
    return hidden_states + modules.linear(state, "mlp.fc2", inner_BSI)


def activation(x: jax.Array, *, config: CLIPTextConfig) -> jax.Array:
    """Return x * sigmoid(1.702 x), or the exact GELU, as `hidden_act` says."""
    return x * jax.nn.sigmoid(QUICK_GELU_SLOPE * x) if config.hidden_act == "quick_gelu" else gated_activations.gelu(x)


def eos_places(input_ids: jax.Array, *, config: CLIPTextConfig) -> jax.Array:
    """Return the place [B] of the first token of each caption [B, S] that ends it, or of the first of the highest id."""
    is_legacy = config.eos_token_id == LEGACY_EOS_TOKEN_ID
    return jnp.argmax(input_ids, axis=1) if is_legacy else jnp.argmax(input_ids == config.eos_token_id, axis=1)


def state_shapes(config: CLIPTextConfig) -> states.Shapes:
    """Return the shape of every parameter by name."""
    hidden_size = config.hidden_size
    shapes: states.Shapes = {
        "text_model.embeddings.token_embedding.weight": (config.vocab_size, hidden_size),
        "text_model.embeddings.position_embedding.weight": (config.max_position_embeddings, hidden_size),
    }
    for index in range(config.num_hidden_layers):
        shapes |= states.under(f"text_model.encoder.layers.{index}", layer_shapes(config))
    shapes |= states.under("text_model.final_layer_norm", states.norm_shapes(hidden_size))
    if config.projection_dim is not None:
        shapes |= states.under("text_projection", states.linear_shapes(config.projection_dim, hidden_size, bias=False))
    return shapes


def layer_shapes(config: CLIPTextConfig) -> states.Shapes:
    """Return the shape of every parameter of one layer by its own name."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    shapes = states.under("layer_norm1", states.norm_shapes(hidden_size))
    for name in PROJECTIONS:
        shapes |= states.under(f"self_attn.{name}", states.linear_shapes(hidden_size, hidden_size))
    shapes |= states.under("layer_norm2", states.norm_shapes(hidden_size))
    shapes |= states.under("mlp.fc1", states.linear_shapes(intermediate_size, hidden_size))
    return shapes | states.under("mlp.fc2", states.linear_shapes(hidden_size, intermediate_size))


def load_state(state: State, *, config: CLIPTextConfig) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.clip_text.load_state`."""
    state = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": entry
        for name, entry in state.items()
    }
    if POSITION_IDS in state:
        check_position_ids(state.pop(POSITION_IDS), config=config)
    validation.state_entries(state, state_shapes(config))
    return {name: state[name] for name in state_shapes(config)}


def check_position_ids(position_ids: jax.Array, *, config: CLIPTextConfig) -> None:
    """Raise ValueError unless a checkpoint's ids of places [1, S] are 0, 1, 2, ...; those of merged checkpoints may not be."""
    validation.clip_position_ids(position_ids, config.max_position_embeddings)
    if position_ids[0].tolist() != [*range(config.max_position_embeddings)]:
        raise ValueError(f"state must have {POSITION_IDS} 0, 1, 2, ... or none, got other values")
