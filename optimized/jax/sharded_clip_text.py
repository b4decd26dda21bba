"""CLIP's text encoder in JAX over the ranks of a mesh: the parameters lie there as partition rules say, the rest is left to XLA.

Each rank has some heads of each attention and some features of each hidden layer; all tokens are on every rank. No matrix holds
several, so that the reference's own text is cut by heads and features as it stands: XLA adds the ranks' products up once for each
branch, and moves nothing else.

    placed = shard_state(state, partition_rules.CLIP_TEXT, mesh)       once
    hidden_states, pooled = clip_text_of_placed(placed, input_ids, attention_mask, config=config, mesh=mesh)
"""

from functools import partial

import jax
from jax.sharding import Mesh

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax.sharded_models import run_on_ranks
from gaugeblock.reference import validation
from gaugeblock.reference.configs import CLIPTextConfig
from gaugeblock.reference.jax import clip_text as reference


def clip_text(
    state: reference.State,
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    config: CLIPTextConfig,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.jax.clip_text.clip_text`, over the ranks of a mesh; arrays are global.

    Args: as of it; a state that does not lie on the mesh is brought there. And
        mesh: One axis, "ranks", whose size divides num_attention_heads and intermediate_size.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide the sizes above.

    Source: gaugeblock.reference.jax.clip_text; Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """
    validation.clip_text(state, input_ids, attention_mask, config, reference.state_shapes(config))
    validation.clip_input_ids_in_range(input_ids, config)
    rules = partition_rules.CLIP_TEXT
    return run_on_ranks(clip_text_of_placed, rules, state, input_ids, attention_mask, config=config, mesh=mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def clip_text_of_placed(
    placed: reference.State,
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    config: CLIPTextConfig,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Do what `clip_text` does with a state as `shard_state` places it by `partition_rules.CLIP_TEXT`; values are not checked."""
    return reference.clip_text(placed, input_ids, attention_mask, config=config)
