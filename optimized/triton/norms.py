"""Norms with parameters, in kernels: of rows in `row_norms.py`, of groups of channels in `group_norms.py`."""

import torch

from gaugeblock.optimized.triton.group_norms import norm_of_groups
from gaugeblock.optimized.triton.row_norms import norm_of_rows
from gaugeblock.reference import validation


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Divide the last axis by its root mean square, then scale it, in one kernel.

        out = x / sqrt(mean(x**2) + eps) * weight

    Args:
        hidden_states: [..., hidden_size], bfloat16, float16 or float32; any strides.
        weight: [hidden_size]; same dtype, any stride.
        eps: Added to the mean square; positive.

    Returns:
        [..., hidden_size], contiguous, dtype as hidden_states; computed in float32 and rounded once, as is each gradient.
        Differentiable once, by every array.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or eps is no number.
        ValueError: Ranks, sizes or devices do not fit together, eps is not positive, or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.norms.rms_norm`.
    """
    validation.rms_norm(hidden_states, weight, eps)
    return norm_of_rows("hidden_states", hidden_states, weight, None, eps)


def layer_norm_affine(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize the last axis to mean 0 and variance 1, then scale and shift it, in one kernel.

        out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias

    Args:
        hidden_states: [..., hidden_size], bfloat16, float16 or float32; any strides.
        weight: [hidden_size]; same dtype, any stride.
        bias: [hidden_size]; same dtype, any stride.
        eps: Added to the variance; positive.

    Returns, Raises: as of `rms_norm`.

    Source: `gaugeblock.reference.torch.norms.layer_norm_affine`.
    """
    validation.layer_norm_affine(hidden_states, weight, bias, eps)
    return norm_of_rows("hidden_states", hidden_states, weight, bias, eps)


def group_norm(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float) -> torch.Tensor:
    """Normalize groups of channels of an image to mean 0 and variance 1, then scale and shift each channel.

        out[b, c] = (x[b, c] - mean) / sqrt(variance + eps) * weight[c] + bias[c]

    Args:
        images: [batch_size, channels, height, width], bfloat16, float16 or float32; any strides.
        weight: [channels]; same dtype, any stride.
        bias: [channels]; same dtype, any stride.
        num_groups: Divides channels.
        eps: Added to the variance; positive.

    Returns:
        [batch_size, channels, height, width], dense, with its axes in memory in the order of those of images, whose dtype it
        has; computed in float32 and rounded once, as is each gradient. Differentiable once, by every array.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, num_groups is no integer, or eps no number.
        ValueError: Ranks, sizes or devices do not fit together, num_groups does not divide channels, eps is not positive, or
            Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.norms.group_norm`.
    """
    validation.group_norm(images, weight, bias, num_groups, eps)
    return norm_of_groups(images, weight, bias, num_groups, eps, silu=False)


def group_norm_silu(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float
) -> torch.Tensor:
    """Normalize groups of channels of an image, and apply silu(x) = x * sigmoid(x) to the result before it is rounded.

    Args, Returns, Raises: as of `group_norm`.

    Source: `gaugeblock.reference.torch.norms.group_norm_silu`.
    """
    validation.group_norm(images, weight, bias, num_groups, eps)
    return norm_of_groups(images, weight, bias, num_groups, eps, silu=True)
