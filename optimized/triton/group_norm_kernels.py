"""The kernels of `group_norms.py`: statistics, results and gradients of a part of a group of channels.

Shapes: B batch_size, C channels, G num_groups, P pixels, N parts of a group.
"""

import triton
import triton.language as tl

from gaugeblock.optimized.triton.activations import activate, activate_backward

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
def _numbers(channels_of_group, num_pixels):
    """Return how many numbers a group has, as a float: integers of 32 bits end at 2^31."""
    return num_pixels * 1.0 * channels_of_group


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
def group_statistics_kernel(
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
    numbers = _numbers(channels_of_group, num_pixels)
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
def group_norm_kernel(
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
    rstd = tl.rsqrt(squares / _numbers(channels_of_group, num_pixels) + eps)
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
def group_gradients_kernel(
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
        numbers = _numbers(channels_of_group, num_pixels)
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
