"""The Triton experts: what the conformance suite does not ask of every implementation."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from collections.abc import Iterator

import pytest
import torch

from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.engine.triton.interpreter import watch
from gaugeblock.optimized.triton import grouped_matmul, launch
from gaugeblock.optimized.triton.dispatch import group_by, split_into_blocks, sum_rows
from gaugeblock.optimized.triton.experts import fused_swiglu, fused_swiglu_recomputed
from gaugeblock.reference.torch import experts as reference

DEVICE = "cpu" if launch.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels run as the gate runs them."""
    with watch():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def arguments(num_tokens=3, hidden_size=5, intermediate_size=2, num_experts=3, top_k=2, dtype=torch.float32):
    """Arguments of `fused_swiglu`; token t chooses experts t, t + 1, ..."""
    tokens, choices = torch.arange(num_tokens, device=DEVICE), torch.arange(top_k, device=DEVICE)
    return (
        draw(num_tokens, hidden_size, dtype=dtype),
        draw(num_experts, 2 * intermediate_size, hidden_size, dtype=dtype),
        draw(num_experts, hidden_size, intermediate_size, dtype=dtype),
        draw(num_tokens, top_k),
        (tokens[:, None] + choices) % num_experts,
    )


def out_and_gradients(function, *tensors):
    """The result, and the gradients of all floating arguments through a random cotangent."""
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves[:4], draw(*out.shape, dtype=out.dtype))


def test_rows_are_sorted_by_expert_and_stay_in_order():
    rows, offsets = group_by(torch.tensor([[2, 0], [2, 2], [0, 4]], device=DEVICE), 6)
    assert rows.tolist() == [1, 4, 0, 2, 3, 5]
    assert offsets.tolist() == [0, 2, 2, 5, 5, 6, 6]


@pytest.mark.parametrize("sizes", [[0, 4, 1, 0, 5, 8], [9, 0], [1, 1, 1], [0, 0], [0], [3, 3, 0, 3, 3, 3, 3]])
def test_blocks_cover_every_position_once(sizes):
    ends = torch.tensor(sizes).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(DEVICE)
    blocks = torch.stack(split_into_blocks(offsets, sum(sizes), block_rows=4), dim=1).tolist()
    covered = [(position, expert) for expert, start, end in blocks for position in range(start, end)]
    assert covered == list(enumerate(torch.repeat_interleave(torch.tensor(sizes)).tolist()))
    assert all(end - start <= 4 for _, start, end in blocks)


def test_there_are_just_enough_blocks_for_the_worst_routing():
    """Three experts with 1, 1 and 5 rows need 4 blocks of 4; 7 rows never need more."""
    blocks = split_into_blocks(torch.tensor([0, 1, 2, 7], device=DEVICE), 7, 4)
    assert (blocks.ends > blocks.starts).tolist() == [True] * 4


def test_rows_are_added_in_order_and_rounded_once():
    """1 + 2^-11 + 2^-11 rounds to 1 in float16 step by step, and up in one."""
    rows = torch.tensor([1.0, 2.0**-11, 2.0**-11], device=DEVICE).expand(2, 70, 3).mT[:, :, None].contiguous()
    assert sum_rows(rows, None, torch.float16).tolist() == [[1 + 2.0**-10] * 70] * 2
    in_order = sum_rows(torch.tensor([[[[1.0]], [[2.0**-24]], [[2.0**-24]]]], device=DEVICE), None, torch.float32)
    assert in_order.item() == 1.0


@pytest.mark.parametrize("ids_dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.float32])
def test_ids_of_any_integer_and_weights_of_any_floating_dtype(ids_dtype, weights_dtype):
    *tensors, weights, ids = arguments()
    got = out_and_gradients(fused_swiglu, *tensors, weights.to(weights_dtype), ids.to(ids_dtype))
    expected = out_and_gradients(reference.fused_swiglu, *tensors, weights.to(weights_dtype), ids)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["hidden_states", "topk_weights"])
def test_float64_is_rejected(name):
    hidden_states, w13, w2, weights, ids = arguments()
    if name == "hidden_states":
        hidden_states, w13, w2 = hidden_states.double(), w13.double(), w2.double()
    else:
        weights = weights.double()
    with pytest.raises(TypeError, match=rf"{name} must be .* got float64"):
        fused_swiglu(hidden_states, w13, w2, weights, ids)


def test_elements_may_lie_2_to_the_31_apart():
    """Only the pages that are touched take memory."""
    memory = torch.empty(2**31 + 2**10, dtype=torch.float16, device=DEVICE)
    *near, ids = arguments(dtype=torch.float16)
    far = []
    for offset, tensor in zip(range(0, 2**10, 2**8), near, strict=True):
        strides = (2**30, *tensor.stride()[1:])
        far.append(memory.as_strided(tensor.shape, strides, offset).copy_(tensor))
    expected = out_and_gradients(fused_swiglu, *near[:3], near[3].half(), ids)
    for apart, together in zip(out_and_gradients(fused_swiglu, *far, ids), expected, strict=True):
        assert torch.equal(apart, together)


def test_silu_is_right_where_the_exponential_of_minus_gate_overflows():
    gate, up = -89.0, 1e30
    w13, one = torch.tensor([[[gate], [up]]], device=DEVICE), torch.ones(1, 1, device=DEVICE)
    arguments = (one, w13, one[None], one, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))
    exact = (tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments)
    for ours, theirs in zip(
        out_and_gradients(fused_swiglu, *arguments),
        out_and_gradients(reference.fused_swiglu, *exact),
        strict=True,
    ):
        torch.testing.assert_close(ours * 2.0**64, theirs.float() * 2.0**64)


