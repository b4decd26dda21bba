"""The Triton routers: what the conformance suite does not ask of every implementation."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import math
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from gaugeblock.conformance.engine.triton.interpreter import watch
from gaugeblock.optimized.triton import capacity_routers, launch, routers
from gaugeblock.optimized.triton.topk import choose_lanes, keys_of, scores_of
from gaugeblock.reference.torch import capacity_routers as capacity_reference
from gaugeblock.reference.torch import routers as reference

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
GROUPED = {"num_groups": 5, "topk_groups": 3, "routed_scaling_factor": 2.446}
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels run as the gate runs them."""
    with watch():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def routed(router: str, logits: torch.Tensor, top_k: int, renormalize: bool = True, module=routers):
    """Calls either router; the grouped one has five groups."""
    options = {"top_k": top_k, "renormalize": renormalize}
    if router == "softmax_topk":
        return module.softmax_topk(logits, **options)
    bias = draw(logits.shape[1] + 1)[1:].to(logits.device)
    return module.grouped_sigmoid_topk(logits, bias, **options, **GROUPED)


both_routers = pytest.mark.parametrize("router", ["softmax_topk", "grouped_sigmoid_topk"])
both_scales = pytest.mark.parametrize("renormalize", [False, True])


@both_routers
@both_scales
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_and_gradients_are_those_of_a_float64_computation(router, renormalize, dtype):
    """65 tokens fill one program and begin another; 35 experts, in groups of 7, no block."""
    logits = draw(65, 35, dtype=dtype).requires_grad_()
    weights, ids = routed(router, logits, 4, renormalize=renormalize)
    exact = logits.detach().double().requires_grad_()
    scores = torch.softmax(exact, dim=1) if router == "softmax_topk" else torch.sigmoid(exact)
    expected = scores.gather(1, ids)
    if renormalize:
        expected = expected / expected.sum(dim=1, keepdim=True)
    if router == "grouped_sigmoid_topk":
        expected = expected * GROUPED["routed_scaling_factor"]
    cotangent = draw(4, 65).T

    torch.testing.assert_close(weights, expected.float())
    (gradient,) = torch.autograd.grad(weights, logits, cotangent)
    (expected_gradient,) = torch.autograd.grad(expected, exact, cotangent.double())
    torch.testing.assert_close(gradient, expected_gradient.to(dtype))


@both_scales
def test_gradients_are_right_where_one_probability_is_nearly_1(renormalize):
    """1 - p is 1e-9 here, and 0 in float32."""
    logits = torch.tensor([[21.0, 0.0, -1.0, 0.5]], device=DEVICE).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    options, cotangent = {"top_k": 2, "renormalize": renormalize}, torch.tensor([[1.7, -0.9]], device=DEVICE)
    (gradient,) = torch.autograd.grad(routers.softmax_topk(logits, **options)[0], logits, cotangent)
    (expected,) = torch.autograd.grad(reference.softmax_topk(exact, **options)[0], exact, cotangent.double())
    torch.testing.assert_close(gradient * 1e9, (expected * 1e9).float())


@both_routers
def test_float64_logits_are_routed_in_float64(router):
    logits = draw(9, 35, dtype=torch.float64)
    weights, ids = routed(router, logits, 6)
    expected_weights, expected_ids = routed(router, logits, 6, module=reference)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@both_routers
def test_rows_of_any_values_give_distinct_experts_and_leave_other_rows_alone(router):
    good = draw(7, 5)
    bad = torch.tensor([[NAN] * 5, [1, NAN, -INF, INF, 0], [-INF] * 5, [INF] * 5, [-INF, 0, -INF, -INF, 1]])
    logits = torch.cat([good, bad.to(DEVICE), good])
    weights, ids = routed(router, logits, 3)
    assert all(sorted(set(row)) == sorted(row) and set(row) <= set(range(5)) for row in ids.tolist())
    assert weights[7:9].isnan().any(dim=1).all()

    good_weights, good_ids = routed(router, good, 3)
    for rows in (slice(0, 7), slice(12, 19)):
        assert torch.equal(weights[rows], good_weights)
        assert torch.equal(ids[rows], good_ids)


