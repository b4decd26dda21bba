"""GPT-2 whose MLPs in some blocks are MoE layers, which began as copies of these MLPs.

Parameters are a flat dict with the names of public checkpoints (`transformer.h.0.attn.c_attn.weight`), but for the experts, which
are stacked (`transformer.h.8.mlp.experts.c_fc.weight`, `upcycled_checkpoints`), and the head, which is the table of tokens. As
there, matrices are [in, out]. Dropout, which the public model has in training, is left out.

Shapes: B batch_size, S tokens of a sequence, D hidden_size, A num_heads, F features of a head, I intermediate_size, V vocab_size,
L num_moe_layers, E num_experts, K top_k.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gaugeblock.reference import moe_states, states, upcycled_checkpoints, validation
from gaugeblock.reference.configs import UpcycledGPT2Config
from gaugeblock.reference.jax import modules, upcycling
from gaugeblock.reference.jax.attention import attention, join_heads, split_heads
from gaugeblock.reference.jax.auxiliary_losses import assignments
from gaugeblock.reference.jax.biased_moe_layers import upcycled_gpt2_moe
from gaugeblock.reference.jax.clip_text import causal_mask
from gaugeblock.reference.jax.experts import gelu
from gaugeblock.reference.jax.layers import linear
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.recomputation import recomputable

HEAD = "lm_head.weight"
TOKENS = "transformer.wte.weight"
MASK = re.compile(r"\.attn\.(masked_)?bias$")  # what old checkpoints hold of attention

State = Mapping[str, jax.Array]


class Routing(NamedTuple):
    """What the router of a layer says of tokens, in float32 at least."""

    router_logits: jax.Array
    """[B, S, E], without noise."""
    router_probs: jax.Array
    """[B, S, E], with it in training."""
    entropy: jax.Array
    """[B, S], in nats, of the probabilities without noise."""
    load: jax.Array
    """[B, E], each expert's part of the assignments of a sequence."""


