"""Objectives of rectified flow, simulated: float32 inside, rounded once."""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import VelocitySign


class Interpolate:
    """`objectives.rectified_flow_interpolate`."""

    contract = "objectives.rectified_flow_interpolate"

    def __call__(self, data: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        validation.rectified_flow(data, noise)
        validation.rectified_flow_times(times, data)
        return self.mix(data.float(), noise.float(), times.view(-1, *[1] * (data.ndim - 1))).to(data.dtype)

    def mix(self, data: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """So far on the way; times are `[B, 1, 1]`."""
        return (1 - times) * data + times * noise


class Velocity:
    """`objectives.rectified_flow_velocity`."""

    contract = "objectives.rectified_flow_velocity"

    def __call__(self, data: torch.Tensor, noise: torch.Tensor, *, velocity: VelocitySign) -> torch.Tensor:
        validation.rectified_flow(data, noise)
        validation.velocity_sign(velocity)
        return self.difference(data.float(), noise.float(), velocity).to(data.dtype)

    def difference(self, data: torch.Tensor, noise: torch.Tensor, velocity: VelocitySign) -> torch.Tensor:
        """One way or the other."""
        return noise - data if velocity == "noise - data" else data - noise


class FlowLoss(Velocity):
    """`objectives.rectified_flow_loss`."""

    contract = "objectives.rectified_flow_loss"

    def __call__(
        self, prediction: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, *, velocity: VelocitySign
    ) -> torch.Tensor:
        validation.rectified_flow(data, noise)
        validation.rectified_flow_prediction(prediction, data)
        validation.velocity_sign(velocity)
        return self.mean(prediction.float() - self.difference(data.float(), noise.float(), velocity))

    def mean(self, errors: torch.Tensor) -> torch.Tensor:
        """Of the squares of each example."""
        return errors.double().square().flatten(1).mean(1).float()
