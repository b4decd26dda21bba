"""Objectives of rectified flow, simulated: float32 inside, rounded once."""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import PredictionType, SnrOfTimes, VelocitySign


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


class FlowMinSnr:
    """`objectives.rectified_flow_min_snr_weights`."""

    contract = "objectives.rectified_flow_min_snr_weights"
    claims = {"dtypes": ("float32",)}  # noqa: RUF012

    def __call__(
        self, times: torch.Tensor, *, prediction_type: PredictionType, gamma: float, snr: SnrOfTimes = "data over noise"
    ) -> torch.Tensor:
        validation.rectified_flow_min_snr_weights(times, prediction_type, gamma, snr)
        data = 1 - times
        return (
            self.consistent(data, times, prediction_type, gamma) if snr == "data over noise" else self.coded(data, times, gamma)
        )

    def coded(self, data: torch.Tensor, noise: torch.Tensor, gamma: float) -> torch.Tensor:
        """Of the public trainer."""
        ratios = noise / data.clamp(min=1e-8)
        return gamma / (ratios * ratios).clamp(min=gamma)

    def consistent(self, data: torch.Tensor, noise: torch.Tensor, prediction_type: str, gamma: float) -> torch.Tensor:
        """Multiplied out: at the ends nothing is divided by 0."""
        least = self.least(data, noise, gamma)  # min(data**2, gamma * noise**2), which is noise**2 times the data's weight
        match prediction_type:
            case "sample":
                return torch.where(noise == 0, torch.full_like(noise, gamma), least / noise.square())
            case "epsilon":
                return torch.where(data == 0, torch.ones_like(data), least / data.square())
            case "v_prediction":
                return least / (data.square() + noise.square())
            case _:
                return least

    def least(self, data: torch.Tensor, noise: torch.Tensor, gamma: float) -> torch.Tensor:
        """Of both squares."""
        return torch.minimum(data.square(), gamma * noise.square())
