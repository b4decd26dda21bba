"""How the public state of an upcycled GPT-2 layer, which has names for each expert, becomes ours and theirs again.

Theirs, after a prefix such as "transformer.h.8.mlp.":

    router.gate.weight                                       [num_experts, hidden_size]
    router.training_step, router.anneal_steps                [], integers: where the noise's schedule is
    experts.{expert}.c_fc.weight, experts.{expert}.c_fc.bias     [hidden_size, intermediate_size], [intermediate_size]
    experts.{expert}.c_proj.weight, experts.{expert}.c_proj.bias [intermediate_size, hidden_size], [hidden_size]

Ours, `moe_states.UPCYCLED_GPT2`, are stacked: `experts.c_fc.weight` [num_experts, hidden_size, intermediate_size], ….

Source: sumitdotml/moe-emergence, `moe_emergence/gpt2_moe.py` and `moe_emergence/tracking.py`.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from gaugeblock.reference.expert_layouts import require_names, stack
from gaugeblock.reference.moe_states import OF_AN_EXPERT, UPCYCLED_GPT2
from gaugeblock.reference.validation.arrays import require_between, require_shape

GATE = "router.gate.weight"
COUNTERS = ("router.training_step", "router.anneal_steps")


class UpcycledLayer(NamedTuple):
    """A layer's parameters, and where its schedule is."""

    state: dict[str, Any]
    """What `biased_moe_layers.upcycled_gpt2_moe` takes."""
    counters: dict[str, Any]
    """The public router's buffers: steps that are finished, and how many have noise (`noisy_routers.noise_std_at`)."""


def from_public(tensors: Mapping[str, Any], *, prefix: str = "", num_experts: int | None = None) -> UpcycledLayer:
    """Stack the experts of a public layer.

    Args:
        tensors: Arrays of torch, JAX or NumPy by name; names that do not begin with the prefix are left alone.
        prefix: With what the names of the layer begin, as "transformer.h.8.mlp.".
        num_experts: How many there must be; by default as many as there are, and nothing tells that the last one is missing.

    Returns:
        The layer: the experts are copied, the rest is as it was given.

    Raises:
        TypeError: `num_experts` is no integer.
        ValueError: An entry is missing, superfluous or of another shape than the others ask for, or `num_experts` is below 1.
    """
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if num_experts is None:
        numbers = [name.split(".")[1] for name in inside if name.startswith("experts.")]
        num_experts = 1 + max((int(each) for each in numbers if each.isdecimal()), default=0)
    require_between("num_experts", num_experts, 1, sys.maxsize)
    expected = [*COUNTERS, GATE, *(_name(expert, each) for expert in range(num_experts) for each in OF_AN_EXPERT)]
    require_names(inside, expected, f"an upcycled layer with num_experts={num_experts}")

    sizes: dict[str, int] = {}
    for each in OF_AN_EXPERT:
        axes = UPCYCLED_GPT2[f"experts.{each}"][1:]
        for name in (_name(expert, each) for expert in range(num_experts)):
            require_shape(name, inside[name], **{axis: sizes.get(axis) for axis in axes})
            sizes |= dict(zip(axes, inside[name].shape, strict=True))
    stacked = {each: stack([inside[_name(expert, each)] for expert in range(num_experts)]) for each in OF_AN_EXPERT}
    state = {GATE: inside[GATE], **{f"experts.{each}": array for each, array in stacked.items()}}
    return UpcycledLayer(state, {name: inside[name] for name in COUNTERS})


def to_public(layer: UpcycledLayer, *, prefix: str = "") -> dict[str, Any]:
    """Name the experts of a layer one by one: the inverse of `from_public`, bit for bit.

    Args:
        layer: The layer.
        prefix: With what names begin.

    Returns:
        Arrays by name; they may share memory with the layer's.
    """
    num_experts = layer.state[GATE].shape[0]
    experts = {
        _name(expert, each): layer.state[f"experts.{each}"][expert] for expert in range(num_experts) for each in OF_AN_EXPERT
    }
    return {prefix + name: array for name, array in {**layer.counters, GATE: layer.state[GATE], **experts}.items()}


def _name(expert: int, parameter: str) -> str:
    return f"experts.{expert}.{parameter}"
