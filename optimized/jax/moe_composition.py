"""MoE layers in JAX, composed of routers, compiled for tokens as they lie, and of experts that another module runs and spreads.

Tokens are float32 at least from the entrance of a layer to its end: outputs of experts, and the gradients that routers and
experts give of tokens, are added up before they are rounded. Experts' matrices keep their dtype, which operands of products on
accelerators have.

Shapes: T tokens, E num_experts, K top_k, H hidden_size; of DiT-MoE, B batch_size, N num_tokens of each sample.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gaugeblock.optimized.jax import expert_calls
from gaugeblock.optimized.jax.expert_calls import Experts, with_options
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTMoEConfig
from gaugeblock.reference.jax import biased_moe_layers, dit_moe_layers, noisy_routers, routers
from gaugeblock.reference.jax.experts import gated_shared_swiglu, shared_swiglu
from gaugeblock.reference.jax.moe_layers import router_logits, shared_weights
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.moe_states import CORRECTION_BIAS

State = Mapping[str, jax.Array]
Layer = tuple[jax.Array, jax.Array, jax.Array]
Tokens = tuple[jax.Array, ...]


class Parts(NamedTuple):
    """What a realm brings."""

    sum_of_experts: Callable[[jax.Array, Experts, jax.Array, jax.Array], jax.Array]
    """Of tokens, experts, topk_weights and topk_ids; in the dtype of the tokens."""
    placed: Callable[[dict[str, jax.Array], Tokens], tuple[dict[str, jax.Array], Tokens]]
    """Brings the parameters of routers and shared experts, and arrays of each token, to where tokens are routed."""


def qwen3_moe(parts: Parts, hidden_states: jax.Array, state: State, *, top_k: int, renormalize: bool) -> Layer:
    """As `gaugeblock.reference.torch.moe_layers.qwen3_moe`, of these parts."""
    validation.mixtral_moe(hidden_states, state, top_k)
    router = with_options(routers.softmax_topk, top_k=top_k, renormalize=renormalize)
    return _layer(parts, hidden_states, state, router, _swiglu(state))[:3]


def mixtral_moe(parts: Parts, hidden_states: jax.Array, state: State, *, top_k: int) -> Layer:
    """As `gaugeblock.reference.torch.moe_layers.mixtral_moe`, of these parts."""
    return qwen3_moe(parts, hidden_states, state, top_k=top_k, renormalize=True)


def qwen2_moe(parts: Parts, hidden_states: jax.Array, state: State, *, top_k: int, renormalize: bool) -> Layer:
    """As `gaugeblock.reference.torch.moe_layers.qwen2_moe`, of these parts."""
    validation.qwen2_moe(hidden_states, state, top_k)
    router = with_options(routers.softmax_topk, top_k=top_k, renormalize=renormalize)
    return _layer(parts, hidden_states, state, router, _swiglu(state), shared="shared_expert")[:3]


def deepseek_v2_moe(
    parts: Parts,
    hidden_states: jax.Array,
    state: State,
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> Layer:
    """As `gaugeblock.reference.torch.grouped_moe_layers.deepseek_v2_moe`, of these parts."""
    validation.deepseek_v2_moe(hidden_states, state, top_k, num_groups, topk_groups, routed_scaling_factor)
    router = with_options(
        _deepseek_v2_topk,
        top_k=top_k,
        num_groups=num_groups,
        topk_groups=topk_groups,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )
    return _layer(parts, hidden_states, state, router, _swiglu(state), shared="shared_experts")[:3]


def deepseek_v3_moe(
    parts: Parts,
    hidden_states: jax.Array,
    state: State,
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> Layer:
    """As `gaugeblock.reference.torch.grouped_moe_layers.deepseek_v3_moe`, of these parts."""
    validation.deepseek_v3_moe(hidden_states, state, top_k, num_groups, topk_groups, routed_scaling_factor)
    router = with_options(
        routers.grouped_sigmoid_topk,
        top_k=top_k,
        num_groups=num_groups,
        topk_groups=topk_groups,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )
    bias = (CORRECTION_BIAS,)
    return _layer(parts, hidden_states, state, router, _swiglu(state), router_entries=bias, shared="shared_experts")[:3]


def llama4_moe(parts: Parts, hidden_states: jax.Array, state: State, *, top_k: int) -> Layer:
    """As `gaugeblock.reference.torch.input_scaled_moe_layers.llama4_moe`, of these parts."""
    validation.llama4_moe(hidden_states, state, top_k)
    router = with_options(routers.sigmoid_input_scaling, top_k=top_k)
    parts = parts._replace(sum_of_experts=partial(_input_scaled, parts.sum_of_experts))
    experts = _swiglu(state, transposed=True)
    return _layer(parts, hidden_states, state, router, experts, gate="router", shared="shared_expert")[:3]


def gpt_oss_moe(parts: Parts, hidden_states: jax.Array, state: State, *, top_k: int, alpha: float, limit: float) -> Layer:
    """As `gaugeblock.reference.torch.biased_moe_layers.gpt_oss_moe`, of these parts."""
    validation.gpt_oss_moe(hidden_states, state, top_k, alpha, limit)
    up = state["experts.gate_up_proj"], state["experts.gate_up_proj_bias"]
    down = state["experts.down_proj"], state["experts.down_proj_bias"]
    experts = expert_calls.swiglu_oai(*up, *down, alpha, limit, transposed=True)
    return _layer(parts, hidden_states, state, with_options(routers.topk_softmax, top_k=top_k), experts, gate="router")[:3]


def upcycled_gpt2_moe(
    parts: Parts,
    hidden_states: jax.Array,
    state: State,
    noise: jax.Array,
    *,
    top_k: int,
    noise_std: float,
    training: bool,
) -> tuple[jax.Array, ...]:
    """As `gaugeblock.reference.torch.biased_moe_layers.upcycled_gpt2_moe`, of these parts; noise gets zeros."""
    validation.upcycled_gpt2_moe(hidden_states, state, noise, top_k, noise_std)
    up = state["experts.c_fc.weight"], state["experts.c_fc.bias"]
    down = state["experts.c_proj.weight"], state["experts.c_proj.bias"]
    experts = expert_calls.gelu_mlp(*up, *down, "tanh", transposed=True)
    router = with_options(noisy_routers.ste_topk, top_k=top_k, noise_std=noise_std, training=training)
    out_TH, logits_TE, ids_TK, others = _layer(parts, hidden_states, state, router, experts, noise, gate="router.gate")
    probs_TE, _, _, entropy_T = others
    return out_TH, logits_TE, ids_TK, probs_TE, entropy_T, _load_fractions(ids_TK, logits_TE)


def dit_moe(
    parts: Parts, hidden_states: jax.Array, state: State, *, config: DiTMoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.dit_moe_layers.dit_moe`, of these parts."""
    validation.dit_moe(hidden_states, state, config)
    batch_size, num_tokens, hidden_size = hidden_states.shape
    tokens_TH = hidden_states.reshape(batch_size * num_tokens, hidden_size)
    router = with_options(dit_moe_layers.gate, config=config)
    routed = _layer(parts, tokens_TH, state, router, _swiglu(state), shared="shared_experts")
    out_BNH, logits_BNE, ids_BNK = (each.reshape(batch_size, num_tokens, each.shape[1]) for each in routed[:3])
    return out_BNH, logits_BNE, ids_BNK, _balance_loss(logits_BNE, ids_BNK, config=config)


