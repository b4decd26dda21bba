"""Dispatch against what can be told by hand, and its parts against each other and against the experts."""

import pytest
import torch
from test_references import assert_equal_to_rounding, inputs_of_experts

from gaugeblock.optimized.triton import dispatch as triton_dispatch
from gaugeblock.reference.torch import dispatch, experts

# the example in the docstring of vLLM's moe_align_block_size, its experts counted from 0
IDS = torch.tensor([[1, 2, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2]])


def test_rows_of_an_expert_stay_in_the_order_of_their_tokens():
    order, inverse, group_sizes = dispatch.sort_by_expert(torch.tensor([[2, 0], [2, 2], [0, 4]]), num_experts=6)
    assert order.tolist() == [1, 4, 0, 2, 3, 5]
    assert inverse.tolist() == [[2, 0], [3, 4], [1, 5]]
    assert group_sizes.tolist() == [2, 0, 3, 0, 1, 0]


def test_blocks_are_those_of_vllm():
    sorted_token_ids, expert_ids, num_tokens_post_padded = dispatch.align_to_blocks(IDS, num_experts=4, block_size=4)
    assert sorted_token_ids.tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12, *[12] * 8]
    assert expert_ids.tolist() == [0, 1, 2, 3, -1, -1]
    assert num_tokens_post_padded == 16


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_the_worst_routing_needs_all_blocks(block_size):
    num_rows, num_experts = 23, 5
    most = dispatch.most_blocks(num_rows, num_experts, block_size) * block_size
    # one row of each expert, all others of the last one
    worst = torch.tensor([*range(num_experts), *[num_experts - 1] * (num_rows - num_experts)])
    random = torch.randint(0, num_experts, (100, num_rows), generator=torch.Generator().manual_seed(0))
    needed = [
        dispatch.align_to_blocks(ids[:, None], num_experts=num_experts, block_size=block_size)[2] for ids in (worst, *random)
    ]
    assert needed[0] == most and max(needed) == most


@pytest.mark.parametrize("module", [dispatch, triton_dispatch])
def test_dispatch_and_experts_are_fused_experts(module):
    (hidden_states, w13, w2, topk_weights), topk_ids, _ = inputs_of_experts(torch.float32)
    order, inverse, group_sizes = dispatch.sort_by_expert(topk_ids, num_experts=len(w2))
    rows = module.permute(hidden_states, order, top_k=topk_ids.shape[1])
    gate, up = experts.grouped_matmul(rows, w13, group_sizes).chunk(2, dim=-1)
    expert_rows = experts.grouped_matmul(torch.nn.functional.silu(gate) * up, w2, group_sizes)
    expected = experts.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    assert_equal_to_rounding(module.unpermute(expert_rows, inverse, topk_weights), expected)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda x, ids, weights: triton_dispatch.permute(x.double(), ids[:, 0], top_k=1), "hidden_states"),
        (lambda x, ids, weights: triton_dispatch.unpermute(x.double(), ids, weights), "rows"),
        (lambda x, ids, weights: triton_dispatch.unpermute(x, ids, weights.double()), "topk_weights"),
    ],
)
def test_kernels_that_add_up_in_float32_reject_float64(call, argument):
    ids = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(TypeError, match=f"^{argument} must be bfloat16, float16 or float32, got float64"):
        call(torch.zeros(4, 3), ids, torch.ones(2, 2))