def upcycled_gpt2(
    state: State, input_ids: jax.Array, noise: jax.Array, *, training: bool, config: UpcycledGPT2Config
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.upcycled_gpt2.upcycled_gpt2`, but noise gets zeros."""
    validation.upcycled_gpt2(state, input_ids, noise, config, state_shapes(config))
    validation.gpt2_input_ids_in_range(input_ids, config)
    dtype = state[TOKENS].dtype
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}

    hidden_BSD = embed_tokens(state, input_ids)
    mask_BAST = causal_mask(input_ids, None)
    noise_BSLE = jax.lax.stop_gradient(noise).astype(hidden_BSD.dtype)
    routings: list[Routing] = []
    for index in range(config.num_hidden_layers):
        own = states.part(state, f"transformer.h.{index}")
        if index in config.moe_layers:
            noise_BSE = noise_BSLE[:, :, len(routings)]
            hidden_BSD, routing = moe_block(own, hidden_BSD, mask_BAST, noise_BSE, training=training, config=config)
            routings.append(routing)
        else:
            hidden_BSD = dense_block(own, hidden_BSD, mask_BAST, config=config)
    normalized_BSD = modules.layer_norm(state, "transformer.ln_f", hidden_BSD, eps=config.layer_norm_eps)
    return linear(normalized_BSD, state[TOKENS]).astype(dtype), *of_all_layers(routings, noise_BSLE)


def embed_tokens(state: State, input_ids: jax.Array) -> jax.Array:
    """Embed token ids [B, S] and their places, [B, S, D]."""
    return state[TOKENS][input_ids] + state["transformer.wpe.weight"][: input_ids.shape[1]]


@recomputable
def dense_block(state: State, hidden_states: jax.Array, mask: jax.Array, *, config: UpcycledGPT2Config) -> jax.Array:
    """As `gaugeblock.reference.torch.upcycled_gpt2.dense_block`."""
    hidden_BSD = attend(state, hidden_states, mask, config=config)
    normalized_BSD = modules.layer_norm(state, "ln_2", hidden_BSD, eps=config.layer_norm_eps)
    inner_BSI = gelu(projection(state, "mlp.c_fc", normalized_BSD), "tanh")
    return hidden_BSD + projection(state, "mlp.c_proj", inner_BSI)


@recomputable
def moe_block(
    state: State,
    hidden_states: jax.Array,
    mask: jax.Array,
    noise: jax.Array,
    *,
    training: bool,
    config: UpcycledGPT2Config,
) -> tuple[jax.Array, Routing]:
    """As `gaugeblock.reference.torch.upcycled_gpt2.moe_block`."""
    hidden_BSD = attend(state, hidden_states, mask, config=config)
    normalized_BSD = modules.layer_norm(state, "ln_2", hidden_BSD, eps=config.layer_norm_eps)
    tokens, noise_of_tokens = (each.reshape(math.prod(each.shape[:2]), each.shape[2]) for each in (normalized_BSD, noise))
    out, logits, ids, probs, entropy, _ = upcycled_gpt2_moe(
        tokens, states.part(state, "mlp"), noise_of_tokens, top_k=config.top_k, noise_std=1.0, training=training
    )
    routing = routing_of(logits.reshape(noise.shape), probs.reshape(noise.shape), entropy, ids)
    return hidden_BSD + out.reshape(hidden_BSD.shape), routing


def routing_of(router_logits: jax.Array, router_probs: jax.Array, entropy: jax.Array, topk_ids: jax.Array) -> Routing:
    """Return what a router says of sequences: its logits and probabilities [B, S, E], entropy [B * S] and ids [B * S, K]."""
    batch_size, num_tokens, num_experts = router_logits.shape
    ids_BSK = topk_ids.reshape(batch_size, num_tokens, topk_ids.shape[1])
    counted_BS = jnp.ones(ids_BSK.shape[:2], dtype=bool)
    load_BE = assignments(ids_BSK, counted_BS, num_experts).astype(router_logits.dtype) / (num_tokens * topk_ids.shape[1])
    return Routing(router_logits, router_probs, entropy.reshape(batch_size, num_tokens), load_BE)


def of_all_layers(routings: list[Routing], noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return logits, probabilities, entropy and load of all layers with experts; `noise` has their axes, should there be none."""
    if not routings:
        return noise, noise, noise.sum(axis=-1), noise.sum(axis=1)
    logits, probs, entropies, loads = zip(*routings, strict=True)
    return jnp.stack(logits, 2), jnp.stack(probs, 2), jnp.stack(entropies, 2), jnp.stack(loads, 1)


def attend(state: State, hidden_states: jax.Array, mask: jax.Array, *, config: UpcycledGPT2Config) -> jax.Array:
    """Add attention to [B, S, D]: x + c_proj(attention(thirds of c_attn(ln_1(x))))."""
    normalized_BSD = modules.layer_norm(state, "ln_1", hidden_states, eps=config.layer_norm_eps)
    thirds = jnp.split(projection(state, "attn.c_attn", normalized_BSD), 3, axis=-1)
    query_BASF, key_BASF, value_BASF = (split_heads(each, config.num_attention_heads) for each in thirds)
    attended_BSD = join_heads(attention(query_BASF, key_BASF, value_BASF, mask=mask))
    return hidden_states + projection(state, "attn.c_proj", attended_BSD)


def projection(state: State, name: str, inputs: jax.Array) -> jax.Array:
    """Apply the layer of that name, whose matrix is [in, out], to the last axis."""
    return linear(inputs, state[f"{name}.weight"].mT, state[f"{name}.bias"])


def state_shapes(config: UpcycledGPT2Config) -> states.Shapes:
    """As `gaugeblock.reference.torch.upcycled_gpt2.state_shapes`."""
    validation.upcycled_gpt2_config(config)
    hidden_size = config.hidden_size
    shapes: states.Shapes = {
        TOKENS: (config.vocab_size, hidden_size),
        "transformer.wpe.weight": (config.max_position_embeddings, hidden_size),
    }
    for index in range(config.num_hidden_layers):
        shapes |= states.under(f"transformer.h.{index}", block_shapes(config, has_experts=index in config.moe_layers))
    return shapes | states.under("transformer.ln_f", states.norm_shapes(hidden_size))


def block_shapes(config: UpcycledGPT2Config, *, has_experts: bool) -> states.Shapes:
    """Return the shape of every parameter of one block by its own name."""
    sizes, hidden_size, layer = layer_sizes(config), config.hidden_size, moe_states.UPCYCLED_GPT2
    if has_experts:
        mlp = {name: tuple(sizes[axis] for axis in axes) for name, axes in layer.items()}
    else:
        mlp = {name: tuple(sizes[axis] for axis in layer[f"experts.{name}"][1:]) for name in moe_states.OF_AN_EXPERT}
    return states.of_modules(
        {
            "ln_1": states.norm_shapes(hidden_size),
            "attn.c_attn": {"weight": (hidden_size, 3 * hidden_size), "bias": (3 * hidden_size,)},
            "attn.c_proj": {"weight": (hidden_size, hidden_size), "bias": (hidden_size,)},
            "ln_2": states.norm_shapes(hidden_size),
            "mlp": mlp,
        }
    )


def layer_sizes(config: UpcycledGPT2Config) -> dict[str, int]:
    """Return the sizes of an MoE layer by the names of their axes."""
    return {name: getattr(config, name) for name in ("num_experts", "hidden_size", "intermediate_size")}


def expert_names(config: UpcycledGPT2Config) -> tuple[str, ...]:
    """Return the names of the parameters whose first axis is of the experts of a layer, those of a layer together."""
    return tuple(f"transformer.h.{index}.mlp.experts.{name}" for index in config.moe_layers for name in moe_states.OF_AN_EXPERT)


def upcycled_state(
    dense: State, *, config: UpcycledGPT2Config, seed: int, perturbation_std: float = 1e-3
) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.upcycled_gpt2.upcycled_state`."""
    validation.upcycled_gpt2_config(config)
    validation.state_entries(dense, state_shapes(replace(config, moe_layers=())), name="dense")
    state = dict(dense)
    for index in config.moe_layers:
        mlp = f"transformer.h.{index}.mlp"
        draws = upcycling.upcycling_draws(**layer_sizes(config), seed=seed, layer=index)
        layer = upcycling.upcycle(states.part(dense, mlp), draws, perturbation_std=perturbation_std)
        state = {name: each for name, each in state.items() if not name.startswith(f"{mlp}.")} | states.under(mlp, layer)
    return {name: state[name] for name in state_shapes(config)}


def load_state(state: State, *, config: UpcycledGPT2Config) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.upcycled_gpt2.load_state`."""
    state = {
        name if name.startswith(("transformer.", HEAD)) else f"transformer.{name}": entry
        for name, entry in state.items()
        if not MASK.search(name)
    }
    if HEAD in state:
        check_head(state.pop(HEAD), state.get(TOKENS))
    for index in config.moe_layers:
        mlp = f"transformer.h.{index}.mlp"
        layer = upcycled_checkpoints.from_public(state, prefix=f"{mlp}.", num_experts=config.num_experts).state
        state = {name: each for name, each in state.items() if not name.startswith(f"{mlp}.")} | states.under(mlp, layer)
    validation.state_entries(state, state_shapes(config))
    return {name: state[name] for name in state_shapes(config)}


def check_head(head: jax.Array, tokens: jax.Array | None) -> None:
    """Raise ValueError unless the head of a checkpoint is its table of tokens."""
    if tokens is None or head.shape != tokens.shape or not bool((head == tokens).all()):
        raise ValueError(f"state must have {HEAD} equal to {TOKENS}, got another")
