"""Quantization, simulated: one group of columns after the other."""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import E4M3_MAX


class TokenGroups:
    """`quantization.quantize_token_groups`: one group of all tokens after the other."""

    contract = "quantization.quantize_token_groups"

    def __call__(self, hidden_states: torch.Tensor, *, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        validation.quantize_token_groups(hidden_states, group_size)
        quantized = torch.empty(hidden_states.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(len(hidden_states), -(-hidden_states.shape[1] // group_size))
        for group, first in enumerate(range(0, hidden_states.shape[1], group_size)):
            columns = slice(first, first + group_size)
            scales[:, group] = self.scale(hidden_states.float(), columns)
            quantized[:, columns] = self.quantize(hidden_states[:, columns].float(), self.used(scales, group))
        return quantized, scales

    def scale(self, hidden: torch.Tensor, columns: slice) -> torch.Tensor:
        """Of each token in this group."""
        return self.largest(hidden[:, columns]) / E4M3_MAX

    def largest(self, group: torch.Tensor) -> torch.Tensor:
        """The magnitude that becomes 448."""
        return group.abs().amax(1)

    def used(self, scales: torch.Tensor, group: int) -> torch.Tensor:
        """The scales that a group is divided by."""
        return scales[:, group]

    def quantize(self, group: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The group in eight bits."""
        return self.rounded(torch.where(scales[:, None] == 0, 0.0, self.quotient(group, scales[:, None])))

    def quotient(self, group: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What is rounded."""
        return group / scales

    def rounded(self, quotients: torch.Tensor) -> torch.Tensor:
        """To e4m3."""
        return quotients.to(torch.float8_e4m3fn)
