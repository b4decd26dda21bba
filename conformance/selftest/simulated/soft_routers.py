"""Routers that balance by softmaxes over tokens, simulated."""

import torch

from gaugeblock.conformance.selftest.simulated.routers import SoftmaxRouter
from gaugeblock.reference import validation


class SoftMoeRouter:
    """`soft_routers.soft_moe`: exponentials tile by tile, divided by their sums."""

    contract = "soft_routers.soft_moe"

    def __call__(self, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        validation.soft_moe(router_logits)
        logits = router_logits.float()
        return self.returned(self.over_tokens(logits), self.over_slots(logits))

    def over_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Dispatch weights."""
        return self.softmax(logits, 1)

    def over_slots(self, logits: torch.Tensor) -> torch.Tensor:
        """Combine weights."""
        return self.softmax(logits, 2)

    def softmax(self, logits: torch.Tensor, dim: int) -> torch.Tensor:
        """Softmax along a dimension."""
        exponentials = (logits - self.highest(logits, dim)).double().exp().float()
        return exponentials / self.sum(exponentials, dim)

    def highest(self, logits: torch.Tensor, dim: int) -> torch.Tensor:
        """What is subtracted."""
        return logits.detach().amax(dim, keepdim=True)

    def sum(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """Sums along a dimension."""
        return values.double().sum(dim, keepdim=True).float()

    def returned(self, dispatch: torch.Tensor, combine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is returned."""
        return dispatch, combine


class SinkhornRouter(SoftmaxRouter):
    """`soft_routers.sinkhorn`, by exponentials: of each token they are divided by the highest, and then by sums."""

    contract = "soft_routers.sinkhorn"

    def __call__(
        self, router_logits: torch.Tensor, *, top_k: int, num_iterations: int, score_function: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        validation.sinkhorn(router_logits, top_k, num_iterations, score_function)
        logits = router_logits.float()
        ids = self.select(self.balanced(logits.detach(), self.iterations(num_iterations)), top_k)
        return self.weigh_by(self.activated(logits, self.activation(score_function, top_k)), logits, ids), ids

    def iterations(self, num_iterations: int) -> int:
        """How often rows and columns are divided."""
        return num_iterations

    def balanced(self, logits: torch.Tensor, num_iterations: int) -> torch.Tensor:
        """Logarithms of the balanced matrix, but for a term of each token."""
        columns = torch.zeros(1, logits.shape[1])
        for _ in range(num_iterations if len(logits) else 0):
            columns = self.iterated(logits, columns)
        return logits + columns

    def iterated(self, logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What is added to columns after one more division of rows and of columns."""
        rows = -self.log_of_sum(logits + columns, 1)
        return -self.log_of_sum(logits + rows, 0)

    def log_of_sum(self, logits: torch.Tensor, dim: int) -> torch.Tensor:
        """Logarithms of the sums of exponentials."""
        return logits.double().logsumexp(dim, keepdim=True).float()

    def activation(self, score_function: str, top_k: int) -> str:
        """What weights are made by."""
        return score_function

    def activated(self, logits: torch.Tensor, score_function: str) -> torch.Tensor:
        """Scores of all experts."""
        return logits.double().sigmoid().float() if score_function == "sigmoid" else self.scores(logits)

    def weigh_by(self, scores: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Weights of the chosen ids."""
        return scores.gather(1, ids)
