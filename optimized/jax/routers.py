"""Routers in JAX: the references, compiled.

XLA makes one pass of what lies between the logits and each `top_k` or scan over the tokens; there is nothing to lay out by hand.
"""

import jax

from gaugeblock.reference.jax import routers as reference

softmax_topk = jax.jit(reference.softmax_topk, static_argnames=("top_k", "renormalize"))

grouped_sigmoid_topk = jax.jit(
    reference.grouped_sigmoid_topk,
    static_argnames=("top_k", "num_groups", "topk_groups", "renormalize", "routed_scaling_factor"),
)

switch_top1 = jax.jit(reference.switch_top1, static_argnames="capacity_factor")
