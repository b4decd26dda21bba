"""MoE layers in JAX over the ranks of a mesh: the experts lie there in one of the ways of `expert_parallel.py` and
`sharded_experts.py`; routers and the experts that all tokens pass are compiled for tokens as they lie.

Arrays are global: what a layer tells of all tokens, as a loss or a load, XLA adds up over the ranks. Each layer is the operation
of its name in `gaugeblock.reference.jax`, with `mesh`, of one axis "ranks", whose size divides num_experts (in slices,
intermediate_size).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from gaugeblock.optimized.jax import expert_parallel, moe_composition, sharded_experts
from gaugeblock.optimized.jax.mesh import OVER_RANKS, REPLICATED, mesh_of_ranks
from gaugeblock.optimized.jax.moe_composition import Parts, State, Tokens


def _layer(
    composed: Callable[..., tuple[jax.Array, ...]],
    sum_of_experts: Callable[..., jax.Array],
    hidden_states: jax.Array,
    state: State,
    *of_tokens: jax.Array,
    mesh: Mesh,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """Run a function of `moe_composition` with experts that are spread in a way."""
    mesh = mesh_of_ranks(mesh)
    parts = Parts(partial(sum_of_experts, mesh=mesh), partial(_placed, mesh, sum_of_experts in SPLIT_TOKENS))
    return composed(parts, hidden_states, state, *of_tokens, **options)


def _placed(mesh: Mesh, split: bool, whole: dict[str, jax.Array], of_tokens: Tokens) -> tuple[dict[str, jax.Array], Tokens]:
    """Bring tokens where the experts want them, so that routers run there too, and to every rank what is not of the experts."""
    splits = split and of_tokens[0].shape[0] % mesh.size == 0
    tokens, everywhere = (NamedSharding(mesh, each) for each in (OVER_RANKS if splits else REPLICATED, REPLICATED))
    return jax.device_put((whole, of_tokens), (everywhere, tokens))


SPLIT_TOKENS = (expert_parallel.sum_of_experts, sharded_experts.sum_gathered_tokens)
mixtral_moe = partial(_layer, moe_composition.mixtral_moe, expert_parallel.sum_of_experts)
qwen3_moe = partial(_layer, moe_composition.qwen3_moe, expert_parallel.sum_of_experts)
qwen2_moe = partial(_layer, moe_composition.qwen2_moe, expert_parallel.sum_of_experts)
qwen2_moe_gathered_tokens = partial(_layer, moe_composition.qwen2_moe, sharded_experts.sum_gathered_tokens)
qwen2_moe_replicated_tokens = partial(_layer, moe_composition.qwen2_moe, sharded_experts.sum_replicated_tokens)
qwen2_moe_tensor_parallel = partial(_layer, moe_composition.qwen2_moe, sharded_experts.sum_tensor_parallel)
deepseek_v2_moe = partial(_layer, moe_composition.deepseek_v2_moe, expert_parallel.sum_of_experts)
deepseek_v3_moe = partial(_layer, moe_composition.deepseek_v3_moe, expert_parallel.sum_of_experts)
llama4_moe = partial(_layer, moe_composition.llama4_moe, expert_parallel.sum_of_experts)
gpt_oss_moe = partial(_layer, moe_composition.gpt_oss_moe, expert_parallel.sum_of_experts)
upcycled_gpt2_moe = partial(_layer, moe_composition.upcycled_gpt2_moe, expert_parallel.sum_of_experts)
dit_moe = partial(_layer, moe_composition.dit_moe, expert_parallel.sum_of_experts)
