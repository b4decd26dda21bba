"""DiT-MoE, simulated: the simulated DiT with the simulated MoE layer for its second branch."""

import torch

from gaugeblock.conformance.selftest.simulated.dit import Dit, State
from gaugeblock.conformance.selftest.simulated.dit_moe_layers import DitMoe
from gaugeblock.reference import states
from gaugeblock.reference.configs import DiTMoEModelConfig
from gaugeblock.reference.torch.dit import NORM_EPS
from gaugeblock.reference.torch.dit_moe import state_shapes


class DitMoeModel(Dit):
    """`dit_moe.dit_moe`."""

    contract = "dit_moe.dit_moe"

    def __call__(
        self,
        state: State,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor,
        *,
        config: DiTMoEModelConfig,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.losses: list[torch.Tensor] = []
        out = super().__call__(state, latents, timesteps, class_labels, config=config)
        return out, self.total(self.losses)

    def shapes(self, config: DiTMoEModelConfig) -> dict[str, tuple[int, ...]]:
        return state_shapes(config)

    def total(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Of all layers, the first one first."""
        return sum(losses[1:], losses[0])

    def times(self, timesteps, config):
        return super().times(self.scaled(timesteps, config), config)

    def scaled(self, timesteps: torch.Tensor, config: DiTMoEModelConfig) -> torch.Tensor:
        """Times as they are embedded."""
        return timesteps * config.timestep_scale

    def block(self, state, tokens, conditioning, config):
        self.own = state  # which `heads` is not given
        return super().block(state, tokens, conditioning, config)

    def heads(self, qkv, num_heads):
        query, key, value = super().heads(qkv, num_heads)
        if "attn.q_norm.weight" in self.own:
            query, key = self.qk_norm(self.own, "q_norm", query), self.qk_norm(self.own, "k_norm", key)
        return query, key, value

    def qk_norm(self, state: State, name: str, heads: torch.Tensor) -> torch.Tensor:
        """LayerNorm with parameters over the features of a head."""
        return self.norm(heads, NORM_EPS) * state[f"attn.{name}.weight"] + state[f"attn.{name}.bias"]

    def feed_forward(self, state, modulated, config):
        modulated = modulated.to(state["moe.gate.weight"].dtype)
        out, _, _, loss = self.layer()(modulated, states.part(state, "moe"), config=config.moe)
        self.losses.append(loss)
        return out

    def layer(self) -> DitMoe:
        """What each block has."""
        return DitMoe()
