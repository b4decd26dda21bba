"""Objectives: what a diffusion model is trained to predict, and how far off it is.

In rectified flow, data lie at time 0, noise at time 1, and a straight line leads from one to the other.

Shapes: B batch_size.
"""

import math

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import FlowWeighting, PredictionType, SnrOfTimes, VelocitySign
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.predictions import min_snr_weights

TIMESTEPS = 1000  # what a model is told at time 1; 0 at time 0
SMALLEST_SHARE = 1e-8  # of the data, in the trainer whose weights are "noise over data"


def rectified_flow_interpolate(data: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Go the way from data to noise as far as `times` says.

        x[b] = (1 - times[b]) * data[b] + times[b] * noise[b]

    Args:
        data: [batch_size, ...], floating.
        noise: As data.
        times: [batch_size], floating, in [0, 1].

    Returns:
        [batch_size, ...], dtype as data; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Shapes do not fit together.

    Source: Liu et al. (arXiv:2209.03003), section 2.1, with the ends exchanged: Esser et al. (arXiv:2403.03206), equation 13.
    """
    validation.rectified_flow(data, noise)
    validation.rectified_flow_times(times, data)

    times_B1 = at_least_float32(times).reshape(-1, *[1] * (data.ndim - 1))
    return ((1 - times_B1) * at_least_float32(data) + times_B1 * at_least_float32(noise)).to(data.dtype)


def rectified_flow_velocity(data: torch.Tensor, noise: torch.Tensor, *, velocity: VelocitySign) -> torch.Tensor:
    """Return the velocity on the straight line between data and noise, which is the same at all times.

        "noise - data":  dx / dt    = noise - data,  as in Stable Diffusion 3 and diffusers
        "data - noise":  dx / d(-t) = data - noise,  as where data lie at time 1

    Args:
        data: [batch_size, ...], floating.
        noise: As data.
        velocity: Which of the two.

    Returns:
        [batch_size, ...], dtype as data; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Shapes do not fit together, or `velocity` is neither of the two.

    Source: Liu et al. (arXiv:2209.03003), equation 1; Esser et al. (arXiv:2403.03206), section 2.
    """
    validation.rectified_flow(data, noise)
    validation.velocity_sign(velocity)

    from_data_to_noise = at_least_float32(noise) - at_least_float32(data)
    return (from_data_to_noise if velocity == "noise - data" else -from_data_to_noise).to(data.dtype)


def rectified_flow_loss(
    prediction: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, *, velocity: VelocitySign
) -> torch.Tensor:
    """Return how far a predicted velocity is off, for each example.

        loss[b] = mean of (prediction[b] - velocity[b])**2

    Args:
        prediction: [batch_size, ...], floating.
        data: As prediction.
        noise: As prediction.
        velocity: Which way the predicted velocity points, as in `rectified_flow_velocity`.

    Returns:
        [batch_size], float32 (float64 for float64 inputs).

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Shapes do not fit together, or `velocity` is neither of the two.

    Source: Liu et al. (arXiv:2209.03003), equation 1.
    """
    validation.rectified_flow(data, noise)
    validation.rectified_flow_prediction(prediction, data)
    target = rectified_flow_velocity(at_least_float32(data), at_least_float32(noise), velocity=velocity)
    errors = at_least_float32(prediction) - target
    return errors.square().flatten(1).mean(dim=1)


def rectified_flow_min_snr_weights(
    times: torch.Tensor, *, prediction_type: PredictionType, gamma: float, snr: SnrOfTimes = "data over noise"
) -> torch.Tensor:
    """Return min-SNR weights along the straight line between data and noise.

        "data over noise":  snr = ((1 - t) / t)**2, and the weights of `predictions.min_snr_weights`
        "noise over data":  snr = (t / max(1 - t, 1e-8))**2, and min(snr, gamma) / snr whatever is predicted

    The second is what one public trainer has, whose times run the other way: the more noise an example has, the less it weighs.

    Args:
        times: [batch_size], float32 or float64, in [0, 1]; 1 is noise.
        prediction_type: What is predicted; "flow_prediction" is the velocity, of either sign.
        gamma: Positive.
        snr: Which of the two.

    Returns:
        [batch_size], dtype as times; finite also at the ends.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `gamma` is no number.
        ValueError: A value is out of its range, or a name is none of those above.

    Source: Hang et al. (arXiv:2303.09556), section 3.4; the second: EasyDeL, image_diffusion_trainer/_fn.py.
    """
    validation.rectified_flow_min_snr_weights(times, prediction_type, gamma, snr)
    if snr == "data over noise":
        return min_snr_weights(((1 - times) / times).square(), prediction_type=prediction_type, gamma=gamma)
    ratios_B = (times / (1 - times).clamp(min=SMALLEST_SHARE)).square()
    return (gamma / ratios_B).clamp(max=1)


def rectified_flow_weights(times: torch.Tensor, *, weighting: FlowWeighting) -> torch.Tensor:
    """Return weights of squared errors along the straight line between data and noise.

        none        1
        sigma_sqrt  1 / t**2
        cosmap      2 / (pi * (1 - 2 t + 2 t**2))

    Args:
        times: [batch_size], float32 or float64, in [0, 1], for sigma_sqrt above 0; 1 is noise.
        weighting: Which.

    Returns:
        [batch_size], dtype as times.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: A value is out of its range, or `weighting` is none of the three.

    Source: Esser et al. (arXiv:2403.03206), section 3.1; diffusers' training_utils.py, compute_loss_weighting_for_sd3.
    """
    validation.rectified_flow_weights(times, weighting)
    match weighting:
        case "none":
            return torch.ones_like(times)
        case "sigma_sqrt":
            return 1 / times.square()
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * times + 2 * times.square()))
