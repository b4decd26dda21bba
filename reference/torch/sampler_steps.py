"""One step of each sampler: from a noised example and what a model predicts of it to one with less noise.

Rates and sigmas are given per example, so that examples of one batch may be at different steps. What is random is an argument.

Shapes: B batch_size.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiffusionScheduleConfig, EDMScheduleConfig, PredictionType
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.predictions import convert_prediction, per_example

SMALLEST_VARIANCE = 1e-20  # whose logarithm is taken: the posterior of the last step has none


def ddpm_step(
    noised: torch.Tensor,
    prediction: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    previous_alphas_cumprod: torch.Tensor,
    *,
    config: DiffusionScheduleConfig,
) -> torch.Tensor:
    """Draw the less noised example from its distribution, given this one and the data that the model predicts.

        a, p = alphas_cumprod, previous_alphas_cumprod;  beta = 1 - a / p
        data = `predicted_data`
        mean = sqrt(p) * beta / (1 - a) * data + sqrt(a / p) * (1 - p) / (1 - a) * noised
        out  = mean + sqrt(variance) * noise

        fixed_small    variance = posterior = (1 - p) / (1 - a) * beta
        fixed_large    variance = beta
        learned_range  variance = beta**f * posterior**(1 - f),  f = (second half of the prediction's channels + 1) / 2

    Args:
        noised: [batch_size, channels, ...], floating.
        prediction: As noised; for learned_range twice as many channels.
        noise: As noised; standard normal, and zeros in the last step.
        alphas_cumprod: [batch_size], float32 or float64, in [0, 1), of the timesteps of `noised`; for epsilon, positive.
        previous_alphas_cumprod: As alphas_cumprod, in (0, 1], of the timesteps visited next; 1 in the last step.
        config: prediction_type, variance_type and how data are clipped.

    Returns:
        Like noised; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or no config.
        ValueError: Shapes do not fit together, or a value is out of its range.

    Source: Ho et al. (arXiv:2006.11239), equations 6, 7 and 11; Nichol and Dhariwal (arXiv:2102.09672), equation 15.
    """
    validation.ddpm_step(noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod, config)
    x, z = at_least_float32(noised), at_least_float32(noise)
    a_B1, previous_B1 = per_example(alphas_cumprod, x), per_example(previous_alphas_cumprod, x)
    output = at_least_float32(prediction)[:, : x.shape[1]]
    data = predicted_data(x, output, alphas_cumprod, config=config)

    beta_B1 = (previous_B1 - a_B1) / previous_B1
    of_data_B1 = previous_B1.sqrt() * beta_B1 / (1 - a_B1)
    of_noised_B1 = (a_B1 / previous_B1).sqrt() * (1 - previous_B1) / (1 - a_B1)
    posterior_B1 = (1 - previous_B1) / (1 - a_B1) * beta_B1
    match config.variance_type:
        case "fixed_small":
            deviation = posterior_B1.sqrt()
        case "fixed_large":
            deviation = beta_B1.sqrt()
        case "learned_range":
            share = (at_least_float32(prediction)[:, x.shape[1] :] + 1) / 2
            deviation = ((share * beta_B1.log() + (1 - share) * posterior_B1.clamp(min=SMALLEST_VARIANCE).log()) / 2).exp()
    return (of_data_B1 * data + of_noised_B1 * x + deviation * z).to(noised.dtype)


def ddim_step(
    noised: torch.Tensor,
    prediction: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    previous_alphas_cumprod: torch.Tensor,
    *,
    config: DiffusionScheduleConfig,
    eta: float,
    use_clipped_model_output: bool = False,
) -> torch.Tensor:
    """Take the predicted noise away and put less of it back, a part of it anew.

        a, p = alphas_cumprod, previous_alphas_cumprod
        data = `predicted_data`;  epsilon = the predicted noise, or with use_clipped_model_output what `data` leave of `noised`
        s**2 = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
        out  = sqrt(p) * data + sqrt(1 - p - s**2) * epsilon + s * noise

    Args: as of `ddpm_step`, and
        prediction: As noised.
        eta: In [0, 1]: how much of the noise is new; 0 is deterministic, 1 has the variance of DDPM's fixed_small.
        use_clipped_model_output: Whether the noise is that of the clipped data.

    Returns:
        Like noised; computed in at least float32 and rounded once.

    Raises: as `ddpm_step`.

    Source: Song et al. (arXiv:2010.02502), equations 12 and 16.
    """
    validation.ddim_step(
        noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod, config, eta, use_clipped_model_output
    )
    x, output, z = at_least_float32(noised), at_least_float32(prediction), at_least_float32(noise)
    a_B1, previous_B1 = per_example(alphas_cumprod, x), per_example(previous_alphas_cumprod, x)
    data = predicted_data(x, output, alphas_cumprod, config=config)
    if use_clipped_model_output:
        epsilon = (x - a_B1.sqrt() * data) / (1 - a_B1).sqrt()
    else:
        rates = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        epsilon = convert_prediction(output, x, *rates, prediction_type=config.prediction_type, to="epsilon")

    new_B1 = eta**2 * (previous_B1 - a_B1) / previous_B1 / (1 - a_B1)  # how much of the noise's variance
    # 1 - new without its cancellation, which can leave less than nothing where a is small
    old_B1 = (1 - eta**2) + eta**2 * a_B1 * (1 - previous_B1) / (previous_B1 * (1 - a_B1))
    direction = ((1 - previous_B1) * old_B1).sqrt() * epsilon
    return (previous_B1.sqrt() * data + direction + ((1 - previous_B1) * new_B1).sqrt() * z).to(noised.dtype)


def predicted_data(
    noised: torch.Tensor, prediction: torch.Tensor, alphas_cumprod: torch.Tensor, *, config: DiffusionScheduleConfig
) -> torch.Tensor:
    """Return the data that a prediction means, clipped as the config says.

        epsilon       (noised - sqrt(1 - a) * prediction) / sqrt(a)
        sample        prediction
        v_prediction  sqrt(a) * noised - sqrt(1 - a) * prediction

    Args: as of `ddpm_step`; `prediction` is like `noised`.

    Returns:
        Like noised.
    """
    rates = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    data = convert_prediction(prediction, noised, *rates, prediction_type=config.prediction_type, to="sample")
    if config.thresholding:
        return dynamic_threshold(data, ratio=config.dynamic_thresholding_ratio, max_value=config.sample_max_value)
    return clipped(data, config)


def dynamic_threshold(data: torch.Tensor, *, ratio: float, max_value: float) -> torch.Tensor:
    """Clip each example to a quantile of its magnitudes and divide it by that.

        s   = quantile of |data[b]|, at least 1 and at most max_value
        out = clip(data[b], -s, s) / s

    Args:
        data: [batch_size, ...], floating.
        ratio: Which quantile, in (0, 1]; linear between two magnitudes.
        max_value: At least 1.

    Returns:
        Like data; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or no number.
        ValueError: A value is out of its range.

    Source: Saharia et al. (arXiv:2205.11487), section 2.3.
    """
    validation.dynamic_threshold(data, ratio, max_value)
    wide = at_least_float32(data)
    quantiles_B = torch.quantile(wide.abs().flatten(1), ratio, dim=1) if len(data) else wide.new_zeros(0)
    limits_B1 = per_example(quantiles_B.clamp(1, max_value), data)
    return (wide.clamp(-limits_B1, limits_B1) / limits_B1).to(data.dtype)


def euler_step(
    noised: torch.Tensor,
    prediction: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    next_sigmas: torch.Tensor,
    *,
    prediction_type: PredictionType,
    churn: float = 0.0,
    noise_scale: float = 1.0,
) -> torch.Tensor:
    """Add noise, as much as `churn` says, and follow the slope at it to the next sigma.

        higher = sigma * (1 + churn);  x = noised + noise_scale * sqrt(higher**2 - sigma**2) * noise
        epsilon       data = x - higher * prediction
        sample        data = prediction
        v_prediction  data = (x - sigma * sqrt(sigma**2 + 1) * prediction) / (sigma**2 + 1)
        out = x + (x - data) / higher * (next_sigma - higher)

    Args:
        noised: [batch_size, ...], floating: data + sigma * noise.
        prediction: As noised; what the model says of noised / sqrt(sigma**2 + 1), before the churn, as in public samplers.
        noise: As noised.
        sigmas: [batch_size], float32 or float64, positive.
        next_sigmas: As sigmas, or 0.
        prediction_type: Of a variance preserving model.
        churn: In [0, sqrt(2) - 1]: how much sigma grows by new noise.
        noise_scale: Of the new noise; positive.

    Returns:
        Like noised; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or no number.
        ValueError: Shapes do not fit together, or a value is out of its range.

    Source: Karras et al. (arXiv:2206.00364), algorithm 2 without the second order, of which lines 5 and 6 change places;
    diffusers' EulerDiscreteScheduler, whose v_prediction has sigma, not higher.
    """
    validation.euler_step(noised, prediction, noise, sigmas, next_sigmas, prediction_type, churn, noise_scale)
    sigmas_B1, next_B1 = per_example(sigmas, noised), per_example(next_sigmas, noised)
    x, higher_B1 = churned(noised, noise, sigmas_B1, churn, noise_scale)
    at_B1 = sigmas_B1 if prediction_type == "v_prediction" else higher_B1
    data = data_at_sigma(x, at_least_float32(prediction), at_B1, prediction_type)
    return (x + (x - data) / higher_B1 * (next_B1 - higher_B1)).to(noised.dtype)


def heun_step(
    noised: torch.Tensor,
    prediction: torch.Tensor,
    euler_noised: torch.Tensor,
    euler_prediction: torch.Tensor,
    sigmas: torch.Tensor,
    next_sigmas: torch.Tensor,
    *,
    config: DiffusionScheduleConfig,
) -> torch.Tensor:
    """Follow the mean of two slopes: that at this sigma, and that where it leads to at the next one.

        slope       = (noised - data(noised, prediction, sigma)) / sigma
        euler_slope = (euler_noised - data(euler_noised, euler_prediction, next_sigma)) / next_sigma
        out         = noised + (slope + euler_slope) / 2 * (next_sigma - sigma)

    Args:
        noised: [batch_size, ...], floating: data + sigma * noise.
        prediction: As noised; what the model says of noised / sqrt(sigma**2 + 1).
        euler_noised: As noised; what `heun_predictor` makes of both.
        euler_prediction: As noised; what the model says of euler_noised / sqrt(next_sigma**2 + 1).
        sigmas: [batch_size], float32 or float64, positive.
        next_sigmas: As sigmas; the step to 0 is Euler's.
        config: prediction_type, and how data are clipped.

    Returns:
        Like noised; computed in at least float32 and rounded once.

    Raises: as `euler_step`.

    Source: Karras et al. (arXiv:2206.00364), algorithm 1.
    """
    validation.heun_step(noised, prediction, euler_noised, euler_prediction, sigmas, next_sigmas, config)
    sigmas_B1, next_B1 = per_example(sigmas, noised), per_example(next_sigmas, noised)
    x = at_least_float32(noised)  # once, so that its two gradients are added before they are rounded
    first = clipped_slope(x, prediction, sigmas_B1, config)
    second = clipped_slope(euler_noised, euler_prediction, next_B1, config)
    return (x + (first + second) / 2 * (next_B1 - sigmas_B1)).to(noised.dtype)


def heun_predictor(
    noised: torch.Tensor,
    prediction: torch.Tensor,
    sigmas: torch.Tensor,
    next_sigmas: torch.Tensor,
    *,
    config: DiffusionScheduleConfig,
) -> torch.Tensor:
    """Follow the slope at this sigma to the next one, data being clipped as the config says: the first half of `heun_step`.

    Args: as of `heun_step`; next_sigmas may be 0.

    Returns:
        Like noised; computed in at least float32 and rounded once.

    Raises: as `heun_step`.

    Source: Karras et al. (arXiv:2206.00364), algorithm 1.
    """
    validation.heun_predictor(noised, prediction, sigmas, next_sigmas, config)
    sigmas_B1, next_B1 = per_example(sigmas, noised), per_example(next_sigmas, noised)
    x = at_least_float32(noised)
    slope = clipped_slope(x, prediction, sigmas_B1, config)
    return (x + slope * (next_B1 - sigmas_B1)).to(noised.dtype)


def edm_step(
    noised: torch.Tensor,
    prediction: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    next_sigmas: torch.Tensor,
    *,
    config: EDMScheduleConfig,
    churn: float = 0.0,
    noise_scale: float = 1.0,
) -> torch.Tensor:
    """Make Euler's step with a model whose inputs and outputs are scaled.

        higher, x: as in `euler_step`
        data = sigma_data**2 / (higher**2 + sigma_data**2) * x
               + higher * sigma_data / sqrt(higher**2 + sigma_data**2) * prediction,  minus for v_prediction
        out  = x + (x - data) / higher * (next_sigma - higher)

    Args: as of `euler_step`, and
        prediction: As noised; what the model says of noised / sqrt(sigma**2 + sigma_data**2).
        config: sigma_data and prediction_type.

    Returns:
        Like noised; computed in at least float32 and rounded once.

    Raises: as `euler_step`.

    Source: Karras et al. (arXiv:2206.00364), equation 7 and table 1; diffusers' EDMEulerScheduler.
    """
    validation.edm_step(noised, prediction, noise, sigmas, next_sigmas, config, churn, noise_scale)
    x, higher_B1 = churned(noised, noise, per_example(sigmas, noised), churn, noise_scale)
    of_both_B1 = higher_B1.square() + config.sigma_data**2
    scaled = higher_B1 * config.sigma_data / of_both_B1.sqrt() * at_least_float32(prediction)
    data = config.sigma_data**2 / of_both_B1 * x + (scaled if config.prediction_type == "epsilon" else -scaled)
    return (x + (x - data) / higher_B1 * (per_example(next_sigmas, noised) - higher_B1)).to(noised.dtype)


def flow_step(
    noised: torch.Tensor,
    prediction: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    next_sigmas: torch.Tensor,
    *,
    stochastic_sampling: bool,
) -> torch.Tensor:
    """Follow a flow's velocity to the next sigma, or predict the data and noise them anew.

        out = noised + (next_sigma - sigma) * prediction
        out = (1 - next_sigma) * (noised - sigma * prediction) + next_sigma * noise  with stochastic_sampling

    Args:
        noised: [batch_size, ...], floating: (1 - sigma) * data + sigma * noise.
        prediction: As noised: the velocity noise - data.
        noise: As noised; of no use without stochastic_sampling.
        sigmas: [batch_size], float32 or float64, in [0, 1].
        next_sigmas: As sigmas.
        stochastic_sampling: Which of the two.

    Returns:
        Like noised; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `stochastic_sampling` no bool.
        ValueError: Shapes do not fit together, or a value is out of its range.

    Source: Liu et al. (arXiv:2209.03003), section 2.1; diffusers' FlowMatchEulerDiscreteScheduler.
    """
    validation.flow_step(noised, prediction, noise, sigmas, next_sigmas, stochastic_sampling)
    x, velocity = at_least_float32(noised), at_least_float32(prediction)
    sigmas_B1, next_B1 = per_example(sigmas, x), per_example(next_sigmas, x)
    if stochastic_sampling:
        return ((1 - next_B1) * (x - sigmas_B1 * velocity) + next_B1 * at_least_float32(noise)).to(noised.dtype)
    return (x + (next_B1 - sigmas_B1) * velocity).to(noised.dtype)


def churned(
    noised: torch.Tensor, noise: torch.Tensor, sigmas_B1: torch.Tensor, churn: float, noise_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the examples with new noise, and their sigmas; both in at least float32."""
    # higher**2 - sigma**2, without its cancellation
    added_B1 = noise_scale * sigmas_B1 * (churn * (2 + churn)) ** 0.5
    return at_least_float32(noised) + added_B1 * at_least_float32(noise), sigmas_B1 * (1 + churn)


def data_at_sigma(
    x: torch.Tensor, output: torch.Tensor, sigmas_B1: torch.Tensor, prediction_type: PredictionType
) -> torch.Tensor:
    """Return the data that a variance preserving model's output means, where x is data + sigma * noise."""
    match prediction_type:
        case "epsilon":
            return x - sigmas_B1 * output
        case "v_prediction":
            return (x - sigmas_B1 * (sigmas_B1.square() + 1).sqrt() * output) / (sigmas_B1.square() + 1)
        case _:
            return output


def clipped_slope(
    noised: torch.Tensor, prediction: torch.Tensor, sigmas_B1: torch.Tensor, config: DiffusionScheduleConfig
) -> torch.Tensor:
    """Return by how much a noised example changes with sigma; in at least float32."""
    x = at_least_float32(noised)
    data = data_at_sigma(x, at_least_float32(prediction), sigmas_B1, config.prediction_type)
    return (x - clipped(data, config)) / sigmas_B1


def clipped(data: torch.Tensor, config: DiffusionScheduleConfig) -> torch.Tensor:
    """Return the data, clipped if the config says so."""
    return data.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else data
