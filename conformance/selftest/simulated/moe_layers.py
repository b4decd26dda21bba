"""MoE layers and their losses, simulated: the simulated router and experts, and losses that programs add up block by block."""

from collections.abc import Mapping

import torch

from gaugeblock.conformance.selftest.simulated.experts import Experts
from gaugeblock.conformance.selftest.simulated.routers import SoftmaxRouter
from gaugeblock.reference import validation


class MixtralMoe:
    """`moe_layers.mixtral_moe`."""

    contract = "moe_layers.mixtral_moe"

    def __call__(
        self, hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], *, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.validate(hidden_states, state, top_k)
        gate, w13, w2 = self.entries(state)
        router_logits = self.logits(hidden_states, gate)
        topk_weights, topk_ids = self.route(router_logits, top_k)
        return Experts()(hidden_states, w13, w2, topk_weights, topk_ids), self.store(router_logits), topk_ids

    def validate(self, hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], top_k: int) -> None:
        """Raises what the contract demands."""
        validation.mixtral_moe(hidden_states, state, top_k)

    def entries(self, state: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The gate, w13 and w2."""
        return state["gate.weight"], state["experts.gate_up_proj"], state["experts.down_proj"]

    def logits(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """`[T, E]` float32."""
        return Experts().matmul(hidden_states.float(), gate.float())

    def route(self, router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids of the chosen experts."""
        return SoftmaxRouter()(router_logits, top_k=top_k, renormalize=True)

    def store(self, router_logits: torch.Tensor) -> torch.Tensor:
        """What is returned of the logits."""
        return router_logits


class BalanceLoss:
    """`auxiliary_losses.load_balancing_loss`."""

    contract = "auxiliary_losses.load_balancing_loss"

    rows = 16  # tokens of a block

    def __call__(self, router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        validation.load_balancing_loss(router_logits, topk_ids, attention_mask)
        validation.expert_ids_in_range(topk_ids, num_experts=router_logits.shape[1])
        probabilities = self.sum(self.probabilities(self.masked(router_logits.float(), attention_mask), attention_mask))
        shares = self.shares(self.counts(topk_ids, attention_mask, router_logits.shape[1]), attention_mask, topk_ids.shape[1])
        return self.loss(shares, probabilities / self.tokens(attention_mask))

    def masked(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of which those of padding are 0."""
        return torch.where(mask[:, None], logits, 0.0)

    def probabilities(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`[T, E]`, 0 for padding."""
        return torch.where(mask[:, None], logits.softmax(1), 0.0)

    def counts(self, ids: torch.Tensor, mask: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Assignments of each expert, `[E]`."""
        return ids[mask].flatten().long().bincount(minlength=num_experts)

    def tokens(self, mask: torch.Tensor) -> torch.Tensor:
        """How many there are."""
        return mask.sum().clamp(min=1)

    def shares(self, counts: torch.Tensor, mask: torch.Tensor, top_k: int) -> torch.Tensor:
        """The part of all assignments that each expert has, `[E]`."""
        return counts.float() / (self.tokens(mask) * top_k)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over the tokens, block by block in float32."""
        blocks = [block.double().sum(0).float() for block in values.split(self.rows)]
        return sum(blocks[1:], blocks[0])

    def loss(self, shares: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """What is returned."""
        return len(shares) * (shares * probabilities).double().sum().float()


class ZLoss:
    """`auxiliary_losses.router_z_loss`."""

    contract = "auxiliary_losses.router_z_loss"

    def __call__(self, router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        validation.router_z_loss(router_logits, attention_mask)
        logits = torch.where(attention_mask[:, None], router_logits.float(), 0.0)
        return self.mean(self.logsumexp(logits), attention_mask)

    def logsumexp(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each token, `[T]`."""
        highest = logits.detach().amax(1)
        return highest + (logits - highest[:, None]).exp().double().sum(1).log().float()

    def mean(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Of the squares over the tokens that count."""
        return torch.where(mask, z, 0.0).square().double().sum().float() / mask.sum().clamp(min=1)
