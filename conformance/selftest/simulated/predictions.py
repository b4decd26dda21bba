"""Predictions, simulated: float32 inside, rounded once."""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import PredictionType

Shares = tuple[torch.Tensor, torch.Tensor]


def per_example(values: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
    """`[B]` as `[B, 1, 1]`."""
    return values.float().view(-1, *[1] * (examples.ndim - 1))


class AddNoise:
    """`predictions.add_noise`."""

    contract = "predictions.add_noise"

    def __call__(self, data: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        validation.add_noise(data, noise, alphas, sigmas)
        mixed = self.mix(data.float(), noise.float(), per_example(alphas, data), per_example(sigmas, data))
        return mixed.to(data.dtype)

    def mix(self, data: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """So much of both."""
        return alphas * data + sigmas * noise


class Target:
    """`predictions.prediction_target`."""

    contract = "predictions.prediction_target"

    def __call__(
        self,
        data: torch.Tensor,
        noise: torch.Tensor,
        alphas: torch.Tensor,
        sigmas: torch.Tensor,
        *,
        prediction_type: PredictionType,
    ) -> torch.Tensor:
        validation.prediction_target(data, noise, alphas, sigmas, prediction_type)
        rates = per_example(alphas, data), per_example(sigmas, data)
        wide = data.float(), noise.float()
        # each is part of the result, lest a gradient is missing
        return (self.target(*wide, *rates, prediction_type) + 0 * (wide[0] + wide[1])).to(data.dtype)

    def target(
        self, data: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, sigmas: torch.Tensor, prediction_type: str
    ) -> torch.Tensor:
        """Kind by kind."""
        match prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return data
            case "v_prediction":
                return self.v(data, noise, alphas, sigmas)
            case _:
                return noise - data

    def v(self, data: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """Of Salimans and Ho."""
        return alphas * noise - sigmas * data


class Convert:
    """`predictions.convert_prediction`: data and noise first, then what is asked for."""

    contract = "predictions.convert_prediction"

    def __call__(
        self,
        prediction: torch.Tensor,
        noised: torch.Tensor,
        alphas: torch.Tensor,
        sigmas: torch.Tensor,
        *,
        prediction_type: PredictionType,
        to: PredictionType,
    ) -> torch.Tensor:
        validation.convert_prediction(prediction, noised, alphas, sigmas, prediction_type, to)
        if prediction_type == to:
            return prediction + 0 * noised
        rates = per_example(alphas, noised), per_example(sigmas, noised)
        p, x = prediction.float(), noised.float()
        data, noise = self.solve(p, x, *rates, prediction_type)
        return (Target().target(data, noise, *rates, to) + 0 * (p + x)).to(prediction.dtype)

    def solve(
        self, p: torch.Tensor, x: torch.Tensor, alphas: torch.Tensor, sigmas: torch.Tensor, prediction_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Data and noise."""
        match prediction_type:
            case "epsilon":
                return (x - sigmas * p) / alphas, p
            case "sample":
                return p, (x - alphas * p) / sigmas
            case "v_prediction":
                square = alphas * alphas + sigmas * sigmas
                return (alphas * x - sigmas * p) / square, (sigmas * x + alphas * p) / square
            case _:
                return (x - sigmas * p) / (alphas + sigmas), (x + alphas * p) / (alphas + sigmas)


class MinSnr:
    """`predictions.min_snr_weights`."""

    contract = "predictions.min_snr_weights"
    claims = {"dtypes": ("float32",)}  # noqa: RUF012

    def __call__(self, snr: torch.Tensor, *, prediction_type: PredictionType, gamma: float) -> torch.Tensor:
        validation.min_snr_weights(snr, prediction_type, gamma)
        return self.weights(snr, prediction_type, gamma)

    def weights(self, snr: torch.Tensor, prediction_type: str, gamma: float) -> torch.Tensor:
        """Kind by kind."""
        least = torch.minimum(snr, torch.full_like(snr, gamma))
        match prediction_type:
            case "sample":
                return least
            case "epsilon":
                return torch.where(snr <= gamma, torch.ones_like(snr), gamma / snr)
            case "v_prediction":
                return least / (1 + snr)
            case _:
                return least / (1 + torch.sqrt(snr)) ** 2