@triton.jit
def rank_kernel(scores_ptr, lanes_ptr, restored_ptr, size: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    lanes = tl.arange(0, BLOCK_SIZE)[None, :]
    scores = tl.load(scores_ptr + lanes, mask=lanes < size, other=0.0)
    keys = keys_of(scores, lanes < size)
    tl.store(lanes_ptr + lanes, choose_lanes(keys, size, BLOCK_SIZE), mask=lanes < size)
    tl.store(restored_ptr + lanes, scores_of(keys, scores.dtype), mask=lanes < size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_order_all_floats(dtype):
    """NaN of either sign, infinities, largest, smallest, zeros; of equal ones the lowest lane is first."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    values = [-INF, -largest, -0.0, NAN, 0.0, smallest, -smallest, INF, -0.0, -math.copysign(NAN, 1), 1.0]
    scores = torch.tensor(values, dtype=dtype, device=DEVICE)
    lanes = torch.empty(len(values), dtype=torch.int32, device=DEVICE)
    restored = torch.empty_like(scores)
    rank_kernel[(1,)](scores, lanes, restored, size=len(values), BLOCK_SIZE=16)
    assert lanes.tolist() == [3, 9, 7, 10, 5, 2, 4, 8, 6, 1, 0]
    torch.testing.assert_close(restored, scores, rtol=0, atol=0, equal_nan=True)


def test_of_equal_scores_the_lowest_id_comes_first():
    logits = torch.tensor([[0.0] * 6, [-0.0, 0.0, -0.0, 1.0, 0.0, 1.0], [NAN] * 6], device=DEVICE)
    _, ids = routers.softmax_topk(logits, top_k=4, renormalize=False)
    assert ids.tolist() == [[0, 1, 2, 3], [3, 5, 0, 1], [0, 1, 2, 3]]

    options = {"renormalize": False, "num_groups": 3, "topk_groups": 2, "routed_scaling_factor": 1.0}
    _, ids = routers.grouped_sigmoid_topk(logits, torch.zeros(6, device=DEVICE), top_k=4, **options)
    assert ids.tolist() == [[0, 1, 2, 3], [3, 5, 2, 4], [0, 1, 2, 3]]


def test_scores_below_those_of_padding_are_chosen():
    """Three groups lie in a block of four; all biased scores are far below 0."""
    bias = torch.tensor([-9.0, -8.0, -7.0, -6.0, -5.0, -INF], device=DEVICE)
    options = {"renormalize": True, "num_groups": 3, "topk_groups": 2, "routed_scaling_factor": 1.0}
    _, ids = routers.grouped_sigmoid_topk(torch.zeros(1, 6, device=DEVICE), bias, top_k=4, **options)
    assert ids.tolist() == [[3, 2, 1, 0]]


@both_routers
def test_a_token_has_the_same_bits_in_any_batch(router):
    logits = draw(130, 35)
    weights, ids = routed(router, logits, 4)
    for rows in (slice(0, 1), slice(63, 65), slice(129, 130)):
        alone_weights, alone_ids = routed(router, logits[rows], 4)
        assert torch.equal(alone_weights, weights[rows])
        assert torch.equal(alone_ids, ids[rows])


@both_routers
@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**29)])
def test_elements_may_lie_2_to_the_31_apart(router, strides):
    """Only the pages that are touched take memory."""
    far = torch.empty(2**31 + 8, dtype=torch.float16, device=DEVICE).as_strided((3, 5), strides)
    far.copy_(draw(3, 5))
    for apart, together in zip(routed(router, far, 3), routed(router, far.contiguous(), 3), strict=True):
        assert torch.equal(apart, together)


@both_routers
def test_only_the_logits_get_a_gradient_and_only_once(router):
    logits = draw(3, 35).requires_grad_()
    weights, ids = routed(router, logits, 4)
    assert not ids.requires_grad
    (gradient,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("of_logits", "of_bias"), [(False, True), (True, True)])
def test_the_bias_gets_no_gradient(of_logits, of_bias):
    logits, bias = draw(3, 35).requires_grad_(of_logits), draw(35).requires_grad_(of_bias)
    weights, _ = routers.grouped_sigmoid_topk(logits, bias, top_k=4, renormalize=True, **GROUPED)
    assert weights.requires_grad == of_logits
    if of_logits:
        weights.sum().backward()  # the gradient of a sum is an expanded scalar
        assert logits.grad is not None
        assert bias.grad is None


@both_routers
def test_no_tokens_need_no_launch(router):
    logits = draw(0, 35).requires_grad_()
    with watch() as seen:
        weights, ids = routed(router, logits, 4)
        weights.sum().backward()
    assert not seen.launches
    assert weights.shape == ids.shape == (0, 4)
    assert logits.grad.shape == (0, 35)


@both_routers
def test_logits_where_triton_does_not_run_are_rejected(router, monkeypatch):
    with pytest.raises(ValueError, match=r"router_logits must be on .* got meta"):
        routed(router, torch.empty(2, 35, device="meta"), 4)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"router_logits must be on .* got cpu; TRITON_INTERPRET=1"):
        routed(router, torch.zeros(2, 35), 4)


def test_what_draws_nothing_needs_no_noise():
    """The gate gives noise in every call; here float64 shows that none is read."""
    logits, tokens = draw(65, 35, dtype=torch.float64), torch.ones(65, dtype=torch.bool, device=DEVICE)
    options = {"second_expert_policy": "all", "normalize_before_dropping": False, "capacity_factor": 1.1}
    ours = capacity_routers.gshard_top2(logits, None, tokens, **options)
    for result, expected in zip(ours, capacity_reference.gshard_top2(logits, None, tokens, **options), strict=True):
        torch.testing.assert_close(result, expected)
