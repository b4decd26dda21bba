"""GroupNorm, and silu of its result, of images: one kernel forward and two backward; large groups take one more of each.

    out = activation((x - mean) * rstd * weight + bias), mean and rstd of a group of channels of an image

All kernels are bound by memory. Forward reads images and writes the result; backward reads images and the gradient of the result
and writes the gradient of the images. A small group has one program, which goes through it twice, for statistics and for results,
and finds the second time in the cache what the first time brought. A large one is cut along its pixels over several programs:
one kernel writes the statistics, or sums, of each part, a second one merges those of its group and goes on with its own part, so
that what is larger than the cache is read twice. Statistics are Welford's in each lane and Chan's where lanes and parts are
merged: one pass, and no digits are lost where the mean is far from 0.

Kept from forward are mean and rstd of each group. Gradients of weight and bias are sums over pixels, parts and examples: programs
write those of their channels, and `partial_sums` adds them up, without atomics. How a group is cut depends on its size alone:
every run gives the same bits, and no example's bits depend on its batch.

Images are addressed by their strides, channels-last ones too; the result lies in memory in the order of the images.

The kernels stand in `group_norm_kernels.py`.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.group_norm_kernels import group_gradients_kernel, group_norm_kernel, group_statistics_kernel
from gaugeblock.optimized.triton.launch import device_of, reject_float64, require_triton_device
from gaugeblock.optimized.triton.partial_sums import sum_chunks

# A thread has 16 elements of each of its tensors: two loads of 16 bytes in 16-bit dtypes. Backward holds five such tiles.
ELEMENTS_PER_WARP = 16 * 32
TILE = 4 * ELEMENTS_PER_WARP
# Numbers of a group up to which one program has all of it (64 KiB of float32: both passes fit the first cache), and of a part of
# a larger one: some tiles each, so that the groups of one image keep a chip busy.
LARGEST_WHOLE = 2**14
PART = 2**13
MOST_CHANNELS = 16  # of a tile, where pixels lie side by side; each channel then has runs of 128 of them
MOST_CHANNELS_LAST = 64


class _Cut(NamedTuple):
    """How groups are cut over programs, and parts into tiles."""

    parts: int
    part_pixels: int
    constants: dict[str, int]


def _cut(channels_of_group: int, num_pixels: int, channels_last: bool) -> _Cut:
    """Cut groups of this size; nothing else is looked at, so that no bits depend on a batch."""
    if channels_last:
        channels = min(triton.next_power_of_2(channels_of_group), MOST_CHANNELS_LAST)
    else:  # a power of two that leaves no channels over
        channels = min(channels_of_group & -channels_of_group, MOST_CHANNELS)
    pixels = min(triton.next_power_of_2(max(1, num_pixels)), TILE // channels)
    channels = min(triton.next_power_of_2(channels_of_group), max(channels, TILE // pixels))
    constants = {
        "BLOCK_CHANNELS": channels,
        "BLOCK_PIXELS": pixels,
        "num_warps": max(1, channels * pixels // ELEMENTS_PER_WARP),
    }
    if channels_of_group * num_pixels <= LARGEST_WHOLE:
        return _Cut(1, num_pixels, constants)
    part_pixels = pixels * triton.cdiv(PART, channels_of_group * pixels)
    return _Cut(triton.cdiv(num_pixels, part_pixels), part_pixels, constants)


def _strides(*images: torch.Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """Return how many pixels a row has, and of each tensor the strides from example, channel, row and column to the next.

    Where in all tensors the rows follow each other as their pixels do, each pixel is a row.
    """
    height, width = images[0].shape[2:]
    if width > 1 and height > 1 and any(each.stride(2) != width * each.stride(3) for each in images):
        return width, [each.stride() for each in images]
    return 1, [(*each.stride()[:2], each.stride(2 if width == 1 else 3), 0) for each in images]


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float, silu: bool
    ) -> torch.Tensor:
        batch_size, num_channels, *size = images.shape
        groups, num_pixels = batch_size * num_groups, size[0] * size[1]
        cut = _cut(num_channels // num_groups, num_pixels, images.stride(1) == 1)
        outputs = torch.empty_like(images)
        row_width, strides = _strides(images, outputs)
        sizes = num_groups, num_channels // num_groups, num_pixels, cut.part_pixels, row_width
        kept = any(ctx.needs_input_grad)
        means, rstds = images.new_empty(2, groups, dtype=torch.float32) if kept else (None, None)
        parts = None
        if cut.parts > 1:
            parts = images.new_empty(2, groups, cut.parts, dtype=torch.float32)
            group_statistics_kernel[(groups, cut.parts)](images, parts, *sizes, *strides[0], **cut.constants)
        group_norm_kernel[(groups, cut.parts)](
            images, weight, bias, outputs, means, rstds, parts,
            *sizes, eps, weight.stride(0), bias.stride(0), *strides[0], *strides[1], SILU=silu, **cut.constants,
        )  # fmt: skip
        ctx.save_for_backward(images, weight, bias, means, rstds)
        ctx.num_groups, ctx.silu, ctx.cut = num_groups, silu, cut
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight, bias, means, rstds = ctx.saved_tensors
        needs_images, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        batch_size, num_channels, *size = images.shape
        groups, cut = batch_size * ctx.num_groups, ctx.cut
        image_gradient = torch.empty_like(images)
        row_width, strides = _strides(images, gradient, image_gradient)
        wanted = needs_weight, needs_bias
        chunks = images.new_empty(sum(wanted), batch_size * cut.parts, num_channels, dtype=torch.float32)
        each = iter(chunks)
        channel_sums = [next(each) if needed else None for needed in wanted]
        sizes = ctx.num_groups, num_channels // ctx.num_groups, size[0] * size[1], cut.part_pixels, row_width

        def launch(parts: torch.Tensor | None, written: torch.Tensor | None, *, has_sums: bool) -> None:
            group_gradients_kernel[(groups, cut.parts)](
                images, weight, bias, means, rstds, gradient, parts, written, *channel_sums,
                *sizes, weight.stride(0), bias.stride(0), *strides[0], *strides[1], *strides[2],
                HAS_SUMS=has_sums, SILU=ctx.silu, **cut.constants,
            )  # fmt: skip

        if needs_images and cut.parts > 1:
            parts = images.new_empty(3, groups, cut.parts, dtype=torch.float32)
            launch(parts, None, has_sums=False)
            launch(parts, image_gradient, has_sums=True)
        else:
            launch(None, image_gradient if needs_images else None, has_sums=False)
        each = iter(sum_chunks(chunks, weight.dtype) if any(wanted) else ())
        of_parameters = [next(each) if needed else None for needed in wanted]
        return (image_gradient if needs_images else None), *of_parameters, None, None, None


def norm_of_groups(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float, *, silu: bool
) -> torch.Tensor:
    """Normalize groups of channels of images [B, C, H, W]; then, where asked for, apply silu."""
    reject_float64("images", images)
    require_triton_device("images", images)
    with device_of(images):
        return _GroupNorm.apply(images, weight, bias, num_groups, eps, silu)
