"""Norms with parameters: RMSNorm, LayerNorm, GroupNorm and what follows it.

Shapes: B batch_size, C channels, G num_groups, H height, W width, N numbers of a group, N = C / G * H * W.
"""

import math

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.layers import layer_norm
from gaugeblock.reference.torch.precision import at_least_float32


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Divide the last axis by its root mean square, then scale it.

        out = x / sqrt(mean(x**2) + eps) * weight

    Args:
        hidden_states: [..., hidden_size], floating; weight has its dtype.
        weight: [hidden_size].
        eps: Added to the mean square; positive.

    Returns:
        [..., hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or eps is no number.
        ValueError: Ranks, sizes or devices do not fit together, or eps is not positive.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4; eps as in public models, which the paper leaves out.
    """
    validation.rms_norm(hidden_states, weight, eps)
    inputs = at_least_float32(hidden_states)
    mean_square = (inputs * inputs).mean(dim=-1, keepdim=True)
    out = inputs * torch.rsqrt(mean_square + eps) * at_least_float32(weight)
    return out.to(hidden_states.dtype)


def layer_norm_affine(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize the last axis to mean 0 and variance 1, then scale and shift it.

        out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias

    Args:
        hidden_states: [..., hidden_size], floating; weight and bias have its dtype.
        weight: [hidden_size].
        bias: [hidden_size].
        eps: Added to the variance; positive.

    Returns:
        [..., hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs) and rounded once.

    Raises: as `rms_norm`.

    Source: Ba et al. 2016 (arXiv:1607.06450), equation 4.
    """
    validation.layer_norm_affine(hidden_states, weight, bias, eps)
    normalized = layer_norm(at_least_float32(hidden_states), eps=eps)
    out = normalized * at_least_float32(weight) + at_least_float32(bias)
    return out.to(hidden_states.dtype)


def group_norm(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float) -> torch.Tensor:
    """Normalize groups of channels of an image to mean 0 and variance 1, then scale and shift each channel.

        out[b, c] = (x[b, c] - mean) / sqrt(variance + eps) * weight[c] + bias[c]

    mean and variance are those of all pixels of x[b] in the group of c, which is of channels / num_groups consecutive ones.

    Args:
        images: [batch_size, channels, height, width], floating; weight and bias have its dtype.
        weight: [channels].
        bias: [channels].
        num_groups: Divides channels.
        eps: Added to the variance; positive.

    Returns:
        [batch_size, channels, height, width], dtype as images; computed in float32 (float64 for float64 inputs) and rounded
        once.

    Raises:
        TypeError: An argument is not an array of the dtype above, num_groups is no integer, or eps no number.
        ValueError: Ranks, sizes or devices do not fit together, num_groups does not divide channels, or eps is not positive.

    Source: Wu and He 2018 (arXiv:1803.08494), section 3.
    """
    validation.group_norm(images, weight, bias, num_groups, eps)
    groups_BGN = at_least_float32(images).reshape(images.shape[0], num_groups, math.prod(images.shape[1:]) // num_groups)
    normalized_BCHW = layer_norm(groups_BGN, eps=eps).reshape(images.shape)
    out_BCHW = normalized_BCHW * at_least_float32(weight)[:, None, None] + at_least_float32(bias)[:, None, None]
    return out_BCHW.to(images.dtype)


def group_norm_silu(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float
) -> torch.Tensor:
    """Normalize groups of channels of an image, and apply silu(x) = x * sigmoid(x) to the result.

        out = silu(group_norm(images, weight, bias)), of the norm before it is rounded

    Args, Returns, Raises: as of `group_norm`.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B, whose residual blocks have GroupNorm; its code, silu after each.
    """
    validation.group_norm(images, weight, bias, num_groups, eps)
    wide_BCHW, *parameters_C = (at_least_float32(each) for each in (images, weight, bias))
    out_BCHW = torch.nn.functional.silu(group_norm(wide_BCHW, *parameters_C, num_groups=num_groups, eps=eps))
    return out_BCHW.to(images.dtype)
