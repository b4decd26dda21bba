"""The parameters of each MoE layer: their names, those of transformers 5 where it has the layer, and the axes of each."""

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
DEEPSEEK_V2: StateAxes = MappingProxyType({**QWEN3, **_shared("shared_experts")})

CORRECTION_BIAS = "gate.e_score_correction_bias"
DEEPSEEK_V3: StateAxes = MappingProxyType({**DEEPSEEK_V2, CORRECTION_BIAS: ("num_experts",)})
"""LLaDA2's, Kimi-K2's and GLM-4.5's too."""

LLAMA4: StateAxes = MappingProxyType(
    {
        "router.weight": ("num_experts", "hidden_size"),
        "experts.down_proj": ("num_experts", "intermediate_size", "hidden_size"),
        "experts.gate_up_proj": ("num_experts", "hidden_size", "two_intermediate_sizes"),
        **_shared("shared_expert"),
    }
)
"""Experts' matrices are those of `QWEN3` transposed."""

BUFFERS = frozenset({CORRECTION_BIAS})
"""What is kept in a dtype of its own, float32 in checkpoints, and gets no gradient."""

GPT_OSS: StateAxes = MappingProxyType(
    {
        "router.weight": ("num_experts", "hidden_size"),
        "router.bias": ("num_experts",),
        "experts.down_proj": ("num_experts", "intermediate_size", "hidden_size"),
        "experts.down_proj_bias": ("num_experts", "hidden_size"),
        "experts.gate_up_proj": ("num_experts", "hidden_size", "two_intermediate_sizes"),
        "experts.gate_up_proj_bias": ("num_experts", "two_intermediate_sizes"),
    }
)
"""Matrices are [in, out]; gate and up columns take turns."""
UPCYCLED_GPT2: StateAxes = MappingProxyType(
    {
        "router.gate.weight": ("num_experts", "hidden_size"),
        "experts.c_fc.weight": ("num_experts", "hidden_size", "intermediate_size"),
        "experts.c_fc.bias": ("num_experts", "intermediate_size"),
        "experts.c_proj.weight": ("num_experts", "intermediate_size", "hidden_size"),
        "experts.c_proj.bias": ("num_experts", "hidden_size"),
    }
)
"""Matrices are [in, out], as GPT-2's. In the public state each expert has its own, `experts.0.c_fc.weight`, …; ours are stacked,
`upcycled_checkpoints.py`."""
OF_AN_EXPERT = tuple(name.removeprefix("experts.") for name in UPCYCLED_GPT2 if name.startswith("experts."))
"""The parameters of a dense MLP of GPT-2, and so of each of its experts, in the order of the public checkpoint."""
