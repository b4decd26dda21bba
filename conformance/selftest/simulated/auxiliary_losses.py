"""Losses and figures of a router's load, simulated as programs have them that add up block by block."""

import torch

from gaugeblock.reference import validation


class SequenceLoss:
    """`auxiliary_losses.sequence_balance_loss`."""

    contract = "auxiliary_losses.sequence_balance_loss"

    def __call__(
        self, router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor, *, scores: str
    ) -> torch.Tensor:
        self.validate(router_logits, topk_ids, attention_mask, scores)
        logits = self.masked(router_logits.float(), attention_mask)
        probabilities = torch.where(attention_mask[..., None], self.normalized(logits, self.scores(logits, scores)), 0.0)
        counts = self.counts(topk_ids, attention_mask, router_logits.shape[2])
        tokens = self.tokens(attention_mask)
        losses = self.loads(counts, tokens, topk_ids.shape[2]) * self.sum(probabilities) / tokens
        return self.mean(losses.double().sum(1).float(), attention_mask)

    def validate(self, router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor, scores: str) -> None:
        """Raises what the contract demands."""
        validation.sequence_balance_loss(router_logits, topk_ids, attention_mask, scores)
        validation.expert_ids_in_range(topk_ids, num_experts=router_logits.shape[2])

    def masked(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of which those of padding are 0."""
        return torch.where(mask[..., None], logits, 0.0)

    def scores(self, logits: torch.Tensor, scores: str) -> torch.Tensor:
        """`[B, T, E]`."""
        return logits.sigmoid() if scores == "sigmoid" else logits.softmax(2)

    def normalized(self, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Each token's scores divided by their sum."""
        return scores / scores.sum(2, keepdim=True)

    def counts(self, ids: torch.Tensor, mask: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Assignments of each expert, `[B, E]`."""
        per_token = torch.zeros(*ids.shape[:2], num_experts, dtype=torch.int64)
        per_token.scatter_add_(2, ids.long(), torch.ones_like(ids, dtype=torch.int64))
        return (per_token * mask[..., None]).sum(1)

    def tokens(self, mask: torch.Tensor) -> torch.Tensor:
        """How many each sequence has, `[B, 1]`."""
        return mask.sum(1, keepdim=True).clamp(min=1)

    def loads(self, counts: torch.Tensor, tokens: torch.Tensor, top_k: int) -> torch.Tensor:
        """`[B, E]`, 1 where a sequence's load is even."""
        return counts.shape[1] * counts.float() / (tokens * top_k)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over the tokens of each sequence, block by block in float32."""
        blocks = [block.double().sum(1).float() for block in values.split(16, 1)]
        return sum(blocks[1:], blocks[0])

    def mean(self, losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Over the sequences that have a token."""
        return losses.sum() / mask.any(1).sum().clamp(min=1)


class Entropy:
    """`auxiliary_losses.routing_entropy`."""

    contract = "auxiliary_losses.routing_entropy"

    def __call__(self, router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        validation.routing_entropy(router_logits, attention_mask)
        logits = self.masked(router_logits.float(), attention_mask)
        return self.mean(self.entropy(logits), attention_mask)

    def masked(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of which those of padding are 0."""
        return torch.where(mask[:, None], logits, 0.0)

    def entropy(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each token, `[T]`."""
        below = logits - logits.detach().amax(1, keepdim=True)
        exponentials = below.exp()
        total = exponentials.double().sum(1).float()
        mean = (exponentials * torch.where(exponentials == 0, 0.0, below)).double().sum(1).float() / total
        return total.log() - mean

    def mean(self, entropy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Over the tokens that count."""
        return torch.where(mask, entropy, 0.0).double().sum().float() / mask.sum().clamp(min=1)


class Load:
    """`auxiliary_losses.expert_load`."""

    contract = "auxiliary_losses.expert_load"

    def __call__(self, topk_ids: torch.Tensor, attention_mask: torch.Tensor, *, num_experts: int) -> torch.Tensor:
        self.validate(topk_ids, attention_mask, num_experts)
        return self.count(topk_ids, attention_mask, num_experts)

    def validate(self, topk_ids: torch.Tensor, attention_mask: torch.Tensor, num_experts: int) -> None:
        """Raises what the contract demands."""
        validation.expert_load(topk_ids, attention_mask, num_experts)
        validation.expert_ids_in_range(topk_ids, num_experts=num_experts)

    def count(self, ids: torch.Tensor, mask: torch.Tensor, num_experts: int) -> torch.Tensor:
        """`[E]`, int64."""
        return ids[mask].flatten().long().bincount(minlength=num_experts)


class BiasUpdate:
    """`auxiliary_losses.correction_bias_update`."""

    contract = "auxiliary_losses.correction_bias_update"

    def __call__(
        self, e_score_correction_bias: torch.Tensor, tokens_per_expert: torch.Tensor, *, update_rate: float
    ) -> torch.Tensor:
        validation.correction_bias_update(e_score_correction_bias, tokens_per_expert, update_rate)
        return self.update(e_score_correction_bias, self.step(tokens_per_expert), update_rate)

    def step(self, loads: torch.Tensor) -> torch.Tensor:
        """1 for experts of less than the mean load, -1 for those of more, `[E]`."""
        return (loads.sum() - len(loads) * loads.long()).sign()

    def update(self, bias: torch.Tensor, step: torch.Tensor, rate: float) -> torch.Tensor:
        """What is returned."""
        return bias + rate * step
