"""Experts beside SwiGLU, simulated: a bias is one column more of its matrix, which a 1 is multiplied by."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from gaugeblock.conformance.selftest.simulated.experts import RoutedExperts
from gaugeblock.reference import validation


class GegluExperts(RoutedExperts):
    """`experts.fused_geglu`: as SwiGLU, with torch's GELU."""

    contract = "experts.fused_geglu"

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids, *, approximate):
        validation.fused_geglu(hidden_states, w13, w2, topk_weights, topk_ids, approximate)
        validation.expert_ids_in_range(topk_ids, num_experts=len(w13))
        self.approximate = approximate
        return self.compute(hidden_states, w13, w2, topk_weights, topk_ids)

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of gate and up."""
        return self.gelu(gate) * up

    def gelu(self, gate: torch.Tensor) -> torch.Tensor:
        """The activation of a gate."""
        return torch.nn.functional.gelu(gate, approximate=self.approximate)


class BiasedExperts(RoutedExperts, ABC):
    """Experts with two matrices and two biases."""

    def __call__(self, hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, **options: Any):
        self.check(hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, *options.values())
        validation.expert_ids_in_range(topk_ids, num_experts=len(w1))
        self.options = options
        with_ones = torch.cat([hidden_states, torch.ones_like(hidden_states[:, :1])], 1)
        first, second = (torch.cat(each, 2) for each in ((w1, b1[:, :, None]), (w2, b2[:, :, None])))
        return self.compute(with_ones, first, second, topk_weights, topk_ids)

    @abstractmethod
    def check(self, *call: Any) -> None:
        """Raises what the contract demands."""

    def allocate(self, rows: int, columns: int) -> torch.Tensor:
        """Memory for the experts' outputs: no column for the ones."""
        return super().allocate(rows, columns - 1)

    def expert(self, hidden, w13, w2, weights, dtype):
        """The outputs of one block; the second bias is multiplied by 1 too."""
        activation = torch.nn.functional.pad(self.activation(self.matmul(hidden, w13)), (0, 1), value=1.0)
        return self.matmul(activation.to(dtype).float(), w2)


class GeluMlpExperts(BiasedExperts):
    """`experts.fused_gelu_mlp`."""

    contract = "experts.fused_gelu_mlp"

    def check(self, *call):
        """Raises what the contract demands."""
        validation.fused_gelu_mlp(*call)

    def activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        """There is no gate."""
        return torch.nn.functional.gelu(gate_up, approximate=self.options["approximate"])


class OaiExperts(BiasedExperts):
    """`experts.fused_swiglu_oai`."""

    contract = "experts.fused_swiglu_oai"

    def check(self, *call):
        """Raises what the contract demands."""
        validation.fused_swiglu_oai(*call)

    def split(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gate and up in turn."""
        return gate_up[:, 0::2], gate_up[:, 1::2]

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of gate and up."""
        gate, up = self.clamp(gate, up, self.options["limit"])
        return gate * torch.sigmoid(self.options["alpha"] * gate) * (up + 1)

    def clamp(self, gate: torch.Tensor, up: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate from above, up on either side."""
        return gate.clamp(max=limit), up.clamp(-limit, limit)


class OneExpert(RoutedExperts):
    """A routed expert that every token chooses."""

    def weighted(self, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The one expert's outputs, times the weights."""
        ids = torch.zeros(weights.shape, dtype=torch.int64)
        return self.compute(hidden_states, w13[None], w2[None], weights, ids)


class SharedExpert(OneExpert):
    """`experts.shared_swiglu`: its weight is 1."""

    contract = "experts.shared_swiglu"

    def __call__(self, hidden_states, w13, w2):
        validation.shared_swiglu(hidden_states, w13, w2)
        return self.weighted(hidden_states, w13, w2, torch.ones_like(hidden_states[:, :1], dtype=torch.float32))


class GatedSharedExpert(OneExpert):
    """`experts.gated_shared_swiglu`: its weight is how far a token's gate is open."""

    contract = "experts.gated_shared_swiglu"

    def __call__(self, hidden_states, w13, w2, shared_gate):
        validation.gated_shared_swiglu(hidden_states, w13, w2, shared_gate)
        logits = self.matmul(hidden_states.float(), shared_gate.float())
        return self.weighted(hidden_states, w13, w2, self.open(logits))

    def open(self, logits: torch.Tensor) -> torch.Tensor:
        """Of 0 to 1."""
        return torch.sigmoid(logits)
