"""Which places are decided, simulated: ranks by comparing each place with each, as a kernel has it that does not sort."""

import torch

from gaugeblock.reference import validation


class PlaceChoice:
    """`unmasking.choose_places`."""

    contract = "unmasking.choose_places"

    def __call__(
        self, confidence: torch.Tensor, is_masked: torch.Tensor, counts: torch.Tensor, *, strategy: str, bound: float
    ) -> torch.Tensor:
        validation.choose_places(confidence, is_masked, counts, strategy, bound)
        confidence = self.known(confidence.float())
        if strategy == "sequential":
            return is_masked & (is_masked.cumsum(-1) <= counts[:, None])
        ahead = self.ahead(confidence, is_masked)
        if strategy == "entropy_bounded":
            counts = self.bounded(confidence, is_masked, ahead, bound)
        best = self.best(ahead.sum(-1), is_masked, counts)
        if strategy == "dynamic":
            sure = is_masked & self.exceeds(confidence, bound)
            return torch.where(self.suffices(sure.sum(-1), counts)[:, None], sure, best)
        return best

    def known(self, confidence: torch.Tensor) -> torch.Tensor:
        """NaN is the least."""
        return confidence.nan_to_num(-3e38, posinf=torch.inf, neginf=-3e38)

    def ahead(self, confidence: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
        """[b, i, j]: j is a mask, and comes before i."""
        mine, others = confidence[:, :, None], confidence[:, None, :]
        return is_masked[:, None, :] & ((others > mine) | ((others == mine) & self.earlier(confidence)))

    def earlier(self, confidence: torch.Tensor) -> torch.Tensor:
        """[i, j]: j is before i."""
        places = torch.arange(confidence.shape[1])
        return places[None, :] < places[:, None]

    def best(self, ranks: torch.Tensor, is_masked: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The first counts of the masks."""
        return is_masked & (ranks < counts[:, None])

    def bounded(self, confidence: torch.Tensor, is_masked: torch.Tensor, ahead: torch.Tensor, bound: float) -> torch.Tensor:
        """How many entropies add up to less than the bound."""
        entropies = -confidence.double()
        sums = torch.where(ahead, entropies[:, None, :], 0.0).sum(-1) + entropies
        return self.at_least_one((is_masked & self.fits(sums, bound)).sum(-1))

    def at_least_one(self, counts: torch.Tensor) -> torch.Tensor:
        """And one where there is none."""
        return counts.clamp(min=1)

    def fits(self, sums: torch.Tensor, bound: float) -> torch.Tensor:
        """Below the bound."""
        return sums < bound

    def exceeds(self, confidence: torch.Tensor, bound: float) -> torch.Tensor:
        """Above the bound."""
        return confidence > bound

    def suffices(self, sure: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """As many as are due."""
        return sure >= counts
