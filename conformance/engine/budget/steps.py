"""The random numbers of rounding noise."""

from functools import lru_cache

import torch

REMEMBERED = 2**21  # of them: 16 MB
DRAWN = 2**16  # at once, of those that are remembered


class Steps:
    """Odd halves from -2^15 + 1/2 to 2^15 - 1/2, each as likely.

    Four are made of one random number, which takes half as long as four. The first of seed 0, of which all runs at once are made,
    are remembered: most cases need no others.
    """

    def __init__(self, seed: int) -> None:
        self.first = _remembered() if seed == 0 else None
        self.taken = 0
        self.generator = torch.Generator().manual_seed(seed)

    def take(self, count: int) -> torch.Tensor:
        """The next ones."""
        begin, end = self.taken, self.taken + (count + 3) // 4 * 4
        self.taken = end
        if self.first is None or begin >= REMEMBERED:
            return _drawn(self.generator, count)
        known = self.first.up_to(min(end, REMEMBERED))[begin : begin + count]
        if end < REMEMBERED:
            return known
        self.generator.set_state(self.first.generator.get_state())
        return torch.cat([known, _drawn(self.generator, count - len(known))])


class _Remembered:
    """The beginning of seed 0, as far as somebody needed it."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.steps, self.filled = torch.empty(REMEMBERED, dtype=torch.float64), 0  # memory that nobody wrote to takes none

    def up_to(self, count: int) -> torch.Tensor:
        """Of which at least so many are there."""
        while self.filled < count:
            self.steps[self.filled : self.filled + DRAWN] = _drawn(self.generator, DRAWN)
            self.filled += DRAWN
        return self.steps


@lru_cache(1)
def _remembered() -> _Remembered:
    return _Remembered()


def _drawn(generator: torch.Generator, count: int) -> torch.Tensor:
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return bits.view(torch.int16)[:count].to(torch.float64).add_(0.5)
