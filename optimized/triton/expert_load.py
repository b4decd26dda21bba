"""How often each expert is chosen, as the balance losses count it.

Each program compares its tokens' ids with all experts and adds up the hits in registers; the sums of programs are
added up by torch. Nothing is added by atomics. It is bound by the launches: ids are few bytes.
"""

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.launch import device_of, program_rows, require_triton_device
from gaugeblock.optimized.triton.token_sums import MOST_PROGRAMS, add_choices, blocks_of, is_counted
from gaugeblock.reference import validation


@triton.jit(do_not_specialize=["num_tokens"])
def _count(
    ids_ptr, mask_ptr, counts_ptr, num_tokens, row_stride, column_stride, mask_stride, top_k: tl.constexpr,
    num_experts: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, BLOCK_EXPERTS)
    counts = tl.full([BLOCK_TOKENS, BLOCK_EXPERTS], 0, tl.int32)
    for first in range(0, num_tokens, tl.num_programs(0) * BLOCK_TOKENS):
        rows = first + program_rows(BLOCK_TOKENS)[:, None]
        counted = is_counted(mask_ptr, mask_stride, rows, num_tokens)
        counts = add_choices(counts, ids_ptr, row_stride, column_stride, rows, counted, experts[None, :], top_k)
    tl.store(counts_ptr + tl.program_id(0) * num_experts + experts, tl.sum(counts, axis=0), mask=experts < num_experts)


def expert_load(topk_ids: torch.Tensor, attention_mask: torch.Tensor, *, num_experts: int) -> torch.Tensor:
    """Count how often each expert is chosen: `reference.torch.auxiliary_losses.expert_load`, in one pass over the ids.

    Args:
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1, any strides.
        attention_mask: [num_tokens], bool, False for padding.
        num_experts: Number of experts.

    Returns:
        [num_experts], int64.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `num_experts` is no integer.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, there are none, or Triton cannot
            run on the device.

    Source: `gaugeblock.reference.torch.auxiliary_losses.expert_load`.
    """
    validation.expert_load(topk_ids, attention_mask, num_experts)
    validation.expert_ids_in_range(topk_ids, num_experts=num_experts)
    require_triton_device("topk_ids", topk_ids)
    num_tokens, top_k = topk_ids.shape
    num_blocks, constants = blocks_of(num_tokens, num_experts)
    num_programs = min(num_blocks, MOST_PROGRAMS)
    counts = topk_ids.new_empty((num_programs, num_experts), dtype=torch.int32)
    if num_programs:
        with device_of(topk_ids):
            _count[(num_programs,)](
                topk_ids, attention_mask, counts, num_tokens, *topk_ids.stride(), attention_mask.stride(0),
                top_k=top_k, **constants,
            )  # fmt: skip
    return counts.sum(dim=0)  # torch adds up int32 in int64
