"""Convolutions of images, and what changes their size.

Shapes: B batch_size, C channels, O out_channels, H height, W width, K height and width of a kernel.
"""

import torch


def convolution(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    stride: int = 1,
    padding: int | None = None,
) -> torch.Tensor:
    """Convolve images with square kernels.

        out[b, o, y, x] = bias[o] + sum over c, i, j of weight[o, c, i, j] * padded[b, c, stride * y + i, stride * x + j]

    Args:
        images: [batch_size, channels, height, width], floating.
        weight: [out_channels, channels, kernel_size, kernel_size].
        bias: [out_channels].
        stride: Of the kernel's places, in both directions.
        padding: Rows and columns of zeros on every side; by default kernel_size // 2, which keeps the size.

    Returns:
        [batch_size, out_channels, height', width'], dtype of images.
    """
    around = weight.shape[-1] // 2 if padding is None else padding
    return torch.nn.functional.conv2d(images, weight, bias, stride=stride, padding=around)


def upsample(images: torch.Tensor) -> torch.Tensor:
    """Double height and width of [batch_size, channels, height, width]: each pixel becomes four of its value."""
    return images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
