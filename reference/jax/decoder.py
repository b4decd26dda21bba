"""What SDAR, LLaDA and Dream have in common: pre-norm layers that attend under any mask, at any places.

Parameters have transformers' names (`model.layers.0.self_attn.q_proj.weight`).

Shapes: B batch_size, S tokens of a sequence, N tokens of all sequences, N = B * S, T tokens that are looked at, D hidden_size,
A heads of queries, K heads of keys and values, F features of a head, R = F / 2 pairs of them, L num_hidden_layers, E num_experts.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gaugeblock.reference import states
from gaugeblock.reference.configs import LanguageModelConfig, SDARMoEConfig
from gaugeblock.reference.jax import gated_activations, modules, moe_layers, rotary
from gaugeblock.reference.jax.attention import attention, join_heads, split_heads
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.recomputation import recomputable

State = Mapping[str, jax.Array]
Heads = tuple[jax.Array, jax.Array, jax.Array]


class Decoded(NamedTuple):
    """What the layers make of tokens, in float32 at least."""

    hidden_states: jax.Array
    """[B, S, D], normalized: `lm_head` makes logits of them."""
    keys: jax.Array
    """[L, B, K, S, F], turned by their places."""
    values: jax.Array
    """[L, B, K, S, F]."""
    router_logits: tuple[jax.Array, ...]
    """Of each layer with experts, [N, E]."""


def decode(
    state: State,
    input_ids: jax.Array,
    places: jax.Array,
    mask: jax.Array,
    past: tuple[jax.Array, jax.Array] | None = None,
    *,
    config: LanguageModelConfig,
) -> Decoded:
    """As `gaugeblock.reference.torch.decoder.decode`."""
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    hidden_BSD = state["model.embed_tokens.weight"][input_ids]
    cos_NR, sin_NR = rotary.rotary_table(
        places.flatten()[:, None], features=(config.head_dim,), theta=config.rope_theta, dtype=hidden_BSD.dtype
    )
    all_keys, all_values, all_logits = [], [], []
    for index in range(config.num_hidden_layers):
        own = states.part(state, f"model.layers.{index}")
        seen = None if past is None else (at_least_float32(past[0][index]), at_least_float32(past[1][index]))
        hidden_BSD, key_BKSF, value_BKSF, logits_NE = layer(own, hidden_BSD, cos_NR, sin_NR, mask, seen, config=config)
        all_keys.append(key_BKSF)
        all_values.append(value_BKSF)
        all_logits.append(logits_NE)
    hidden_BSD = modules.rms_norm(state, "model.norm", hidden_BSD, eps=config.rms_norm_eps)
    router_logits = tuple(each for each in all_logits if each is not None)
    return Decoded(hidden_BSD, jnp.stack(all_keys), jnp.stack(all_values), router_logits)


def logits(state: State, decoded: Decoded, num_tokens: int) -> jax.Array:
    """Return the logits of the first tokens of each sequence, [B, num_tokens, vocab_size], in float32 at least."""
    hidden_BSD = decoded.hidden_states[:, :num_tokens]
    return modules.linear({"lm_head.weight": at_least_float32(state["lm_head.weight"])}, "lm_head", hidden_BSD)


@recomputable
def layer(
    state: State,
    hidden_states: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: jax.Array,
    past: tuple[jax.Array, jax.Array] | None,
    *,
    config: LanguageModelConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Apply attention and a gated network, or experts, to [B, S, D]; return it, keys, values, and the logits of experts."""
    hidden_BSD, key_BKSF, value_BKSF = attend(state, hidden_states, cos, sin, mask, past, config=config)
    hidden_BSD, logits_NE = feed_forward(state, hidden_BSD, config=config)
    return hidden_BSD, key_BKSF, value_BKSF, logits_NE


