"""Predictions: what a diffusion model may be asked for, and how one kind becomes another.

With alpha as much of the data and sigma as much of the noise, a noised example is

    x = alpha * data + sigma * noise

and what is predicted is one of

    epsilon          noise
    sample           data
    v_prediction     alpha * noise - sigma * data
    flow_prediction  noise - data

Variance preserving diffusion has alpha**2 + sigma**2 = 1, rectified flow alpha + sigma = 1, EDM alpha = 1.

Shapes: B batch_size.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import PredictionType
from gaugeblock.reference.torch.precision import at_least_float32


def add_noise(data: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Mix data and noise.

        x[b] = alphas[b] * data[b] + sigmas[b] * noise[b]

    Args:
        data: [batch_size, ...], floating.
        noise: As data.
        alphas: [batch_size], float32 or float64, not negative.
        sigmas: As alphas.

    Returns:
        [batch_size, ...], dtype as data; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Shapes do not fit together, or a rate is negative or not finite.

    Source: Kingma et al. (arXiv:2107.00630), equation 1; Ho et al. (arXiv:2006.11239), equation 4.
    """
    validation.add_noise(data, noise, alphas, sigmas)
    alphas_B1, sigmas_B1 = per_example(alphas, data), per_example(sigmas, data)
    return (alphas_B1 * at_least_float32(data) + sigmas_B1 * at_least_float32(noise)).to(data.dtype)


def prediction_target(
    data: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor, sigmas: torch.Tensor, *, prediction_type: PredictionType
) -> torch.Tensor:
    """Return what a model of this kind is trained to predict, as the table at the top of this module says.

    Args:
        data: [batch_size, ...], floating.
        noise: As data.
        alphas: [batch_size], float32 or float64, not negative.
        sigmas: As alphas.
        prediction_type: What is predicted.

    Returns:
        [batch_size, ...], dtype as data; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Shapes do not fit together, a rate is negative or not finite, or `prediction_type` is none of the four.

    Source: Salimans and Ho (arXiv:2202.00512), section 4 and appendix D; Liu et al. (arXiv:2209.03003), equation 1.
    """
    validation.prediction_target(data, noise, alphas, sigmas, prediction_type)
    of_noise_B1, of_data_B1 = shares(per_example(alphas, data), per_example(sigmas, data), prediction_type)
    return (of_noise_B1 * at_least_float32(noise) + of_data_B1 * at_least_float32(data)).to(data.dtype)


def convert_prediction(
    prediction: torch.Tensor,
    noised: torch.Tensor,
    alphas: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    prediction_type: PredictionType,
    to: PredictionType,
) -> torch.Tensor:
    """Return what a prediction of one kind says of another.

    A prediction and the noised example are two sums of data and noise, from which a third follows:

        x = alpha * data + sigma * noise
        p = d * data + n * noise            out = d' * data + n' * noise
        out = ((alpha * n' - sigma * d') * p + (n * d' - n' * d) * x) / (alpha * n - sigma * d)

    Args:
        prediction: [batch_size, ...], floating.
        noised: As prediction: x.
        alphas: [batch_size], float32 or float64, not negative; for epsilon, positive: there is no telling the data where none of
            them is in x.
        sigmas: As alphas; for sample, positive.
        prediction_type: What `prediction` is.
        to: What is asked for.

    Returns:
        [batch_size, ...], dtype as prediction; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Shapes do not fit together, a rate is out of its range, or a kind is none of the four.

    Source: Salimans and Ho (arXiv:2202.00512), appendix D.
    """
    validation.convert_prediction(prediction, noised, alphas, sigmas, prediction_type, to)
    if prediction_type == to:
        return prediction
    alphas_B1, sigmas_B1 = per_example(alphas, prediction), per_example(sigmas, prediction)
    noise_B1, data_B1 = shares(alphas_B1, sigmas_B1, prediction_type)
    to_noise_B1, to_data_B1 = shares(alphas_B1, sigmas_B1, to)
    determinant_B1 = alphas_B1 * noise_B1 - sigmas_B1 * data_B1
    of_prediction_B1 = (alphas_B1 * to_noise_B1 - sigmas_B1 * to_data_B1) / determinant_B1
    of_noised_B1 = (noise_B1 * to_data_B1 - to_noise_B1 * data_B1) / determinant_B1
    return (of_prediction_B1 * at_least_float32(prediction) + of_noised_B1 * at_least_float32(noised)).to(prediction.dtype)


def min_snr_weights(snr: torch.Tensor, *, prediction_type: PredictionType, gamma: float) -> torch.Tensor:
    """Return the weights of squared errors for which data count with min(snr, gamma), whatever is predicted.

        sample           min(snr, gamma)
        epsilon          min(snr, gamma) / snr                   data are off by 1 / snr of what noise is
        v_prediction     min(snr, gamma) / (snr + 1)             where alpha**2 + sigma**2 = 1
        flow_prediction  min(snr, gamma) / (1 + sqrt(snr))**2    where alpha + sigma = 1

    Args:
        snr: [batch_size], float32 or float64, from 0 to infinity: alpha**2 / sigma**2.
        prediction_type: What is predicted.
        gamma: Positive.

    Returns:
        [batch_size], dtype as snr; the limits where snr is 0 (1 for epsilon, else 0) and infinite (gamma for sample, else 0).

    Raises:
        TypeError: An argument is not an array of the dtype above, or `gamma` is no number.
        ValueError: `snr` is negative, `gamma` is not positive, or `prediction_type` is none of the four.

    Source: Hang et al. (arXiv:2303.09556), section 3.4; diffusers' train_text_to_image.py.
    """
    validation.min_snr_weights(snr, prediction_type, gamma)
    match prediction_type:
        case "sample":
            return snr.clamp(max=gamma)
        case "epsilon":
            return (gamma / snr).clamp(max=1)
        case "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        case "flow_prediction":
            return snr.clamp(max=gamma) / (1 + snr.sqrt()) ** 2


def shares(alphas: torch.Tensor, sigmas: torch.Tensor, prediction_type: PredictionType) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much of the noise and of the data a prediction of this kind is; like alphas."""
    zeros, ones = torch.zeros_like(alphas), torch.ones_like(alphas)
    match prediction_type:
        case "epsilon":
            return ones, zeros
        case "sample":
            return zeros, ones
        case "v_prediction":
            return alphas, -sigmas
        case "flow_prediction":
            return ones, -ones


def per_example(values: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
    """Return a number of each example, [batch_size], as [batch_size, 1, ...], with as many axes as the examples have."""
    return values.reshape(len(values), *[1] * (examples.ndim - 1))
