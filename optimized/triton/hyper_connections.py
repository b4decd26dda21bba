"""How a branch reads and mixes residual streams, in one kernel forward and one backward.

    n_s = x_s / max(|x_s|, 1e-12) * sqrt(D),  p_sj = n_s . w_j,  score_sj = scale_j * p_sj + static_sj
    read = sum over s of sigmoid(score_s0) * x_s
    mixed_t = sum over s of sinkhorn(score_s,1..K)_st * x_s
    write_s = 2 * sigmoid(score_s,K+1)

Both kernels are bound by memory: a token's streams lie in the registers of its program, which reads them once and writes what is
read and mixed once; the rounds of Sinkhorn are of K * K numbers, and need no memory. Kept for backward, where a gradient is
wanted, are the numbers p, the shares, and the sums that each round divided by, from which backward finds the rounds again, last
to first: some 100 floats a token. The gradients of w are a thin matrix product, torch's.

Shapes: R tokens, K streams, D width, J = K + 2 of what is made of each stream.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.model_parts import State
from gaugeblock.optimized.triton.launch import device_of, reject_float64, require_triton_device
from gaugeblock.reference import validation
from gaugeblock.reference.torch.hyper_connections import SINKHORN_ROUNDS, SMALLEST_NORM

# A thread has 16 elements of the streams.
ELEMENTS_PER_WARP = 16 * 32
FEWEST_ELEMENTS = 4 * ELEMENTS_PER_WARP
MOST_WARPS = 16
SMALLEST_SUM = tl.constexpr(1e-12)  # of shares, where exponentials underflow; later rounds make up for it
SMALLEST_SQUARES = tl.constexpr(SMALLEST_NORM**2)
ROUNDS = tl.constexpr(SINKHORN_ROUNDS)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _load_streams(pointer, rows, streams, columns, exists, num_tokens, stride_0, stride_1, stride_k, stride_d):
    """Return streams [R, K, D] in float32, 0 where there are none, of rows that are counted over examples and tokens."""
    examples = rows // num_tokens
    of_rows = examples.to(tl.int64) * stride_0 + (rows - examples * num_tokens).to(tl.int64) * stride_1
    places = of_rows[:, None, None] + streams[None, :, None].to(tl.int64) * stride_k + columns[None, None, :] * stride_d
    return tl.load(pointer + places, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    streams_ptr, weights_ptr, scales_ptr, static_ptr, read_ptr, mixed_ptr, write_ptr,
    products_ptr, shares_ptr, sums_ptr, rstds_ptr,
    num_rows, num_tokens, width, root, stride_0, stride_1, stride_k, stride_d,
    K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    streams = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    row_exists = rows < num_rows
    column_exists = columns < width
    of_stream = row_exists[:, None] & (streams < K)[None, :]
    exists = of_stream[:, :, None] & column_exists[None, None, :]
    x = _load_streams(streams_ptr, rows, streams, columns, exists, num_tokens, stride_0, stride_1, stride_k, stride_d)
    squares = tl.sum(x * x, axis=2)
    rstd = root * tl.rsqrt(tl.maximum(squares, SMALLEST_SQUARES))
    long_rows = rows.to(tl.int64)
    places = long_rows[:, None] * K + streams[None, :]
    if rstds_ptr is not None:
        tl.store(rstds_ptr + places, rstd, mask=of_stream)

    scores = tl.full([BLOCK_ROWS, BLOCK_K, BLOCK_K], 0.0, tl.float32)
    targets = tl.arange(0, BLOCK_K)[None, None, :]
    for j in tl.static_range(K + 2):
        weight = tl.load(weights_ptr + j * width + columns, mask=column_exists, other=0.0)
        product = tl.sum(x * weight[None, None, :], axis=2) * rstd
        static = tl.load(static_ptr + streams * (K + 2) + j, mask=streams < K, other=0.0)
        score = tl.load(scales_ptr + j) * product + static[None, :]
        if products_ptr is not None:
            tl.store(products_ptr + places * (K + 2) + j, product, mask=of_stream)
        if j == 0:
            read = _sigmoid(score)[:, :, None] * x
            read_places = long_rows[:, None] * width + columns[None, :]
            tl.store(read_ptr + read_places, tl.sum(read, axis=1), mask=row_exists[:, None] & column_exists[None, :])
        elif j == K + 1:
            tl.store(write_ptr + places, 2 * _sigmoid(score), mask=of_stream)
        else:
            scores = tl.where(targets == j - 1, score[:, :, None], scores)

    is_share = (streams < K)[None, :, None] & (targets < K)
    largest = tl.max(tl.where((streams < K)[None, :, None], scores, float("-inf")), axis=1)
    shares = tl.where(is_share, tl.exp(scores - largest[:, None, :]), 0.0)
    for index in range(ROUNDS):
        of_columns = tl.sum(shares, axis=1)
        shares = shares / tl.maximum(of_columns, SMALLEST_SUM)[:, None, :]
        of_rows = tl.sum(shares, axis=2)
        shares = shares / tl.maximum(of_rows, SMALLEST_SUM)[:, :, None]
        if sums_ptr is not None:
            sum_places = (long_rows[:, None] * (2 * ROUNDS) + 2 * index) * K + streams[None, :]
            tl.store(sums_ptr + sum_places, of_columns, mask=of_stream)
            tl.store(sums_ptr + sum_places + K, of_rows, mask=of_stream)
    if shares_ptr is not None:
        tl.store(shares_ptr + places[:, :, None] * K + targets, shares, mask=row_exists[:, None, None] & is_share)
    for t in tl.static_range(K):
        share = tl.sum(tl.where(targets == t, shares, 0.0), axis=2)
        mixed = tl.sum(share[:, :, None] * x, axis=1)
        mixed_places = (long_rows[:, None] * K + t) * width + columns[None, :]
        tl.store(mixed_ptr + mixed_places, mixed, mask=row_exists[:, None] & column_exists[None, :])


@triton.jit
def _backward_kernel(
    streams_ptr, weights_ptr, scales_ptr, static_ptr, products_ptr, shares_ptr, sums_ptr, rstds_ptr,
    read_gradients_ptr, mixed_gradients_ptr, write_gradients_ptr, stream_gradients_ptr, score_gradients_ptr,
    num_rows, num_tokens, width, root, stride_0, stride_1, stride_k, stride_d,
    K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a division b = a / max(sum(a), m): da = (db - sum(db * b)) / sum(a), or db / m; and a = b * max(sum(a), m)."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    streams = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    row_exists = rows < num_rows
    column_exists = columns < width
    of_stream = row_exists[:, None] & (streams < K)[None, :]
    exists = of_stream[:, :, None] & column_exists[None, None, :]
    x = _load_streams(streams_ptr, rows, streams, columns, exists, num_tokens, stride_0, stride_1, stride_k, stride_d)
    long_rows = rows.to(tl.int64)
    places = long_rows[:, None] * K + streams[None, :]
    targets = tl.arange(0, BLOCK_K)[None, None, :]
    of_share = of_stream[:, :, None] & (targets < K)
    mask = row_exists[:, None] & column_exists[None, :]

    shares = tl.load(shares_ptr + places[:, :, None] * K + targets, mask=of_share, other=0.0)
    gradients = tl.full([BLOCK_ROWS, BLOCK_K, BLOCK_K], 0.0, tl.float32)
    of_x = tl.full([BLOCK_ROWS, BLOCK_K, BLOCK_COLUMNS], 0.0, tl.float32)
    for t in tl.static_range(K):
        gradient_places = (long_rows[:, None] * K + t) * width + columns[None, :]
        mixed_gradient = tl.load(mixed_gradients_ptr + gradient_places, mask=mask, other=0.0).to(tl.float32)[:, None, :]
        share = tl.sum(tl.where(targets == t, shares, 0.0), axis=2)
        of_x += share[:, :, None] * mixed_gradient
        of_share_t = tl.sum(x * mixed_gradient, axis=2)
        gradients = tl.where(targets == t, of_share_t[:, :, None], gradients)
    for index in range(ROUNDS):
        sum_places = (long_rows[:, None] * (2 * ROUNDS) + 2 * (ROUNDS - 1 - index)) * K + streams[None, :]
        of_rows = tl.load(sums_ptr + sum_places + K, mask=of_stream, other=1.0)
        inner = tl.where(of_rows > SMALLEST_SUM, tl.sum(gradients * shares, axis=2), 0.0)
        of_rows = tl.maximum(of_rows, SMALLEST_SUM)[:, :, None]
        gradients = (gradients - inner[:, :, None]) / of_rows
        shares = shares * of_rows
        of_columns = tl.load(sums_ptr + sum_places, mask=of_stream, other=1.0)
        inner = tl.where(of_columns > SMALLEST_SUM, tl.sum(gradients * shares, axis=1), 0.0)
        of_columns = tl.maximum(of_columns, SMALLEST_SUM)[:, None, :]
        gradients = (gradients - inner[:, None, :]) / of_columns
        shares = shares * of_columns
    gradients = gradients * shares  # of an exponential

    rstd = tl.load(rstds_ptr + places, mask=of_stream, other=0.0)
    read_places = long_rows[:, None] * width + columns[None, :]
    read_gradient = tl.load(read_gradients_ptr + read_places, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    of_normalized = tl.full([BLOCK_ROWS, BLOCK_K, BLOCK_COLUMNS], 0.0, tl.float32)
    projection = tl.full([BLOCK_ROWS, BLOCK_K], 0.0, tl.float32)
    for j in tl.static_range(K + 2):
        scale = tl.load(scales_ptr + j)
        product = tl.load(products_ptr + places * (K + 2) + j, mask=of_stream, other=0.0)
        static = tl.load(static_ptr + streams * (K + 2) + j, mask=streams < K, other=0.0)
        share = _sigmoid(scale * product + static[None, :])
        if j == 0:
            of_x += share[:, :, None] * read_gradient
            of_score = tl.sum(x * read_gradient, axis=2) * share * (1 - share)
        elif j == K + 1:
            write_gradient = tl.load(write_gradients_ptr + places, mask=of_stream, other=0.0)
            of_score = 2 * write_gradient * share * (1 - share)
        else:
            of_score = tl.sum(tl.where(targets == j - 1, gradients, 0.0), axis=2)
        tl.store(score_gradients_ptr + places * (K + 2) + j, of_score, mask=of_stream)
        weight = tl.load(weights_ptr + j * width + columns, mask=column_exists, other=0.0)
        of_normalized += (scale * of_score)[:, :, None] * weight[None, None, :]
        projection += scale * of_score * product
    # a vector shorter than the least norm is multiplied by what does not depend on it
    is_free = tl.sum(x * x, axis=2) > SMALLEST_SQUARES
    projection = tl.where(is_free, projection, 0.0) / (root * root)
    normalized = x * rstd[:, :, None]
    of_x += rstd[:, :, None] * (of_normalized - normalized * projection[:, :, None])
    out = places[:, :, None] * width + columns[None, None, :]
    tl.store(stream_gradients_ptr + out, of_x, mask=exists)


def _blocks(num_streams: int, width: int) -> dict[str, int]:
    """Return the sizes of a block, whole tokens, as many as fill four warps."""
    block_k, columns = triton.next_power_of_2(num_streams), triton.next_power_of_2(width)
    rows = max(1, FEWEST_ELEMENTS // (block_k * columns))
    warps = min(MOST_WARPS, triton.next_power_of_2(triton.cdiv(rows * block_k * columns, ELEMENTS_PER_WARP)))
    return {"K": num_streams, "BLOCK_ROWS": rows, "BLOCK_K": block_k, "BLOCK_COLUMNS": columns, "num_warps": warps}


class _HyperConnection(torch.autograd.Function):
    """Of weights [J, D], scales [J] and static scores [K, J] in float32, all contiguous."""

    @staticmethod
    def forward(
        ctx: Any, streams: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, static: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        *leading, num_streams, width = streams.shape
        num_rows, num_tokens = leading[0] * leading[1], leading[1]
        read, mixed = streams.new_empty(*leading, width), streams.new_empty(streams.shape)
        write = streams.new_empty(*leading, num_streams, dtype=torch.float32)
        kept: tuple[torch.Tensor | None, ...] = (None, None, None, None)
        if any(ctx.needs_input_grad):
            products = write.new_empty(num_rows, num_streams, num_streams + 2)
            shares, sums = (write.new_empty(num_rows, each, num_streams) for each in (num_streams, 2 * SINKHORN_ROUNDS))
            kept = products, shares, sums, write.new_empty(num_rows, num_streams)
        blocks = _blocks(num_streams, width)
        if num_rows:
            _forward_kernel[(triton.cdiv(num_rows, blocks["BLOCK_ROWS"]),)](
                streams, weights, scales, static, read, mixed, write, *kept,
                num_rows, num_tokens, width, width**0.5, *streams.stride(), **blocks,
            )  # fmt: skip
        ctx.save_for_backward(streams, weights, scales, static, *kept)
        return read, mixed, write

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, read_gradient: torch.Tensor, mixed_gradient: torch.Tensor, write_gradient: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        streams, weights, scales, static, products, shares, sums, rstds = ctx.saved_tensors
        *leading, num_streams, width = streams.shape
        num_rows, num_tokens = leading[0] * leading[1], leading[1]
        of_streams, of_scores = streams.new_empty(streams.shape), torch.empty_like(products)
        blocks = _blocks(num_streams, width)
        gradients = (each.contiguous() for each in (read_gradient, mixed_gradient, write_gradient))
        if num_rows:
            _backward_kernel[(triton.cdiv(num_rows, blocks["BLOCK_ROWS"]),)](
                streams, weights, scales, static, products, shares, sums, rstds, *gradients, of_streams, of_scores,
                num_rows, num_tokens, width, width**0.5, *streams.stride(), **blocks,
            )  # fmt: skip
        of_products = (of_scores * scales * rstds[..., None]).flatten(0, 1)
        of_weights = of_products.mT @ streams.reshape(num_rows * num_streams, width).float()
        return of_streams, of_weights, (of_scores * products).sum((0, 1)), of_scores.sum(0)


def hyper_connection(state: State, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a branch reads of streams [B, S, K, D], how they are mixed, and how strongly its result is written to each.

    As `gaugeblock.reference.torch.hyper_connections.hyper_connection`, of streams in bfloat16, float16 or float32 of any strides.
    Each gradient is computed in float32 and rounded once. Differentiable once.

    Raises: as that; TypeError where the streams are float64; ValueError where Triton cannot run on the device.
    """
    validation.hyper_connection(state, streams)
    reject_float64("streams", streams)
    require_triton_device("streams", streams)
    return unchecked_hyper_connection(state, streams)


def unchecked_hyper_connection(state: State, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `hyper_connection`, of a call that is known to be good."""
    own = {name: each.float() for name, each in state.items()}
    weights = torch.cat([own["dynamic_alpha_fn"][0], own["dynamic_beta_fn"]], dim=1).mT * (1 + own["norm.gamma"])
    residual = own["residual_scale"].expand(streams.shape[2])
    scales = torch.cat([own["pre_branch_scale"], residual, own["h_post_scale"].reshape(1)])
    static = torch.cat([own["static_alpha"], own["static_beta"][:, 0]], dim=1)
    with device_of(streams):
        return _HyperConnection.apply(streams, weights.contiguous(), scales, static)