def attend(
    state: State,
    hidden_states: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: jax.Array,
    past: tuple[jax.Array, jax.Array] | None,
    *,
    config: LanguageModelConfig,
) -> Heads:
    """As `gaugeblock.reference.torch.decoder.attend`."""
    normalized_BSD = modules.rms_norm(state, "input_layernorm", hidden_states, eps=config.rms_norm_eps)
    query_BASF, key_BKSF, value_BKSF = heads(states.part(state, "self_attn"), normalized_BSD, cos, sin, config=config)
    key_BKTF = key_BKSF if past is None else jnp.concatenate([past[0], key_BKSF], axis=2)
    value_BKTF = value_BKSF if past is None else jnp.concatenate([past[1], value_BKSF], axis=2)
    # a head of keys serves consecutive heads of queries
    queries_per_key = config.num_attention_heads // config.num_key_value_heads
    key_BATF, value_BATF = (jnp.repeat(each, queries_per_key, axis=1) for each in (key_BKTF, value_BKTF))
    attended_BSD = join_heads(attention(query_BASF, key_BATF, value_BATF, mask=mask[:, None]))
    return hidden_states + modules.linear(state, "self_attn.o_proj", attended_BSD), key_BKSF, value_BKSF


def heads(state: State, tokens: jax.Array, cos: jax.Array, sin: jax.Array, *, config: LanguageModelConfig) -> Heads:
    """As `gaugeblock.reference.torch.decoder.heads`."""
    (batch_size, num_tokens, hidden_size), num_keys = tokens.shape, config.num_key_value_heads
    tokens_1ND = tokens.reshape(1, batch_size * num_tokens, hidden_size)
    query_1ANF = split_heads(modules.linear(state, "q_proj", tokens_1ND), config.num_attention_heads)
    key_1KNF = split_heads(modules.linear(state, "k_proj", tokens_1ND), num_keys)
    if config.has_qk_norm:
        weights_F = state["q_norm.weight"], state["k_norm.weight"]
        query_1ANF, key_1KNF = rotary.qk_norm_rotary(
            query_1ANF, key_1KNF, *weights_F, cos, sin, eps=config.rms_norm_eps, pairs="half-split"
        )
    else:
        query_1ANF, key_1KNF = (rotary.rotate(each, cos, sin, pairs="half-split") for each in (query_1ANF, key_1KNF))
    query_BASF, key_BKSF = (
        each.reshape(each.shape[1], batch_size, num_tokens, config.head_dim).swapaxes(0, 1) for each in (query_1ANF, key_1KNF)
    )
    return query_BASF, key_BKSF, split_heads(modules.linear(state, "v_proj", tokens), num_keys)


def feed_forward(state: State, hidden_states: jax.Array, *, config: LanguageModelConfig) -> tuple[jax.Array, jax.Array | None]:
    """As `gaugeblock.reference.torch.decoder.feed_forward`."""
    normalized_BSD = modules.rms_norm(state, "post_attention_layernorm", hidden_states, eps=config.rms_norm_eps)
    own = states.part(state, "mlp")
    if isinstance(config, SDARMoEConfig):
        batch_size, num_tokens, hidden_size = hidden_states.shape
        tokens_ND = normalized_BSD.reshape(batch_size * num_tokens, hidden_size)
        out_ND, logits_NE, _ = moe_layers.qwen3_moe(
            tokens_ND, own, top_k=config.num_experts_per_tok, renormalize=config.norm_topk_prob
        )
        return hidden_states + out_ND.reshape(hidden_states.shape), logits_NE
    gate_BSI, up_BSI = (modules.linear(own, name, normalized_BSD) for name in ("gate_proj", "up_proj"))
    return hidden_states + modules.linear(own, "down_proj", gated_activations.swiglu(gate_BSI, up_BSI)), None


def places_from(first: int, input_ids: jax.Array) -> jax.Array:
    """Return places of tokens [B, S], the same in each sequence, counted from the first one's: [B, S]."""
    num_tokens = input_ids.shape[1]
    return jnp.broadcast_to(jnp.arange(first, first + num_tokens), input_ids.shape)
