"""The MoE layer of DiT-MoE, simulated: the simulated experts, a gate in torch, and a loss of each sample by itself."""

from collections.abc import Mapping

import torch

from gaugeblock.conformance.selftest.simulated.experts import Experts
from gaugeblock.conformance.selftest.simulated.routers import GroupedRouter
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTMoEConfig


class _Gate(GroupedRouter):
    """Without a bias, a group being as good as its best member."""

    def group_scores(self, biased: torch.Tensor) -> torch.Tensor:
        return biased.amax(2)


class DitMoe:
    """`dit_moe_layers.dit_moe`."""

    contract = "dit_moe_layers.dit_moe"

    def __call__(
        self, hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], *, config: DiTMoEConfig
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        validation.dit_moe(hidden_states, state, config)
        tokens, floats = hidden_states.float().flatten(0, 1), {name: each.float() for name, each in state.items()}
        logits = Experts().matmul(tokens, floats["gate.weight"])
        scores = self.scores(logits, config)
        ids = self.choose(scores.detach(), config)
        weights = self.weigh(scores.gather(1, ids), config)
        routed = self.routed(tokens, floats["experts.gate_up_proj"], floats["experts.down_proj"], weights, ids)
        out = self.combine(routed, self.shared(tokens, floats), config).to(hidden_states.dtype)
        batch = hidden_states.shape[:2]
        loss = config.aux_loss_alpha * self.loss(self.shares(scores).unflatten(0, batch), ids.unflatten(0, batch), config)
        return out.view(hidden_states.shape), logits.unflatten(0, batch), ids.unflatten(0, batch), loss

    def scores(self, logits: torch.Tensor, config: DiTMoEConfig) -> torch.Tensor:
        """`[T, E]` float32."""
        logits = logits.double()
        return (logits.sigmoid() if config.scores == "sigmoid" else logits.softmax(1)).float()

    def choose(self, scores: torch.Tensor, config: DiTMoEConfig) -> torch.Tensor:
        """Ids of the chosen experts, `[T, k]`."""
        gate = self.gate()
        return gate.select(gate.masked(scores, gate.kept(scores, config.num_groups, config.topk_groups)), config.top_k)

    def gate(self) -> GroupedRouter:
        """What chooses."""
        return _Gate()

    def weigh(self, chosen: torch.Tensor, config: DiTMoEConfig) -> torch.Tensor:
        """Weights of the chosen scores."""
        if config.renormalize:
            chosen = chosen / (chosen.double().sum(1, keepdim=True).float() + 1e-20)
        return chosen * config.routed_scaling_factor

    def routed(
        self, tokens: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """The sum of each token's experts, float32."""
        return Experts()(tokens, w13, w2, weights, ids)

    def shared(self, tokens: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The expert that all tokens pass, float32."""
        gate, up, down = (state[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
        experts = Experts()
        return experts.matmul(experts.activate(experts.matmul(tokens, gate), experts.matmul(tokens, up)), down)

    def combine(self, routed: torch.Tensor, shared: torch.Tensor, config: DiTMoEConfig) -> torch.Tensor:
        """What is returned, but for its dtype."""
        return routed + shared

    def shares(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of which each token's sum to 1."""
        return scores / scores.double().sum(1, keepdim=True).float()

    def loss(self, shares: torch.Tensor, ids: torch.Tensor, config: DiTMoEConfig) -> torch.Tensor:
        """Of shares `[B, N, E]` and ids, without alpha."""
        if not config.per_sample:
            shares, ids = shares.flatten(0, 1)[None], ids.flatten(0, 1)[None]
        batch, tokens, experts = shares.shape
        counts = torch.zeros(batch, experts).scatter_add(1, ids.flatten(1), torch.ones(ids.flatten(1).shape))
        load = counts * experts / max(1, tokens * self.choices(ids))
        return (load * self.mean(shares)).double().sum().float() / max(1, batch)

    def choices(self, ids: torch.Tensor) -> int:
        """By what, beside the tokens, the assignments of a sample are divided."""
        return ids.shape[2]

    def mean(self, shares: torch.Tensor) -> torch.Tensor:
        """Over the tokens of a sample."""
        return shares.double().sum(1).float() / max(1, shares.shape[1])
