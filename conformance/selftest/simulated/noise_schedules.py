"""Noise schedules, simulated: float32 inside, rounded once."""

import torch

from gaugeblock.reference import validation


class Shift:
    """`noise_schedules.shift_sigmas`."""

    contract = "noise_schedules.shift_sigmas"

    def __call__(self, sigmas: torch.Tensor, *, shift: float) -> torch.Tensor:
        validation.shift_sigmas(sigmas, shift)
        return self.shifted(sigmas.float(), shift).to(sigmas.dtype)

    def shifted(self, sigmas: torch.Tensor, shift: float) -> torch.Tensor:
        """By the odds."""
        return sigmas * shift / ((1 - sigmas) + shift * sigmas)
