"""Routers that balance by softmaxes over tokens: worked examples, by hand and as Megatron-LM has them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.optimized.triton import soft_routers as triton_soft_routers
from gaugeblock.reference.jax import soft_routers as jax_soft_routers
from gaugeblock.reference.torch import soft_routers

TORCH_ONES = pytest.mark.parametrize("module", [soft_routers, triton_soft_routers], ids=["torch", "triton"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divided_by_hand(logits, num_iterations):
    """Megatron-LM's iteration over plain numbers, without its 1e-8: one factor for each row and each column."""
    cost = [[math.exp(each) for each in row] for row in logits]
    rows, columns = [1.0] * len(cost), [1.0] * len(cost[0])
    for _ in range(num_iterations):
        rows = [1 / len(rows) / sum(c * each for c, each in zip(columns, row, strict=True)) for row in cost]
        columns = [1 / len(columns) / sum(r * row[e] for r, row in zip(rows, cost, strict=True)) for e in range(len(columns))]
    return [[r * each * c for each, c in zip(row, columns, strict=True)] for r, row in zip(rows, cost, strict=True)]


@TORCH_ONES
def test_soft_moe_of_an_example(module):
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    dispatch, combine = module.soft_moe(logits)
    torch.testing.assert_close(dispatch, torch.tensor([[[0.5, 0.75], [0.5, 0.25]]]))
    torch.testing.assert_close(combine, torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]))


@TORCH_ONES
def test_slots_are_means_of_tokens_and_tokens_of_slots(module):
    dispatch, combine = module.soft_moe(3 * random(2, 70, 40))
    np.testing.assert_allclose(dispatch.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(combine.sum(2), 1, rtol=1e-12)


@TORCH_ONES
@pytest.mark.parametrize("num_iterations", [0, 1, 3, 20])
def test_sinkhorn_chooses_from_the_matrix_divided_by_hand(module, num_iterations):
    logits = 2 * random(9, 4) + 2 * random(1, 4, seed=1)
    balanced = torch.tensor(divided_by_hand(logits.tolist(), num_iterations), dtype=torch.float64)
    weights, ids = module.sinkhorn(logits, top_k=2, num_iterations=num_iterations, score_function="softmax")
    assert torch.equal(ids, balanced.topk(2).indices)
    np.testing.assert_allclose(weights, logits.softmax(1).gather(1, ids), rtol=1e-12)
    of_rows = soft_routers.balanced_logits(logits, num_iterations).softmax(1)
    np.testing.assert_allclose(of_rows, balanced / balanced.sum(1, keepdim=True), rtol=1e-10)


def test_sinkhorn_evens_out_what_all_tokens_like():
    logits = random(400, 4) + torch.tensor([6.0, 0.0, 0.0, 0.0])
    greedy, balanced = (
        soft_routers.sinkhorn(logits, top_k=1, num_iterations=iterations, score_function="sigmoid")[1][:, 0].bincount(minlength=4)
        for iterations in (0, 30)
    )
    assert greedy[0] == 400 and balanced.max() <= 1.25 * 100


@TORCH_ONES
def test_the_choice_of_sinkhorn_has_no_gradient(module):
    logits = random(6, 3).requires_grad_()
    weights, ids = module.sinkhorn(logits, top_k=1, num_iterations=4, score_function="sigmoid")
    grad = torch.autograd.grad(weights.sum(), logits)[0]
    chosen = torch.zeros(6, 3, dtype=torch.bool).scatter(1, ids, True)
    slope = logits.detach().sigmoid() * (-logits.detach()).sigmoid()
    np.testing.assert_allclose(grad, torch.where(chosen, slope, 0.0), rtol=1e-12)


def test_one_nan_reaches_every_choice_and_only_its_own_weights():
    logits = random(5, 3).float()
    logits[2, 1] = torch.nan
    weights, ids = soft_routers.sinkhorn(logits, top_k=2, num_iterations=2, score_function="softmax")
    assert weights.isnan().any(1).tolist() == [False, False, True, False, False]
    assert all(len(set(row)) == 2 for row in ids.tolist())


def test_jax_ones_are_those_of_torch():
    with jax.enable_x64(True):
        logits = 2 * random(3, 20, 12)
        for ours, twin in zip(soft_routers.soft_moe(logits), jax_soft_routers.soft_moe(jnp.asarray(logits.numpy())), strict=True):
            np.testing.assert_allclose(twin, ours, rtol=1e-12)
        options = {"top_k": 3, "num_iterations": 5, "score_function": "sigmoid"}
        weights, ids = soft_routers.sinkhorn(logits[0], **options)
        jitted = jax.jit(jax_soft_routers.sinkhorn, static_argnames=tuple(options))
        jax_weights, jax_ids = jitted(jnp.asarray(logits[0].numpy()), **options)
        np.testing.assert_array_equal(jax_ids, ids)
        np.testing.assert_allclose(jax_weights, weights, rtol=1e-12)


@TORCH_ONES
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"score_function": "tanh"}, ValueError, "^score_function must be 'sigmoid' or 'softmax', got 'tanh'"),
        ({"num_iterations": -1}, ValueError, r"^num_iterations must be in 0\.\."),
        ({"num_iterations": 1.5}, TypeError, "^num_iterations must be an integer, got 1.5"),
        ({"top_k": 4}, ValueError, r"^top_k must be in 1\.\.num_experts=3, got 4"),
    ],
)
def test_a_bad_call_of_sinkhorn_names_its_argument(module, bad, error, message):
    call = {"router_logits": torch.zeros(2, 3), "top_k": 1, "num_iterations": 1, "score_function": "sigmoid"}
    with pytest.raises(error, match=message):
        module.sinkhorn(**call | bad)
