"""The parameters of each MoE layer: their names, which are those of transformers 5, and the axes of each."""

from collections.abc import Mapping
from types import MappingProxyType

StateAxes = Mapping[str, tuple[str, ...]]

GATE: StateAxes = MappingProxyType({"gate.weight": ("num_experts", "hidden_size")})
EXPERTS: StateAxes = MappingProxyType(
    {
        "experts.down_proj": ("num_experts", "hidden_size", "intermediate_size"),
        "experts.gate_up_proj": ("num_experts", "two_intermediate_sizes", "hidden_size"),
    }
)


def _shared(prefix: str) -> StateAxes:
    """A SwiGLU expert that all tokens pass, of a width of its own."""
    return {
        f"{prefix}.gate_proj.weight": ("shared_intermediate_size", "hidden_size"),
        f"{prefix}.up_proj.weight": ("shared_intermediate_size", "hidden_size"),
        f"{prefix}.down_proj.weight": ("hidden_size", "shared_intermediate_size"),
    }


DIT_MOE: StateAxes = MappingProxyType({**GATE, **EXPERTS, **_shared("shared_experts")})
QWEN3: StateAxes = MappingProxyType({**GATE, **EXPERTS})
"""Mixtral's, OLMoE's and SDAR's too."""
QWEN2: StateAxes = MappingProxyType({**QWEN3, **_shared("shared_expert"), "shared_expert_gate.weight": ("one", "hidden_size")})
