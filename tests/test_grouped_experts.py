"""The experts on the CPU, at what the gate's small cases don't reach: several threads and batches."""

import pytest
import torch

from gaugeblock.optimized.compiled import expert_rows, experts
from gaugeblock.reference.torch import experts as reference

NUM_TOKENS, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K = 23, 10, 12, 7, 3


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def arguments():
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(NUM_TOKENS, NUM_EXPERTS - 1, generator=generator).topk(TOP_K).indices
    shapes = (
        (NUM_TOKENS, HIDDEN_SIZE), (NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
        (NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE), (NUM_TOKENS, TOP_K),
    )  # fmt: skip
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return *drawn, ids + (ids >= 2)  # expert 2 has no rows


def results_of(function, inputs):
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs[:4], torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))


@pytest.mark.parametrize("threads", [1, 2, 3, 5], indirect=True)  # 5 divides no width
@pytest.mark.parametrize("batch_elements", [1, 12 * 20, 2**19])  # one expert each, some, all
def test_threads_and_batches_change_no_result(threads, batch_elements, monkeypatch):
    monkeypatch.setattr(expert_rows, "BATCH_ELEMENTS", batch_elements)
    inputs = arguments()
    for ours, right in zip(results_of(experts.fused_swiglu, inputs), results_of(reference.fused_swiglu, inputs), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)  # float64; sums run in another order
    without_gradients = experts.fused_swiglu(*(each.detach() for each in inputs))
    torch.testing.assert_close(without_gradients, reference.fused_swiglu(*inputs).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("experts", [[], [0], [4], [1, 2], [0, 2, 4], [0, 1, 2, 3, 4]], ids=str)
def test_gradients_of_experts_without_rows_are_zero(experts, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: torch.full_like(like, 7))
    gradient = expert_rows.gradient_of(torch.zeros(5, 2, 3, dtype=torch.bfloat16), experts)
    assert gradient.shape == (5, 2, 3) and gradient.dtype == torch.bfloat16
    assert [int(each) for each in gradient.amax((1, 2))] == [7 * (expert in experts) for expert in range(5)]