def test_the_gradient_of_a_weight_is_infinite_and_not_nan_where_the_output_is():
    """Columns behind the last hold inf * 0 for such a token; they must not be added."""
    hidden_states, w13, w2, weights, ids = arguments()
    hidden_states[1, 0] = torch.inf
    weights.requires_grad_()
    out = fused_swiglu(hidden_states, w13.abs(), w2.abs(), weights, ids)
    out.sum().backward()
    assert weights.grad.isposinf().tolist() == [[False, False], [True, True], [False, False]]
    assert not weights.grad.isnan().any()


@pytest.mark.parametrize(
    ("wanted", "launched"),
    [
        (0, {"_rows_times_matrices_kernel", "_sum_rows_kernel"}),
        (1, {"_sum_of_products_kernel"}),
        (2, {"_sum_of_products_kernel"}),
        (3, {"_sum_rows_kernel"}),
    ],
)
def test_gradients_that_nobody_wants_are_not_computed(wanted, launched):
    tensors = arguments()
    tensors[wanted].requires_grad_()
    out = fused_swiglu(*tensors)
    with watch() as seen:
        out.sum().backward()
    assert set(seen.launches) == {"_through_activation_kernel"} | launched


def test_differentiates_only_once():
    hidden_states, *others = arguments()
    out = fused_swiglu(hidden_states.requires_grad_(), *others)
    (gradient,) = torch.autograd.grad(out.square().sum(), hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("size", ["num_tokens", "hidden_size", "intermediate_size", "top_k"])
def test_any_size_may_be_0(size):
    tensors = arguments(**{size: 0})
    out, *gradients = out_and_gradients(fused_swiglu, *tensors)
    assert torch.equal(out, torch.zeros_like(tensors[0]))
    for gradient, tensor in zip(gradients, tensors, strict=False):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, {32}), (torch.float16, {64, 128}), (torch.bfloat16, {64, 128})])
def test_landmarks_reach_every_line_of_the_table_but_amd_s(dtype, rows):
    reached = set()
    for landmark in find_contract("experts.fused_swiglu").landmarks:
        sizes = (landmark[name] for name in ("num_tokens", "hidden_size", "intermediate_size", "num_experts", "top_k"))
        hidden_states, w13, w2, *_ = arguments(*sizes, dtype=dtype)
        reached.add(grouped_matmul.choose_tiles(hidden_states, w13, w2).rows)
    assert reached == rows


def test_the_tiles_for_amd_give_the_same_numbers(monkeypatch):
    tensors = arguments(200, 144, 160, 2, 1, dtype=torch.float16)
    expected = fused_swiglu(*tensors)
    monkeypatch.setattr(grouped_matmul, "on_amd", lambda: True)
    assert grouped_matmul.choose_tiles(*tensors[:3]).rows == 64
    torch.testing.assert_close(fused_swiglu(*tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_again_has_the_digits_of_what_was_kept(dtype):
    tensors = arguments(40, 48, 40, 5, 3, dtype=dtype)
    for again, kept in zip(
        out_and_gradients(fused_swiglu_recomputed, *tensors), out_and_gradients(fused_swiglu, *tensors), strict=True
    ):
        torch.testing.assert_close(again, kept)


@pytest.mark.parametrize(("function", "products"), [(fused_swiglu, 2), (fused_swiglu_recomputed, 0)])
def test_kept_for_the_backward_pass_are_the_input_the_routing_and_at_most_the_pre_activations(function, products):
    num_tokens, hidden_size, intermediate_size, num_experts, top_k = 40, 48, 40, 5, 3
    tensors = arguments(num_tokens, hidden_size, intermediate_size, num_experts, top_k)
    leaves = [each.requires_grad_(each.is_floating_point()) for each in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
        function(*leaves)
    matrices, routed = {leaves[1].data_ptr(), leaves[2].data_ptr()}, num_tokens * top_k
    elements = sum(each.numel() for each in kept if each.data_ptr() not in matrices)
    routing = 2 * routed + num_experts + 1
    assert elements == products * routed * intermediate_size + num_tokens * hidden_size + routing


def test_few_rows_take_short_tiles_and_split_sums_where_a_batch_may_show():
    hidden_states, w13, w2, *_ = arguments(2, 256, 128, 4, 2, dtype=torch.bfloat16)
    invariant = grouped_matmul.choose_tiles(hidden_states, w13, w2)
    fast = grouped_matmul.choose_tiles(hidden_states, w13, w2, rows_per_expert=1)
    assert (fast.rows, invariant.rows) == (16, 128)
    assert grouped_matmul.choose_tiles(hidden_states, w13, w2, rows_per_expert=1000) == invariant
    assert grouped_matmul.choose_splits(4, width=256, depth=4096, tiles=fast) == 16
    assert grouped_matmul.choose_splits(1000, width=256, depth=4096, tiles=fast) == 1


def test_sums_that_are_split_keep_their_bias():
    """128 programs and more are enough without; here one block of rows and one of columns."""
    tokens, width, depth = 3, 20, 200
    left, matrices, biases = draw(tokens, depth), draw(1, width, depth), draw(1, width)
    rows = torch.arange(tokens, device=DEVICE)
    tiles = grouped_matmul.choose_tiles(left, matrices)
    blocks = split_into_blocks(torch.tensor([0, tokens], device=DEVICE), tokens, tiles.rows)
    parts = grouped_matmul.rows_times_matrices(left, matrices, rows, blocks, tiles, biases=biases, splits=4)
    assert parts.shape == (tokens, 4, width)
    torch.testing.assert_close(parts.sum(1), left @ matrices[0].mT + biases, rtol=1e-5, atol=1e-4)
