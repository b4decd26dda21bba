"""Routers whose experts have room for so many tokens: a choice, and a scan over the tokens.

The choice is `softmax_topk` with one expert a token, forward and backward. A token's place among those of its expert
is the number of them in earlier blocks of tokens, and before it in its own. So two kernels follow: how many tokens of
each block chose each expert; and, when torch has added those up over the blocks, who came too late. They read 16 bytes
a token and write one, and 4 bytes a block and expert, little beside the logits; torch sets the weights of the late to 0.
Places are integers, so that nothing depends on the order of programs.
"""

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.launch import device_of, program_rows
from gaugeblock.optimized.triton.routers import softmax_topk
from gaugeblock.reference import validation
from gaugeblock.reference.torch.capacity_routers import expert_capacity

BLOCK_TOKENS = 64  # compared with each other: 4096 pairs, 32 a thread of 4 warps
BLOCK_EXPERTS = 64  # compared with a block of tokens at a time


@triton.jit(do_not_specialize=["num_tokens"])
def _count_choices(ids_ptr, counts_ptr, num_tokens, num_experts, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """counts[block, e] = tokens of the block that chose e."""
    rows = program_rows(BLOCK_TOKENS)
    ids = tl.load(ids_ptr + rows, mask=rows < num_tokens, other=-1)
    counts_ptr += tl.program_id(0).to(tl.int64) * num_experts
    for first in range(0, num_experts, BLOCK_EXPERTS):
        experts = first + tl.arange(0, BLOCK_EXPERTS)
        chosen = (ids[:, None] == experts[None, :]).to(tl.int32)
        tl.store(counts_ptr + experts, tl.sum(chosen, axis=0), mask=experts < num_experts)


@triton.jit(do_not_specialize=["num_tokens", "capacity"])
def _find_overflow(
    ids_ptr, counts_ptr, ends_ptr, dropped_ptr, num_tokens, num_experts, capacity, BLOCK_TOKENS: tl.constexpr
):  # fmt: skip
    """dropped = place of the token among those of its expert, the first being 0, >= capacity."""
    rows = program_rows(BLOCK_TOKENS)
    in_batch = rows < num_tokens
    ids = tl.load(ids_ptr + rows, mask=in_batch, other=0)
    tokens = tl.arange(0, BLOCK_TOKENS)
    is_before = (ids[:, None] == ids[None, :]) & (tokens[None, :] < tokens[:, None])
    cells = tl.program_id(0).to(tl.int64) * num_experts + ids
    in_earlier_blocks = tl.load(ends_ptr + cells, mask=in_batch, other=0) - tl.load(counts_ptr + cells, mask=in_batch, other=0)
    dropped = in_earlier_blocks + tl.sum(is_before.to(tl.int32), axis=1) >= capacity
    tl.store(dropped_ptr + rows, dropped, mask=in_batch)


def overflow(expert_ids: torch.Tensor, num_experts: int, capacity: int) -> torch.Tensor:
    """Return which tokens come after `capacity` others of the same expert, [num_tokens], bool.

    Args:
        expert_ids: [num_tokens], int64 in 0..num_experts - 1, contiguous.
    """
    num_tokens = expert_ids.shape[0]
    dropped = torch.empty_like(expert_ids, dtype=torch.bool)
    if num_tokens:
        blocks = triton.cdiv(num_tokens, BLOCK_TOKENS)
        counts = expert_ids.new_empty((blocks, num_experts), dtype=torch.int32)
        with device_of(expert_ids):
            _count_choices[(blocks,)](expert_ids, counts, num_tokens, num_experts, BLOCK_TOKENS, BLOCK_EXPERTS)
            ends = counts.cumsum(0, dtype=torch.int32)
            _find_overflow[(blocks,)](expert_ids, counts, ends, dropped, num_tokens, num_experts, capacity, BLOCK_TOKENS)
    return dropped


def switch_top1(router_logits: torch.Tensor, *, capacity_factor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose one expert of each token, if there is room: `reference.torch.capacity_routers.switch_top1`.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides.
        capacity_factor: Room in all experts together, in tokens per token; positive.

    Returns:
        weights: [num_tokens], float32 (float64 for float64 logits); differentiable once.
        expert_ids: [num_tokens], int64; NaN highest, of equals the lower id.
        dropped: [num_tokens], bool.

    Raises:
        TypeError: `router_logits` is not a floating array, or `capacity_factor` is not a number.
        ValueError: `router_logits` is not of rank 2, has no experts or is not where Triton runs, or
            `capacity_factor` is not positive.

    Source: Switch Transformers (arXiv:2101.03961), section 2.2, equation 3, and figure 3.
    """
    validation.switch_top1(router_logits, capacity_factor)
    topk_weights, topk_ids = softmax_topk(router_logits, top_k=1, renormalize=False)
    num_tokens, num_experts = router_logits.shape
    expert_ids, capacity = topk_ids[:, 0], expert_capacity(num_tokens, num_experts, capacity_factor)
    dropped = overflow(expert_ids, num_experts, capacity)
    return topk_weights[:, 0].masked_fill(dropped, 0), expert_ids, dropped