def _layer(
    parts: Parts,
    hidden_states: jax.Array,
    state: State,
    router: Callable[..., tuple[jax.Array, ...]],
    experts: Experts,
    *of_tokens: jax.Array,
    gate: str = "gate",
    router_entries: tuple[str, ...] = (),
    shared: str = "",
) -> tuple[jax.Array, jax.Array, jax.Array, Tokens]:
    """Take the steps of every layer: route, run the experts, add the shared one.

    Args:
        hidden_states: [num_tokens, hidden_size].
        router: Takes logits, `router_entries` of the state and `of_tokens`; returns topk_weights, topk_ids and what else it has.
        of_tokens: What there is of each token beside hidden_states.
        gate: The linear router, by its prefix in the state; the bias of its name is added, if there is one.
        shared: The expert that all tokens pass, by its prefix; the gate of its name opens it, if there is one.

    Returns:
        The tokens, the logits, topk_ids, and a tuple of what else the router returns.
    """
    whole = {name: each for name, each in state.items() if not name.startswith("experts.")}
    whole, (hidden_TH, *more) = parts.placed(whole, (at_least_float32(hidden_states), *of_tokens))
    weight_and_bias = whole[f"{gate}.weight"], whole.get(f"{gate}.bias")
    arrays = (*(whole[name] for name in router_entries), *more)
    logits_TE, (weights_TK, ids_TK, *others) = _routed(hidden_TH, *weight_and_bias, *arrays, router=router)
    out_TH = parts.sum_of_experts(hidden_TH, experts, weights_TK, ids_TK)
    if shared:
        of_shared = {name: each for name, each in whole.items() if name.startswith(shared)}
        out_TH = out_TH + _shared(hidden_TH, of_shared, prefix=shared)
    return out_TH.astype(hidden_states.dtype), logits_TE, ids_TK, tuple(others)


