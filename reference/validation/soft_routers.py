"""Calls of routers that balance by softmaxes over tokens."""

from typing import Any

from gaugeblock.reference.configs import ScoreFunction
from gaugeblock.reference.validation.arrays import FLOATING, require_between, require_dtype, require_one_of, require_shape
from gaugeblock.reference.validation.routers import softmax_topk

MOST_ITERATIONS = 2**20  # more would not end


def soft_moe(router_logits: Any) -> None:
    """Check the argument of `soft_routers.soft_moe`."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, batch_size=None, num_tokens=None, num_slots=None)
    if 0 in router_logits.shape[1:]:
        raise ValueError(f"router_logits must have at least one token and one slot, got {tuple(router_logits.shape)}")


def sinkhorn(router_logits: Any, top_k: int, num_iterations: int, score_function: Any) -> None:
    """Check the arguments of `soft_routers.sinkhorn`."""
    softmax_topk(router_logits, top_k)
    require_between("num_iterations", num_iterations, 0, MOST_ITERATIONS)
    require_one_of("score_function", score_function, ScoreFunction)
