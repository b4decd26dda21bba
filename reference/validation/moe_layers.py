"""Calls of Mixture-of-Experts layers."""

from collections.abc import Callable, Mapping
from typing import Any

from gaugeblock.reference import moe_states
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    dtype_name,
    require_between,
    require_dtype,
    require_entry_names,
    require_same_device,
    require_shape,
)


def mixtral_moe(hidden_states: Any, state: Any, top_k: int, num_holders: int = 1) -> None:
    """Check the arguments of `moe_layers.mixtral_moe` and of `moe_layers.qwen3_moe`."""
    require_layer(hidden_states, state, moe_states.QWEN3, top_k, num_holders)


def qwen2_moe(hidden_states: Any, state: Any, top_k: int, num_holders: int = 1) -> None:
    """Check the arguments of `moe_layers.qwen2_moe`."""
    require_layer(hidden_states, state, moe_states.QWEN2, top_k, num_holders)


def built_layer(
    hidden_states: Any,
    state: Any,
    axes_of: Callable[[int], moe_states.StateAxes],
    correction_bias: str | None,
    router_options: Mapping[str, Any],
) -> int:
    """Check the arguments of a layer of `moe_building.build_layer`, but for the bias; return the number of experts."""
    gate, *_ = axes_of(1)
    there = state if isinstance(state, Mapping) else {}
    num_experts = there[gate].shape[0] if gate in there and len(there[gate].shape) else 1
    axes = axes_of(num_experts)
    if correction_bias is not None:
        require_entry_names("state", state, (*axes, correction_bias))
        state = {name: each for name, each in state.items() if name != correction_bias}
    return require_layer(hidden_states, state, axes, router_options.get("top_k", 1))["num_experts"]


def require_layer(
    hidden_states: Any,
    state: Any,
    axes_of: moe_states.StateAxes,
    top_k: int,
    num_holders: int = 1,
    batch: tuple[str, ...] = ("num_tokens",),
) -> dict[str, int]:
    """Check what every layer has; return the sizes by the names of the axes, of which one name is one size.

    Args:
        num_holders: Ranks among which the experts are split: of the entries `experts.*` each has as large a part.
        batch: The axes of hidden_states but the last.
    """
    require_dtype("hidden_states", hidden_states, FLOATING)
    require_shape("hidden_states", hidden_states, **dict.fromkeys((*batch, "hidden_size")))
    require_entry_names("state", state, axes_of)
    sizes: dict[str, int] = {"hidden_size": hidden_states.shape[-1], "one": 1}
    for entry, axes in axes_of.items():
        name, array = f"state[{entry!r}]", state[entry]
        require_dtype(name, array, FLOATING if entry in moe_states.BUFFERS else (dtype_name(hidden_states),))
        require_same_device(name, array, "hidden_states", hidden_states)
        held = {"num_experts": sizes["num_experts"] // num_holders} if entry.startswith("experts.") else {}
        require_shape(name, array, **{axis: {**sizes, **held}.get(axis) for axis in axes})
        sizes = {**dict(zip(axes, array.shape, strict=True)), **sizes}
        if sizes["num_experts"] % num_holders:
            raise ValueError(f"num_experts must be a multiple of the ranks ({num_holders}), got {sizes['num_experts']}")
        if "intermediate_size" in sizes:
            sizes["two_intermediate_sizes"] = 2 * sizes["intermediate_size"]
    require_between("top_k", top_k, 1, sizes["num_experts"], "num_experts=")
    return sizes