@partial(jax.jit, static_argnames="router")
def _routed(
    hidden_TH: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *arrays: jax.Array,
    router: Callable[..., tuple[jax.Array, ...]],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    logits_TE = router_logits(hidden_TH, weight)
    if bias is not None:
        logits_TE = logits_TE + bias
    return logits_TE, router(logits_TE, *arrays)


@partial(jax.jit, static_argnames="prefix")
def _shared(hidden_TH: jax.Array, state: State, *, prefix: str) -> jax.Array:
    state = {name: at_least_float32(each) for name, each in state.items()}
    weights, gate = shared_weights(state, prefix), state.get(f"{prefix}_gate.weight")
    return shared_swiglu(hidden_TH, *weights) if gate is None else gated_shared_swiglu(hidden_TH, *weights, gate)


def _deepseek_v2_topk(
    logits_TE: jax.Array, *, renormalize: bool, routed_scaling_factor: float, **groups: Any
) -> tuple[jax.Array, jax.Array]:
    """Scale the weights after they are renormalized, which `routers.grouped_softmax_topk` does not."""
    weights_TK, ids_TK = routers.grouped_softmax_topk(logits_TE, **groups, routed_scaling_factor=1.0)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(axis=-1, keepdims=True)
    return weights_TK * routed_scaling_factor, ids_TK


def _input_scaled(
    sum_of_experts: Callable[..., jax.Array], hidden_TH: jax.Array, experts: Experts, weights_TK: jax.Array, ids_TK: jax.Array
) -> jax.Array:
    """Weigh what experts are given: each routed row is a token of its own, which its weight has scaled."""
    scaled_TKH = weights_TK[..., None] * hidden_TH[:, None]
    rows_NH, ids_N1 = scaled_TKH.reshape(ids_TK.size, hidden_TH.shape[1]), ids_TK.reshape(ids_TK.size, 1)
    out_NH = sum_of_experts(rows_NH, experts, jnp.ones_like(ids_N1, dtype=rows_NH.dtype), ids_N1)
    return out_NH.reshape(scaled_TKH.shape).sum(axis=1)


def _swiglu(state: State, *, transposed: bool = False) -> Experts:
    return expert_calls.swiglu(state["experts.gate_up_proj"], state["experts.down_proj"], transposed=transposed)


_load_fractions = jax.jit(biased_moe_layers.load_fractions)
_balance_loss = jax.jit(dit_moe_layers.balance_loss, static_argnames="config")
