"""Tables of noise schedules, in Python's float64, for both frameworks: `noise_schedules.py` of each makes arrays of them.

T is num_train_timesteps; a table goes from timestep 0, little noise, to T - 1. What is visited goes from noise to data.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul

from gaugeblock.reference.configs import (
    DiffusionScheduleConfig,
    EDMScheduleConfig,
    FlowScheduleConfig,
    SigmaSchedule,
    TimestepBias,
)

COSINE_OFFSET, LARGEST_BETA = 0.008, 0.999  # Nichol and Dhariwal (arXiv:2102.09672), section 3.2
LGDLM_BETAS = (1e-4, 0.9999)  # the least and the largest, of LGDLM's class ContinuousDiffusion
LAST_ALPHA_CUMPROD = 2.0**-24  # in place of 0, where sigma = sqrt(1 / alpha_cumprod - 1) must be finite: 4096
KARRAS_RHO = 7.0  # Karras et al. (arXiv:2206.00364), table 1
BETA_SHAPE = 0.6  # of both ends: Lee et al. (arXiv:2407.12173)

Floats = list[float]


def linspace(first: float, last: float, count: int) -> Floats:
    """`count` numbers from `first` to `last`, both included; a single one is the first."""
    if count == 1:
        return [first]
    stride = (last - first) / (count - 1)  # rounded first, as in numpy: among whole numbers, that is what decides ties
    return [*(first + n * stride for n in range(count - 1)), last]


def betas(config: DiffusionScheduleConfig) -> Floats:
    """The share of the variance that each timestep replaces by noise."""
    first, last, count = config.beta_start, config.beta_end, config.num_train_timesteps
    match config.beta_schedule:
        case "linear":
            made = linspace(first, last, count)
        case "scaled_linear":
            made = [root**2 for root in linspace(math.sqrt(first), math.sqrt(last), count)]
        case "squaredcos_cap_v2":
            made = cosine_betas(count, 0.0, LARGEST_BETA)
        case "sigmoid":
            made = [first + (last - first) / (1 + math.exp(-x)) for x in linspace(-6, 6, count)]
    return rescale_zero_terminal_snr(made) if config.rescale_betas_zero_snr else made


def cosine_betas(count: int, least: float, largest: float) -> Floats:
    """The betas of a cosine schedule, clipped to a range."""
    return [min(max(1 - _cosine((n + 1) / count) / _cosine(n / count), least), largest) for n in range(count)]


def _cosine(time: float) -> float:
    return math.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2


def cumulative_alphas(each: Sequence[float]) -> Floats:
    """How much of the data's variance is left at each timestep: the products of 1 - beta up to it."""
    return list(accumulate((1 - beta for beta in each), mul))


def rescale_zero_terminal_snr(each: Sequence[float]) -> Floats:
    """Betas whose sqrt(alphas_cumprod) is shifted to 0 at the last timestep and scaled to what it was at the first."""
    roots = [math.sqrt(alpha) for alpha in cumulative_alphas(each)]
    scale = roots[0] / (roots[0] - roots[-1])
    alphas = [((root - roots[-1]) * scale) ** 2 for root in roots]
    return [1 - alphas[0], *(1 - after / before for before, after in pairwise(alphas))]


