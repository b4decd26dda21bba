"""Routers that choose by noisy logits, simulated: the simulated choice, and noise before it."""

import torch

from gaugeblock.conformance.selftest.simulated.routers import SoftmaxRouter
from gaugeblock.reference import validation


class NoisyRouter(SoftmaxRouter):
    """`noisy_routers.noisy_topk`."""

    contract = "noisy_routers.noisy_topk"

    def __call__(
        self, router_logits: torch.Tensor, noise_logits: torch.Tensor, noise: torch.Tensor, *, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        validation.noisy_topk(router_logits, noise_logits, noise, top_k)
        noisy = self.noisy(router_logits.float(), self.deviation(noise_logits.float()), noise.float())
        ids = self.select(self.chosen_by(noisy, router_logits).detach().nan_to_num(neginf=-3e38), top_k)
        return self.weigh_chosen(noisy, ids), ids

    def deviation(self, noise_logits: torch.Tensor) -> torch.Tensor:
        """Softplus, as kernels have it, but in float64."""
        wide = noise_logits.double()
        return (wide.clamp(min=0) + (-wide.abs()).exp().log1p()).float()

    def noisy(self, logits: torch.Tensor, deviation: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noisy logits."""
        return logits + noise * deviation

    def chosen_by(self, noisy: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The scores by which experts are chosen."""
        return noisy

    def weigh_chosen(self, noisy: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Weights of the chosen ids."""
        return self.scores(noisy.gather(1, ids))


class SteRouter(SoftmaxRouter):
    """`noisy_routers.ste_topk`."""

    contract = "noisy_routers.ste_topk"

    epsilon = 1e-9

    def __call__(
        self, router_logits: torch.Tensor, noise: torch.Tensor, *, top_k: int, noise_std: float, training: bool
    ) -> tuple[torch.Tensor, ...]:
        validation.ste_topk(router_logits, noise, top_k, noise_std)
        logits = router_logits.float()
        clean = self.scores(logits)
        probs = self.scores(self.noisy(logits, noise.float(), noise_std, training))
        ids = self.select(self.choosable(self.chosen_by(probs, clean), logits.shape[1]), top_k)
        weights = self.shared(probs.gather(1, ids)) if top_k > 1 else self.alone(probs.gather(1, ids), training)
        return self.returned(weights, ids, probs, clean, logits, self.entropy(clean, probs))

    def noisy(self, logits: torch.Tensor, noise: torch.Tensor, noise_std: float, training: bool) -> torch.Tensor:
        """Noisy logits."""
        return logits + noise_std * noise if training else logits

    def chosen_by(self, probs: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """The scores by which experts are chosen."""
        return probs

    def shared(self, chosen: torch.Tensor) -> torch.Tensor:
        """Weights of several experts."""
        return chosen / (self.sum(chosen) + self.epsilon)

    def alone(self, chosen: torch.Tensor, training: bool) -> torch.Tensor:
        """The weight of one expert alone."""
        return 1 + (chosen - chosen.detach()) if training else torch.ones_like(chosen)

    def entropy(self, clean: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """Entropies `[T]`."""
        return -self.sum(clean * (clean + self.epsilon).log())[:, 0]

    def returned(
        self,
        weights: torch.Tensor,
        ids: torch.Tensor,
        probs: torch.Tensor,
        clean: torch.Tensor,
        logits: torch.Tensor,
        entropy: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """What is returned."""
        return weights, ids, probs, clean, logits, entropy
