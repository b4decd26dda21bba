"""Routers that balance by softmaxes over tokens.

Shapes: B batch_size, T num_tokens, S num_slots, E num_experts, K top_k.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import ScoreFunction
from gaugeblock.reference.jax.precision import at_least_float32


def soft_moe(router_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.soft_routers.soft_moe`."""
    validation.soft_moe(router_logits)

    logits_BTS = at_least_float32(router_logits)
    return jax.nn.softmax(logits_BTS, axis=1), jax.nn.softmax(logits_BTS, axis=2)


def sinkhorn(
    router_logits: jax.Array, *, top_k: int, num_iterations: int, score_function: ScoreFunction
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.soft_routers.sinkhorn`, but topk_ids are int32."""
    validation.sinkhorn(router_logits, top_k, num_iterations, score_function)

    logits_TE = at_least_float32(router_logits)
    ids_TK = jax.lax.top_k(balanced_logits(logits_TE, num_iterations), top_k)[1]
    scores_TE = jax.nn.sigmoid(logits_TE) if score_function == "sigmoid" else jax.nn.softmax(logits_TE, axis=-1)
    return jnp.take_along_axis(scores_TE, ids_TK, axis=-1), ids_TK


def balanced_logits(router_logits: jax.Array, num_iterations: int) -> jax.Array:
    """As `gaugeblock.reference.torch.soft_routers.balanced_logits`."""
    balanced_TE = router_logits
    for _ in range(num_iterations if len(router_logits) else 0):  # the largest of no numbers is an error
        rows_T1 = jax.nn.logsumexp(balanced_TE, axis=1, keepdims=True)
        balanced_TE = router_logits - jax.nn.logsumexp(router_logits - rows_T1, axis=0)
    return balanced_TE
