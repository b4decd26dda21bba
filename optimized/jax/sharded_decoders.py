"""SDAR, LLaDA and Dream in JAX over the ranks of a mesh: parameters lie there as partition rules say, the rest is left to XLA.

Each rank has some heads of keys and values with the heads of queries that they serve, some features of each hidden layer, of
SDAR-MoE some of the experts, and some of the vocabulary; all tokens are on every rank. No matrix holds several, so that the
reference's own text is cut as it stands: XLA adds the ranks' products up once for each branch, and the embeddings that each finds
in its part of the table; logits, and keys and values that are to be kept, stay on the rank that made them. In the layers of
`sdar_moe`, which are written here for it, a rank runs its experts alone, and one sum is of tokens (`sharded_experts.py`); in
`sdar_cached` and `sdar_training` experts are the reference's, of which XLA adds up the rows that were routed, twice.

Each is the operation of its name in `gaugeblock.reference.jax`, over the ranks of `mesh`; arrays are global, and a state that
does not lie on the mesh is brought there. Beside what the operation raises:

    TypeError: `mesh` is not a mesh.
    ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide the config's num_key_value_heads, vocab_size, and
        intermediate_size or num_experts.

    placed = shard_state(state, partition_rules.of_decoder(config), mesh)       once
    logits = sdar.of_placed(placed, input_ids, config=config, mesh=mesh)

Source: gaugeblock.reference.jax; Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax import expert_calls
from gaugeblock.optimized.jax.sharded_experts import sum_replicated_tokens
from gaugeblock.optimized.jax.sharded_models import run_on_ranks
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import SDARMoEConfig
from gaugeblock.reference.jax import decoder, modules
from gaugeblock.reference.jax import dream as dream_reference
from gaugeblock.reference.jax import llada as llada_reference
from gaugeblock.reference.jax import sdar as sdar_reference
from gaugeblock.reference.jax.block_masks import block_causal_mask
from gaugeblock.reference.jax.decoder import State
from gaugeblock.reference.jax.moe_layers import router_logits
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.rotary import rotary_table
from gaugeblock.reference.jax.routers import softmax_topk


@dataclass(frozen=True, eq=False)
class Model:
    """An operation over the ranks of a mesh."""

    check: Callable[..., None]
    """Of `validation`."""
    predict: Callable[..., Any]
    """Does what the operation does with a state as `shard_state` places it, of arrays, config and mesh."""

    def __call__(self, state: State, *arrays: jax.Array | None, config: Any, mesh: Mesh) -> Any:
        """Run the operation, as the module says."""
        self.check(state, *arrays, config=config)
        return run_on_ranks(self.of_placed, partition_rules.of_decoder(config), state, *arrays, config=config, mesh=mesh)

    def of_placed(self, placed: State, *arrays: jax.Array | None, config: Any, mesh: Mesh) -> Any:
        """Run it with a state as `shard_state` places it by `partition_rules.of_decoder`; values are not checked.

        A past may lie on all ranks, or by heads of keys on the ranks that have them, as what `sdar_cached` returns does.
        """
        return _predict(self.predict, placed, *arrays, config=config, mesh=mesh)


@partial(jax.jit, static_argnums=0, static_argnames=("config", "mesh"))
def _predict(predict: Callable[..., Any], placed: State, *arrays: jax.Array | None, config: Any, mesh: Mesh) -> Any:
    return predict(placed, *arrays, config=config, mesh=mesh)


def _as_it_stands(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return what predicts by a reference's own text, which XLA cuts as the state is cut."""

    def predict(placed: State, *arrays: jax.Array | None, config: Any, mesh: Mesh) -> Any:
        return reference(placed, *arrays, config=config)

    return predict


def _sdar_moe(placed: State, input_ids: jax.Array, *, config: SDARMoEConfig, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Do what `sdar_moe` does with a state as `shard_state` places it."""
    state = {name: at_least_float32(parameter) for name, parameter in placed.items()}
    hidden_BSD = state["model.embed_tokens.weight"][input_ids]
    place_S = jnp.arange(input_ids.shape[1])
    mask_1SS = block_causal_mask(place_S, place_S, block_length=config.block_length)[None]
    places_N1 = decoder.places_from(0, input_ids).reshape(input_ids.size, 1)
    table = rotary_table(places_N1, features=(config.head_dim,), theta=config.rope_theta, dtype=hidden_BSD.dtype)
    all_logits = []
    for index in range(config.num_hidden_layers):
        own = states.part(state, f"model.layers.{index}")
        hidden_BSD, _, _ = decoder.attend(own, hidden_BSD, *table, mask_1SS, None, config=config)
        hidden_BSD, logits_BSE = _experts(own, hidden_BSD, config, mesh)
        all_logits.append(logits_BSE)
    hidden_BSD = modules.rms_norm(state, "model.norm", hidden_BSD, eps=config.rms_norm_eps)
    return modules.linear(state, "lm_head", hidden_BSD).astype(placed["lm_head.weight"].dtype), jnp.stack(all_logits)


def _experts(state: State, hidden_BSD: jax.Array, config: SDARMoEConfig, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Add what each rank's experts make of all tokens; return the logits by which they were chosen, too."""
    normalized_BSD = modules.rms_norm(state, "post_attention_layernorm", hidden_BSD, eps=config.rms_norm_eps)
    batch_size, num_tokens, hidden_size = hidden_BSD.shape
    tokens_ND = normalized_BSD.reshape(batch_size * num_tokens, hidden_size)
    logits_NE = router_logits(tokens_ND, state["mlp.gate.weight"])
    routing = softmax_topk(logits_NE, top_k=config.num_experts_per_tok, renormalize=config.norm_topk_prob)
    experts = expert_calls.swiglu(state["mlp.experts.gate_up_proj"], state["mlp.experts.down_proj"])
    out_ND = sum_replicated_tokens(tokens_ND, experts, *routing, mesh=mesh)
    return hidden_BSD + out_ND.reshape(hidden_BSD.shape), logits_NE.reshape(batch_size, num_tokens, config.num_experts)


llada = Model(validation.llada, _as_it_stands(llada_reference.llada))
dream = Model(validation.dream, _as_it_stands(dream_reference.dream))
sdar = Model(validation.sdar, _as_it_stands(sdar_reference.sdar))
sdar_moe = Model(validation.sdar_moe, _sdar_moe)
sdar_cached = Model(validation.sdar_cached, _as_it_stands(sdar_reference.sdar_cached))
sdar_training = Model(validation.sdar_training, _as_it_stands(sdar_reference.sdar_training))
