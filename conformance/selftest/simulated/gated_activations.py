"""Gated activations, simulated: blocks of columns are read, activated, multiplied and stored."""

import torch

from gaugeblock.reference import validation


class SwiGlu:
    """`gated_activations.swiglu`."""

    contract = "gated_activations.swiglu"

    columns = 64  # of a block

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        self.validate(gate, up)
        return self.store(self.of_blocks(gate.float(), up.float()), gate)

    def validate(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """Raises what the contract demands."""
        validation.swiglu(gate, up)

    def of_blocks(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Block by block of columns; both are `[B, S, I]` float32."""
        blocks = zip(gate.split(self.columns, -1), up.split(self.columns, -1), strict=True)
        return torch.cat([self.multiply(self.activate(gates), ups) for gates, ups in blocks], -1)

    def activate(self, gate: torch.Tensor) -> torch.Tensor:
        """SiLU."""
        return gate * torch.sigmoid(gate)

    def multiply(self, activated: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The product."""
        return activated * up

    def store(self, result: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """What is returned, in the dtype of the gate."""
        return result.to(gate.dtype)


class GeGlu(SwiGlu):
    """`gated_activations.geglu`."""

    contract = "gated_activations.geglu"

    approximation = "none"

    def __call__(self, gate: torch.Tensor, up: torch.Tensor, *, approximation: str) -> torch.Tensor:
        validation.geglu(gate, up, approximation)
        self.approximation = approximation
        return self.store(self.of_blocks(gate.float(), up.float()), gate)

    def activate(self, gate: torch.Tensor) -> torch.Tensor:
        """GELU."""
        return torch.nn.functional.gelu(gate, approximate=self.approximation)
