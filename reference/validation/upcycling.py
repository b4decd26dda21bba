"""Calls of what turns a dense MLP into experts, and of the optimizer's step of those in use."""

from typing import Any

from gaugeblock.reference import moe_states
from gaugeblock.reference.moe_states import OF_AN_EXPERT
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    dtype_name,
    require_dtype,
    require_entry_names,
    require_same_device,
    require_shape,
)
from gaugeblock.reference.validation.moe_layers import require_layer
from gaugeblock.reference.validation.noisy_routers import require_not_negative


def upcycle(dense: Any, draws: Any, perturbation_std: float) -> None:
    """Check the arguments of `upcycling.upcycle`."""
    require_entry_names("dense", dense, OF_AN_EXPERT)
    require_entry_names("draws", draws, moe_states.UPCYCLED_GPT2)
    gate = draws["router.gate.weight"]
    sizes = require_layer(gate, draws, moe_states.UPCYCLED_GPT2, top_k=1)
    for name in OF_AN_EXPERT:
        axes = moe_states.UPCYCLED_GPT2[f"experts.{name}"][1:]
        require_dtype(f"dense[{name!r}]", dense[name], FLOATING)
        require_shape(f"dense[{name!r}]", dense[name], **{axis: sizes[axis] for axis in axes})
        require_same_device(f"dense[{name!r}]", dense[name], "draws", gate)
    require_not_negative("perturbation_std", perturbation_std)


def adamw_of_used_experts(
    parameter: Any,
    gradient: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    steps: Any,
    tokens_per_expert: Any,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    adam_epsilon: float,
    weight_decay: float,
) -> None:
    """Check the arguments of `upcycling.adamw_of_used_experts`."""
    require_dtype("parameter", parameter, ("float32", "float64"))
    if not parameter.shape:
        raise ValueError("parameter must be [num_experts, ...], got ()")
    for name, array in (("gradient", gradient), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        require_dtype(name, array, (dtype_name(parameter),))
        if tuple(array.shape) != tuple(parameter.shape):
            raise ValueError(f"{name} must have the shape of parameter, {tuple(parameter.shape)}, got {tuple(array.shape)}")
        require_same_device(name, array, "parameter", parameter)
    for name, array in (("steps", steps), ("tokens_per_expert", tokens_per_expert)):
        require_dtype(name, array, INTEGER)
        require_shape(name, array, num_experts=parameter.shape[0])
        require_same_device(name, array, "parameter", parameter)
    for name, rate in (("learning_rate", learning_rate), ("adam_epsilon", adam_epsilon), ("weight_decay", weight_decay)):
        require_not_negative(name, rate)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        require_not_negative(name, beta)
        if beta >= 1:
            raise ValueError(f"{name} must be below 1, got {beta}")
