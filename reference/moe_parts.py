"""What MoE layers are built of, by name: what a router hands on, what a runner of experts takes, and whether the two fit."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Routed = Literal["ids and weights", "ids and input weights", "logits"]
"""What goes from a router to a runner: ids and the weights of the experts' outputs; ids and the weights of their inputs (of an
expert that is not linear these are another thing); or nothing but the router's logits."""

ROUTERS: Mapping[str, Routed] = MappingProxyType(
    {
        "softmax_topk": "ids and weights",
        "topk_softmax": "ids and weights",
        "sigmoid_topk": "ids and weights",
        "grouped_softmax_topk": "ids and weights",
        "sparsemixer": "ids and weights",
        "sigmoid_input_scaling": "ids and input weights",
        "bypass": "logits",
    }
)
"""The routers that need logits alone, and `bypass`, which leaves the choice to the runner."""

RUNNERS: Mapping[str, Routed] = MappingProxyType(
    {
        "fused_swiglu": "ids and weights",
        "fused_geglu": "ids and weights",
        "fused_gelu_mlp": "ids and weights",
        "fused_swiglu_oai": "ids and weights",
        "input_scaled_swiglu": "ids and input weights",
        "routing_swiglu": "logits",
    }
)
"""The experts of `experts.py`; those whose inputs are weighted (Llama 4); those that choose for themselves, by `softmax_topk`."""


def require_fit(router: str, runner: str) -> None:
    """Check that a router hands on what a runner takes.

    Raises:
        ValueError: A name is unknown, or the two do not fit.
    """
    for name, part, known in (("router", router, ROUTERS), ("runner", runner, RUNNERS)):
        if part not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {part!r}")
    if ROUTERS[router] != RUNNERS[runner]:
        fitting = ", ".join(name for name, taken in RUNNERS.items() if taken == ROUTERS[router])
        raise ValueError(
            f"runner {runner!r} needs {RUNNERS[runner]}, but router {router!r} hands on {ROUTERS[router]}; it fits {fitting}"
        )
