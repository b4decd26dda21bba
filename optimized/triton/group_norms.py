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

Shapes: B batch_size, C channels, G num_groups, P pixels, N parts of a group.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.activations import activate, activate_backward
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
MERGED = tl.constexpr(128)  # parts that are merged at a time


@triton.jit
def _load(pointers, mask):
    """Return float32, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _channels(first, channels_of_group, BLOCK_CHANNELS: tl.constexpr):
    """Return the channels of a tile, int64, and which of them there are."""
    channels = (first + tl.arange(0, BLOCK_CHANNELS)[:, None]).to(tl.int64)
    return channels, channels < channels_of_group


@triton.jit
def _pixels(first, end, row_width, BLOCK_PIXELS: tl.constexpr):
    """Return rows and columns of the pixels of a tile, int64, and which of them there are; of width 1, a pixel is a row."""
    pixels = first + tl.arange(0, BLOCK_PIXELS)[None, :]
    rows = pixels // row_width
    return rows.to(tl.int64), (pixels - rows * row_width).to(tl.int64), pixels < end


@triton.jit
def _part(num_pixels, part_pixels):
    """Return the first pixel of this program's part, and the one behind its last."""
    first = tl.program_id(1) * part_pixels
    return first, tl.minimum(first + part_pixels, num_pixels)


@triton.jit
def _place(num_groups, channels_of_group):
    """Return the example of this program and the first channel of its group, int64."""
    example = tl.program_id(0) // num_groups
    channel = (tl.program_id(0) - example * num_groups) * channels_of_group
    return example.to(tl.int64), channel.to(tl.int64)