def timesteps(config: DiffusionScheduleConfig, num_steps: int) -> list[int]:
    """The timesteps that DDPM and DDIM visit, ties rounded to even."""
    count = config.num_train_timesteps
    match config.timestep_spacing:
        case "linspace":
            made = [round(each) for each in linspace(0.0, count - 1, num_steps)][::-1]
        case "leading":
            made = [n * (count // num_steps) + config.steps_offset for n in range(num_steps)][::-1]
        case "trailing":
            # the difference of the first two, as in numpy's arange, which decides ties; but exactly num_steps of them, where
            # arange has one more for 62 of the counts up to 1000, timestep -1
            stride = count - (count - count / num_steps)
            made = [round(count - n * stride) - 1 for n in range(num_steps)]
    if made[0] >= count:
        raise ValueError(f"num_steps must leave room for steps_offset={config.steps_offset}, got {num_steps}")
    return made


def previous_timesteps(config: DiffusionScheduleConfig, num_steps: int, *, constant_stride: bool) -> list[int]:
    """Where each step of DDPM or DDIM leads to: the timestep visited next, or one T // num_steps lower; below 0 the data."""
    visited = timesteps(config, num_steps)
    if constant_stride:
        return [max(each - config.num_train_timesteps // num_steps, -1) for each in visited]
    return [*visited[1:], -1]


def sigma_table(config: DiffusionScheduleConfig) -> Floats:
    """Noise per data at each timestep: sqrt((1 - alphas_cumprod) / alphas_cumprod)."""
    alphas = cumulative_alphas(betas(config))
    if config.rescale_betas_zero_snr:
        alphas[-1] = LAST_ALPHA_CUMPROD
    return [math.sqrt((1 - alpha) / alpha) for alpha in alphas]


def sigmas(config: DiffusionScheduleConfig, num_steps: int) -> tuple[Floats, Floats]:
    """What Euler and Heun visit: num_steps + 1 sigmas, and the timesteps of all but the last."""
    table = sigma_table(config)
    if config.timestep_spacing == "linspace":
        visited = linspace(config.num_train_timesteps - 1, 0, num_steps) if num_steps > 1 else [0.0]
    else:
        visited = [float(each) for each in timesteps(config, num_steps)]
    made = [_interpolated(table, each) for each in visited]
    if config.sigma_schedule != "interpolated":
        first, last = config.sigma_max or made[0], config.sigma_min or made[-1]
        made = spread_sigmas(config.sigma_schedule, first, last, num_steps)
        visited = [timestep_of_sigma(table, each) for each in made]
    return [*made, 0.0 if config.final_sigmas_type == "zero" else table[0]], visited


def _interpolated(table: Sequence[float], place: float) -> float:
    below = min(int(place), len(table) - 2)
    return table[below] + (place - below) * (table[below + 1] - table[below])


def timestep_of_sigma(table: Sequence[float], sigma: float) -> float:
    """Where a sigma lies in a rising table, linear in its logarithm, within the ends of the table."""
    sigma = min(max(sigma, table[0]), table[-1])
    above = next(n for n in range(1, len(table)) if sigma <= table[n])
    low, high = math.log(table[above - 1]), math.log(table[above])
    return above - 1 + (math.log(sigma) - low) / (high - low)


def spread_sigmas(schedule: SigmaSchedule, first: float, last: float, num_steps: int, rho: float = KARRAS_RHO) -> Floats:
    """Sigmas that fall from `first` to `last`: linear in their rho-th root, linear in their logarithm, or as quantiles of a Beta
    distribution."""
    match schedule:
        case "karras":
            return [root**rho for root in linspace(first ** (1 / rho), last ** (1 / rho), num_steps)]
        case "exponential":
            return [math.exp(each) for each in linspace(math.log(first), math.log(last), num_steps)]
        case "beta":
            return [last + beta_quantile(each) * (first - last) for each in linspace(1, 0, num_steps)]
        case "interpolated":
            return linspace(first, last, num_steps)


def beta_quantile(probability: float) -> float:
    """Below what number a draw of the symmetric Beta(0.6, 0.6) lies with this probability.

    Up to 1/2 the distribution function is, with u = x**a, u / B(a, a) * sum over k of (1 - a)_k / (k! (a + k)) x**k, which is
    convex in u: Newton's method comes down to the root.
    """
    if probability > 0.5:
        return 1 - beta_quantile(1 - probability)
    a = BETA_SHAPE
    normalizer = math.gamma(a) ** 2 / math.gamma(2 * a)
    u = a * normalizer * probability  # the first term
    for _ in range(20):
        x = u ** (1 / a)
        term, total = 1.0, 0.0
        for k in range(60):  # x is at most about 1/2, and each term at most x times the last
            total += term / (a + k)
            term *= (1 - a + k) / (k + 1) * x
        step = (u * total - normalizer * probability) * a * (1 - x) ** (1 - a)
        u -= step
        if abs(step) <= 1e-16 * u:
            break
    return float(u ** (1 / a))


def shifted(each: Sequence[float], shift: float) -> Floats:
    """Sigmas of a flow, moved towards noise: shift * sigma / (1 + (shift - 1) * sigma), whose odds are shift times as large."""
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in each]


def flow_table(config: FlowScheduleConfig) -> Floats:
    """The sigmas that a flow is trained at, from noise to data; dynamic shifts are none of the training's."""
    count = config.num_train_timesteps
    return shifted([(count - n) / count for n in range(count)], 1.0 if config.use_dynamic_shifting else config.shift)


def dynamic_mu(config: FlowScheduleConfig, num_image_tokens: int) -> float:
    """The mu of an image of so many tokens."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + (num_image_tokens - config.base_image_seq_len) * slope


def flow_sigmas(config: FlowScheduleConfig, num_steps: int, mu: float | None) -> tuple[Floats, Floats]:
    """The num_steps + 1 sigmas that a flow visits, the last 0: shifted, stretched, then spread between the first and the last;
    and the timesteps of all but the last."""
    if config.first_sigmas == "training range":
        table = flow_table(config)
        made = linspace(table[0], table[-1], num_steps)
    else:
        made = linspace(1, 1 / num_steps, num_steps)
    shift = config.shift if mu is None else math.exp(mu) if config.time_shift_type == "exponential" else mu
    made = shifted(made, shift)
    if config.shift_terminal is not None:
        if made[-1] == 1:
            raise ValueError(f"num_steps must be above 1 where shift_terminal is given, got {num_steps}")
        stretch = (1 - config.shift_terminal) / (1 - made[-1])
        made = [1 - (1 - sigma) * stretch for sigma in made]
    if config.sigma_schedule != "interpolated":
        made = spread_sigmas(config.sigma_schedule, made[0], made[-1], num_steps)
    return [*made, 0.0], [config.num_train_timesteps * sigma for sigma in made]


def edm_sigmas(config: EDMScheduleConfig, num_steps: int) -> tuple[Floats, Floats]:
    """The num_steps + 1 sigmas that EDM visits, and what the model is told of all but the last."""
    made = spread_sigmas(config.sigma_schedule, config.sigma_max, config.sigma_min, num_steps, config.rho)
    return [*made, 0.0 if config.final_sigmas_type == "zero" else made[-1]], [math.log(sigma) / 4 for sigma in made]


def timestep_sums(bias: TimestepBias, count: int, multiplier: float, portion: float, begin: int, end: int) -> Floats:
    """How often each timestep or one before it is drawn, relative to others: `multiplier` of the biased ones, 1 of the rest."""
    # the later ones not by a slice from behind: of a portion of 0 that would be all
    biased = {
        "none": range(0),
        "earlier": range(int(portion * count)),
        "later": range(count - int(portion * count), count),
        "range": range(begin, end),
    }[bias]
    return list(accumulate(multiplier if n in biased else 1.0 for n in range(count)))
