"""Seeded random values."""

import torch


class Draw:
    """Seeded draws in float64 and int64, the vocabulary in which regimes are written."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Values of [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers of [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def permutation(self, length: int) -> torch.Tensor:
        """The numbers 0 ... length - 1, shuffled."""
        return torch.randperm(length, generator=self.generator)

    def distinct_rows(self, rows: int, columns: int, bound: int) -> torch.Tensor:
        """`[rows, columns]` integers below `bound`, distinct within each row."""
        return self.uniform(rows, bound).argsort(dim=1)[:, :columns]