@triton.jit
def _statistics(
    images_ptr, channels_of_group, first_pixel, end_pixel, row_width, channel_stride, row_stride, column_stride,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """Return mean and sum of squared distances from it, of a part of a group."""
    counts = tl.full([BLOCK_CHANNELS, BLOCK_PIXELS], 0.0, tl.float32)
    means = tl.full([BLOCK_CHANNELS, BLOCK_PIXELS], 0.0, tl.float32)
    squares = tl.full([BLOCK_CHANNELS, BLOCK_PIXELS], 0.0, tl.float32)
    for first_channel in range(0, channels_of_group, BLOCK_CHANNELS):
        channels, channel_exists = _channels(first_channel, channels_of_group, BLOCK_CHANNELS)
        for first in range(first_pixel, end_pixel, BLOCK_PIXELS):
            rows, columns, pixel_exists = _pixels(first, end_pixel, row_width, BLOCK_PIXELS)
            mask = channel_exists & pixel_exists
            values = _load(images_ptr + channels * channel_stride + (rows * row_stride + columns * column_stride), mask)
            counts += mask.to(tl.float32)
            distances = tl.where(mask, values - means, 0.0)
            means += distances / tl.maximum(counts, 1.0)
            squares += distances * (values - means)
    return _merged(counts, means, squares)


@triton.jit
def _merged(counts, means, squares):
    """Return mean and sum of squared distances of all lanes, each of which has its own."""
    mean = tl.sum(counts * means) / tl.sum(counts)
    return mean, tl.sum(squares + counts * (means - mean) * (means - mean))


@triton.jit
def _statistics_kernel(
    images_ptr, parts_ptr, num_groups, channels_of_group, num_pixels, part_pixels, row_width,
    example_stride, channel_stride, row_stride, column_stride,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """Write means, then sums of squares, of the parts, [2, B * G, N]."""
    example, channel = _place(num_groups, channels_of_group)
    first_pixel, end_pixel = _part(num_pixels, part_pixels)
    mean, squares = _statistics(
        images_ptr + example * example_stride + channel * channel_stride, channels_of_group, first_pixel, end_pixel,
        row_width, channel_stride, row_stride, column_stride, BLOCK_CHANNELS, BLOCK_PIXELS,
    )  # fmt: skip
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + part, mean)
    tl.store(parts_ptr + tl.num_programs(0) * tl.num_programs(1) + part, squares)


@triton.jit
def _load_parts(parts_ptr, first, kind):
    """Return what a kernel before has written for parts of this program's group, 0 where there are no more."""
    parts = first + tl.arange(0, MERGED)
    offsets = (kind * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + parts
    return tl.load(parts_ptr + offsets, mask=parts < tl.num_programs(1), other=0.0)


@triton.jit
def _merged_parts(parts_ptr, channels_of_group, num_pixels, part_pixels):
    """Return mean and sum of squared distances of a group from those of its parts."""
    numbers = channels_of_group * num_pixels
    means = tl.full([MERGED], 0.0, tl.float32)
    for first in range(0, tl.num_programs(1), MERGED):
        means += _counts(first, channels_of_group, num_pixels, part_pixels) * _load_parts(parts_ptr, first, 0)
    mean = tl.sum(means) / numbers
    squares = tl.full([MERGED], 0.0, tl.float32)
    for first in range(0, tl.num_programs(1), MERGED):
        distances = _load_parts(parts_ptr, first, 0) - mean
        counts = _counts(first, channels_of_group, num_pixels, part_pixels)
        squares += _load_parts(parts_ptr, first, 1) + counts * distances * distances
    return mean, tl.sum(squares)


@triton.jit
def _counts(first, channels_of_group, num_pixels, part_pixels):
    """Return how many numbers parts have."""
    left = num_pixels - (first + tl.arange(0, MERGED)) * part_pixels
    return (tl.minimum(tl.maximum(left, 0), part_pixels) * channels_of_group).to(tl.float32)


@triton.jit
def _forward_kernel(
    images_ptr, weight_ptr, bias_ptr, outputs_ptr, means_ptr, rstds_ptr, parts_ptr,
    num_groups, channels_of_group, num_pixels, part_pixels, row_width, eps, weight_stride, bias_stride,
    example_stride, channel_stride, row_stride, column_stride,
    output_example_stride, output_channel_stride, output_row_stride, output_column_stride,
    SILU: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    example, channel = _place(num_groups, channels_of_group)
    first_pixel, end_pixel = _part(num_pixels, part_pixels)
    images_ptr += example * example_stride + channel * channel_stride
    outputs_ptr += example * output_example_stride + channel * output_channel_stride
    weight_ptr += channel * weight_stride
    bias_ptr += channel * bias_stride
    if parts_ptr is None:
        mean, squares = _statistics(
            images_ptr, channels_of_group, first_pixel, end_pixel, row_width, channel_stride, row_stride, column_stride,
            BLOCK_CHANNELS, BLOCK_PIXELS,
        )  # fmt: skip
    else:
        mean, squares = _merged_parts(parts_ptr, channels_of_group, num_pixels, part_pixels)
    rstd = tl.rsqrt(squares / (channels_of_group * num_pixels) + eps)
    if means_ptr is not None:
        tl.store(means_ptr + tl.program_id(0), mean, mask=tl.program_id(1) == 0)
        tl.store(rstds_ptr + tl.program_id(0), rstd, mask=tl.program_id(1) == 0)

    for first_channel in range(0, channels_of_group, BLOCK_CHANNELS):
        channels, channel_exists = _channels(first_channel, channels_of_group, BLOCK_CHANNELS)
        weight = _load(weight_ptr + channels * weight_stride, channel_exists)
        bias = _load(bias_ptr + channels * bias_stride, channel_exists)
        for first in range(first_pixel, end_pixel, BLOCK_PIXELS):
            rows, columns, pixel_exists = _pixels(first, end_pixel, row_width, BLOCK_PIXELS)
            mask = channel_exists & pixel_exists
            values = _load(images_ptr + channels * channel_stride + (rows * row_stride + columns * column_stride), mask)
            out = (values - mean) * rstd * weight + bias
            if SILU:
                out = activate(out, out, 1.0, 0.0, NONLINEARITY="silu", GATED=False)
            offsets = channels * output_channel_stride + (rows * output_row_stride + columns * output_column_stride)
            tl.store(outputs_ptr + offsets, out, mask=mask)


@triton.jit
def _load_pair(images_ptrs, gradients_ptrs, mask, mean, rstd, weight, bias, SILU: tl.constexpr):
    """Return normalized values, 0 where masked, and the gradients of what activation is applied to."""
    normalized = tl.where(mask, (_load(images_ptrs, mask) - mean) * rstd, 0.0)
    gradient = _load(gradients_ptrs, mask)
    if SILU:
        before = normalized * weight + bias
        _, gradient, _ = activate_backward(before, before, gradient, 1.0, 0.0, NONLINEARITY="silu", GATED=False)
    return normalized, gradient


@triton.jit
def _sums(
    images_ptr, gradients_ptr, weight_ptr, bias_ptr, weight_sums_ptr, bias_sums_ptr, mean, rstd,
    channels_of_group, first_pixel, end_pixel, row_width, weight_stride, bias_stride,
    channel_stride, row_stride, column_stride, gradient_channel_stride, gradient_row_stride, gradient_column_stride,
    SILU: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """Write the sums of each channel; return those of the part: of gradient * normalized, gradient, and normalized values."""
    group_products = tl.full([BLOCK_CHANNELS, 1], 0.0, tl.float32)
    group_gradients = tl.full([BLOCK_CHANNELS, 1], 0.0, tl.float32)
    group_normalized = tl.full([BLOCK_CHANNELS, BLOCK_PIXELS], 0.0, tl.float32)
    for first_channel in range(0, channels_of_group, BLOCK_CHANNELS):
        channels, channel_exists = _channels(first_channel, channels_of_group, BLOCK_CHANNELS)
        weight = _load(weight_ptr + channels * weight_stride, channel_exists)
        bias = _load(bias_ptr + channels * bias_stride, channel_exists)
        products = tl.full([BLOCK_CHANNELS, BLOCK_PIXELS], 0.0, tl.float32)
        gradients = tl.full([BLOCK_CHANNELS, BLOCK_PIXELS], 0.0, tl.float32)
        for first in range(first_pixel, end_pixel, BLOCK_PIXELS):
            rows, columns, pixel_exists = _pixels(first, end_pixel, row_width, BLOCK_PIXELS)
            offsets = channels * gradient_channel_stride + (rows * gradient_row_stride + columns * gradient_column_stride)
            normalized, gradient = _load_pair(
                images_ptr + channels * channel_stride + (rows * row_stride + columns * column_stride),
                gradients_ptr + offsets, channel_exists & pixel_exists, mean, rstd, weight, bias, SILU,
            )  # fmt: skip
            products += gradient * normalized
            gradients += gradient
            group_normalized += normalized
        products = tl.sum(products, axis=1)[:, None]
        gradients = tl.sum(gradients, axis=1)[:, None]
        if weight_sums_ptr is not None:
            tl.store(weight_sums_ptr + channels, products, mask=channel_exists)
        if bias_sums_ptr is not None:
            tl.store(bias_sums_ptr + channels, gradients, mask=channel_exists)
        group_products += products * weight
        group_gradients += gradients * weight
    return tl.sum(group_products), tl.sum(group_gradients), tl.sum(group_normalized)


@triton.jit
def _backward_kernel(
    images_ptr, weight_ptr, bias_ptr, means_ptr, rstds_ptr, gradients_ptr, parts_ptr,
    image_gradients_ptr, weight_sums_ptr, bias_sums_ptr,
    num_groups, channels_of_group, num_pixels, part_pixels, row_width, weight_stride, bias_stride,
    example_stride, channel_stride, row_stride, column_stride,
    gradient_example_stride, gradient_channel_stride, gradient_row_stride, gradient_column_stride,
    out_example_stride, out_channel_stride, out_row_stride, out_column_stride,
    HAS_SUMS: tl.constexpr, SILU: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """With n = (x - mean) * rstd and dn = dout * weight: dx = rstd * (dn - mean(dn) - z * mean(dn * z)).

    z is n less its own mean: a rounded mean leaves some, up to (mean / sigma) units, and a gradient may be smaller than that.
    Sums that are there are read; else they are computed, and written if anybody reads them.
    """
    example, channel = _place(num_groups, channels_of_group)
    first_pixel, end_pixel = _part(num_pixels, part_pixels)
    images_ptr += example * example_stride + channel * channel_stride
    gradients_ptr += example * gradient_example_stride + channel * gradient_channel_stride
    weight_ptr += channel * weight_stride
    bias_ptr += channel * bias_stride
    mean = tl.load(means_ptr + tl.program_id(0))
    rstd = tl.load(rstds_ptr + tl.program_id(0))
    if HAS_SUMS:
        products = tl.full([MERGED], 0.0, tl.float32)
        gradients = tl.full([MERGED], 0.0, tl.float32)
        normalized_values = tl.full([MERGED], 0.0, tl.float32)
        for first in range(0, tl.num_programs(1), MERGED):
            products += _load_parts(parts_ptr, first, 0)
            gradients += _load_parts(parts_ptr, first, 1)
            normalized_values += _load_parts(parts_ptr, first, 2)
        product_sum = tl.sum(products)
        gradient_sum = tl.sum(gradients)
        normalized_sum = tl.sum(normalized_values)
    else:
        sums = (example * tl.num_programs(1) + tl.program_id(1)) * num_groups * channels_of_group + channel
        if weight_sums_ptr is not None:
            weight_sums_ptr += sums
        if bias_sums_ptr is not None:
            bias_sums_ptr += sums
        product_sum, gradient_sum, normalized_sum = _sums(
            images_ptr, gradients_ptr, weight_ptr, bias_ptr, weight_sums_ptr, bias_sums_ptr, mean, rstd,
            channels_of_group, first_pixel, end_pixel, row_width, weight_stride, bias_stride,
            channel_stride, row_stride, column_stride,
            gradient_channel_stride, gradient_row_stride, gradient_column_stride,
            SILU, BLOCK_CHANNELS, BLOCK_PIXELS,
        )  # fmt: skip
        if parts_ptr is not None:
            num_parts = tl.num_programs(0) * tl.num_programs(1)
            parts_ptr += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            tl.store(parts_ptr, product_sum)
            tl.store(parts_ptr + num_parts, gradient_sum)
            tl.store(parts_ptr + 2 * num_parts, normalized_sum)

    if image_gradients_ptr is not None:
        image_gradients_ptr += example * out_example_stride + channel * out_channel_stride
        numbers = channels_of_group * num_pixels
        mean_gradient = gradient_sum / numbers
        mean_normalized = normalized_sum / numbers
        projection = product_sum / numbers - mean_gradient * mean_normalized
        for first_channel in range(0, channels_of_group, BLOCK_CHANNELS):
            channels, channel_exists = _channels(first_channel, channels_of_group, BLOCK_CHANNELS)
            weight = _load(weight_ptr + channels * weight_stride, channel_exists)
            bias = _load(bias_ptr + channels * bias_stride, channel_exists)
            for first in range(first_pixel, end_pixel, BLOCK_PIXELS):
                rows, columns, pixel_exists = _pixels(first, end_pixel, row_width, BLOCK_PIXELS)
                mask = channel_exists & pixel_exists
                offsets = channels * gradient_channel_stride + (rows * gradient_row_stride + columns * gradient_column_stride)
                normalized, gradient = _load_pair(
                    images_ptr + channels * channel_stride + (rows * row_stride + columns * column_stride),
                    gradients_ptr + offsets, mask, mean, rstd, weight, bias, SILU,
                )  # fmt: skip
                out = rstd * (gradient * weight - mean_gradient - (normalized - mean_normalized) * projection)
                offsets = channels * out_channel_stride + (rows * out_row_stride + columns * out_column_stride)
                tl.store(image_gradients_ptr + offsets, out, mask=mask)


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
            _statistics_kernel[(groups, cut.parts)](images, parts, *sizes, *strides[0], **cut.constants)
        _forward_kernel[(groups, cut.parts)](
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
            _backward_kernel[(groups, cut.parts)](
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
