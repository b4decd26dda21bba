"""At which timesteps a diffusion model is trained; what is random is an argument.

Shapes: B batch_size.
"""

import math

import torch

from gaugeblock.reference import noise_tables, validation
from gaugeblock.reference.configs import TimestepBias


def logit_normal_times(normals: torch.Tensor, *, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """Return times whose log-odds are normal, so that those in the middle are frequent.

        time = sigmoid(mean + std * normal)

    Args:
        normals: [batch_size], float32 or float64, standard normal draws.
        mean: Of the log-odds.
        std: Of the log-odds; positive.

    Returns:
        [batch_size], dtype as normals, in [0, 1].

    Raises:
        TypeError: An argument is not an array of the dtype above, or no number.
        ValueError: `normals` has another rank, or `std` is not positive.

    Source: Esser et al. (arXiv:2403.03206), equation 19.
    """
    validation.logit_normal_times(normals, mean, std)
    return (mean + std * normals).sigmoid()


def mode_times(uniforms: torch.Tensor, *, scale: float = 1.29) -> torch.Tensor:
    """Return times whose density has its mode in the middle (scale > 0) or at the ends (scale < 0).

        time = 1 - u - scale * (cos(pi / 2 * u)**2 - 1 + u)

    Args:
        uniforms: [batch_size], float32 or float64, draws in [0, 1].
        scale: In [-1, 2 / (pi - 2)], where the time falls as u rises.

    Returns:
        [batch_size], dtype as uniforms, in [0, 1]: 1 where u is 0.

    Raises:
        TypeError: An argument is not an array of the dtype above, or no number.
        ValueError: `uniforms` has another rank or a value out of its range, or `scale` is out of its range.

    Source: Esser et al. (arXiv:2403.03206), equation 20.
    """
    validation.mode_times(uniforms, scale)
    return 1 - uniforms - scale * (torch.cos(math.pi / 2 * uniforms) ** 2 - 1 + uniforms)


def timestep_indices(times: torch.Tensor, *, num_timesteps: int) -> torch.Tensor:
    """Return the place of each time in a table: floor(time * num_timesteps), and the last one for a time of 1.

    Of a flow's table, which falls from noise to data, a larger time is less noise.

    Args:
        times: [batch_size], float32 or float64, in [0, 1].
        num_timesteps: Length of the table; positive.

    Returns:
        [batch_size], int64, in 0..num_timesteps - 1.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `num_timesteps` no integer.
        ValueError: `times` has another rank or a value out of its range, or `num_timesteps` is not positive.

    Source: diffusers' train_dreambooth_lora_sd3.py, which has no place for a time of 1.
    """
    validation.timestep_indices(times, num_timesteps)
    return (times * num_timesteps).long().clamp(max=num_timesteps - 1)


def biased_timesteps(
    uniforms: torch.Tensor,
    *,
    num_timesteps: int,
    bias: TimestepBias,
    multiplier: float = 1.0,
    portion: float = 0.25,
    begin: int = 0,
    end: int = 1000,
) -> torch.Tensor:
    """Return timesteps of which some are drawn `multiplier` times as often as the others.

        weight[t] = multiplier if t is among the biased ones, else 1
        t = the first timestep with  weight[0] + ... + weight[t] > u * (sum of weights)

    Args:
        uniforms: [batch_size], float32 or float64, draws in [0, 1].
        num_timesteps: Length of the table; positive.
        bias: Which are biased: none, the first or the last floor(portion * num_timesteps), or begin..end - 1.
        multiplier: Positive.
        portion: In [0, 1]; 0 biases none.
        begin, end: In 0..num_timesteps, of "range" alone.

    Returns:
        [batch_size], int64, in 0..num_timesteps - 1.

    Raises:
        TypeError: An argument is not an array of the dtype above, or no number.
        ValueError: An argument is out of its range.

    Source: diffusers' train_text_to_image_sdxl.py, generate_timestep_weights.
    """
    validation.biased_timesteps(uniforms, num_timesteps, bias, multiplier, portion, begin, end)
    sums = noise_tables.timestep_sums(bias, num_timesteps, multiplier, portion, begin, end)
    # in float64: in float32 a sum of many thirds is off
    places = torch.searchsorted(torch.tensor(sums, dtype=torch.float64), uniforms.double() * sums[-1], right=True)
    return places.clamp(max=num_timesteps - 1)
