"""Calls of DiT-MoE's model, beyond those of `dit`; those of its layer are in `dit_moe_layers`."""

from typing import Any

from gaugeblock.reference.configs import DiTMoEModelConfig


def dit_moe_config(config: Any) -> None:
    """Check that a config is one of DiT-MoE, not of DiT."""
    if not isinstance(config, DiTMoEModelConfig):
        raise TypeError(f"config must be a DiTMoEModelConfig, got {type(config).__name__}")
