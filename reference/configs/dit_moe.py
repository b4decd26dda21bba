"""DiT-MoE, and its published sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from gaugeblock.reference.configs.dit import DiTConfig
from gaugeblock.reference.configs.dit_moe_layer import DiTMoEConfig


@dataclass(frozen=True)
class DiTMoEModelConfig(DiTConfig):
    """A DiT whose feed-forward networks are MoE layers.

    Attributes: as of `DiTConfig`; `mlp_ratio` is of a routed expert. And
        num_experts: Routed experts of a layer.
        num_shared_experts: The expert that all tokens pass is as wide as so many times `hidden_size` (`n_shared_experts`).
        qk_norm: Whether queries and keys pass a LayerNorm over the features of a head. The public code has it in the models that
            are trained with flash attention, XL and G.
        timestep_scale: Multiplies the timesteps before they are embedded. The public code has 1, also for the times in (0, 1) of
            its rectified flow; other models that are told such times multiply by 1000.
        moe: How a layer chooses and weighs experts.

    Raises:
        ValueError: Sizes are not positive or do not fit together.

    Source: Fei et al. 2024 (arXiv:2407.11633), section 2 and table 1; feizc/DiT-MoE models.py.
    """

    num_experts: int = 8
    num_shared_experts: int = 2
    qk_norm: bool = False
    timestep_scale: float = 1.0
    moe: DiTMoEConfig = field(default_factory=DiTMoEConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_experts", "num_shared_experts", "timestep_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_experts % self.moe.num_groups:
            raise ValueError(f"num_experts must be a multiple of {self.moe.num_groups}, its groups, got {self.num_experts}")
        choice = self.num_experts // self.moe.num_groups * self.moe.topk_groups
        if self.moe.top_k > choice:
            raise ValueError(f"moe.top_k must be in 1..{choice}, the experts that a token may choose from, got {self.moe.top_k}")

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the hidden layer of the expert that all tokens pass."""
        return self.num_shared_experts * self.hidden_size


def _dit_moe(hidden_size: int, depth: int, num_heads: int, num_experts: int, qk_norm: bool) -> DiTMoEModelConfig:
    return DiTMoEModelConfig(hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_experts=num_experts, qk_norm=qk_norm)


DIT_MOE_PRESETS: Mapping[str, DiTMoEModelConfig] = MappingProxyType(
    {
        "DiT-MoE-S/2-8E2A": _dit_moe(384, 12, 6, 8, False),
        "DiT-MoE-S/2-16E2A": _dit_moe(384, 12, 6, 16, False),
        "DiT-MoE-B/2-8E2A": _dit_moe(768, 12, 12, 8, False),
        "DiT-MoE-XL/2-8E2A": _dit_moe(1152, 28, 16, 8, True),
        "DiT-MoE-G/2-16E2A": _dit_moe(1408, 40, 16, 16, True),
    }
)
