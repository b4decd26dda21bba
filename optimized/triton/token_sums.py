"""What kernels share that add up over the tokens that count: which tokens do, logits, choices, and the mean.

A program adds up its tokens in registers and writes its sums; one more program adds those up. Tokens belong to programs
by their place alone and nothing is added by atomics, so that every run gives the same bits. Padding is never read,
neither its logits nor its ids.
"""

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.arithmetic import divide

# Programs that write sums: a few for each of a GPU's processors.
MOST_PROGRAMS = 512
# Logits that a program has in registers: eight per thread of four warps. More make its sums spill.
TILE = 1024


@triton.jit
def is_counted(mask_ptr, mask_stride, rows, num_tokens):
    """Return whether the rows are tokens, and no padding."""
    in_batch = rows < num_tokens
    return in_batch & tl.load(mask_ptr + rows * mask_stride, mask=in_batch, other=0).to(tl.int1)


@triton.jit
def add_choices(counts, ids_ptr, row_stride, column_stride, rows, counted, experts, top_k):
    """Add to counts [rows, experts] how often the rows that are counted choose each expert."""
    chosen_ptr = ids_ptr + rows * row_stride
    for _ in range(top_k):
        ids = tl.load(chosen_ptr, mask=counted, other=0)
        counts += (counted & (ids.to(tl.int32) == experts)).to(tl.int32)
        chosen_ptr += column_stride  # step by step: a column times its stride may pass 2^31
    return counts


@triton.jit
def load_logits(logits_ptr, row_stride, column_stride, rows, counted, experts, exists, dtype: tl.constexpr):
    """Return logits[rows, experts] in a compute dtype, -inf where there is no expert, 0 where a token does not count."""
    offsets = rows * row_stride + experts.to(tl.int64) * column_stride
    logits = tl.load(logits_ptr + offsets, mask=counted & exists, other=0.0).to(dtype)
    return tl.where(exists, logits, float("-inf"))


@triton.jit
def _mean(sums_ptr, counts_ptr, mean_ptr, slope_ptr, num_sums, BLOCK_SUMS: tl.constexpr):
    """Divide the sum of all sums by that of all counts; the slope is the derivative of the mean by a summand."""
    sums = tl.full([BLOCK_SUMS], 0.0, sums_ptr.dtype.element_ty)
    counts = tl.full([BLOCK_SUMS], 0, tl.int64)
    for first in range(0, num_sums, BLOCK_SUMS):
        places = first + tl.arange(0, BLOCK_SUMS)
        sums += tl.load(sums_ptr + places, mask=places < num_sums, other=0.0)
        counts += tl.load(counts_ptr + places, mask=places < num_sums, other=0).to(tl.int64)
    total = tl.sum(sums, axis=0, keep_dims=True)
    count = tl.maximum(tl.sum(counts, axis=0, keep_dims=True), 1).to(total.dtype)
    first = tl.arange(0, 1)
    tl.store(mean_ptr + first, divide(total, count))
    tl.store(slope_ptr + first, 1.0 / count)


def blocks_of(num_tokens: int, num_experts: int) -> tuple[int, dict[str, int]]:
    """Return the blocks of tokens that there are, and the constants of a kernel that works on them."""
    lanes = triton.next_power_of_2(num_experts)
    block_tokens = max(1, TILE // lanes)
    constants = {"num_experts": num_experts, "BLOCK_TOKENS": block_tokens, "BLOCK_EXPERTS": lanes}
    return triton.cdiv(num_tokens, block_tokens), constants


def mean_of(sums: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean, [], and its slope, []."""
    mean, slope = sums.new_empty(()), sums.new_empty(())
    _mean[(1,)](sums, counts, mean, slope, sums.shape[0], BLOCK_SUMS=triton.next_power_of_2(MOST_PROGRAMS))
    return mean, slope
