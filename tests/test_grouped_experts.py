"""The experts on the CPU, at what the gate's small cases don't reach: several threads and batches, matrices [in, out]."""

import pytest
import torch
from on_four_ranks import assert_equal_to_rounding

from gaugeblock.optimized.compiled import biased_moe_layers, expert_rows, experts
from gaugeblock.reference.torch import biased_moe_layers as reference_layers
from gaugeblock.reference.torch import experts as reference

NUM_TOKENS, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K = 23, 10, 12, 7, 3
DOWN, GATE_UP = (NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE), (NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE)
GATED = GATE_UP, DOWN
BIASED = GATE_UP, GATE_UP[:2], DOWN, DOWN[:2]
PLAIN = (NUM_EXPERTS, INTERMEDIATE_SIZE, HIDDEN_SIZE), (NUM_EXPERTS, INTERMEDIATE_SIZE), DOWN, DOWN[:2]
KINDS = {
    "fused_swiglu": ("fused_swiglu", GATED, {}),
    "fused_geglu": ("fused_geglu", GATED, {"approximate": "none"}),
    "fused_gelu_mlp": ("fused_gelu_mlp", PLAIN, {"approximate": "none"}),
    "fused_gelu_mlp, tanh": ("fused_gelu_mlp", PLAIN, {"approximate": "tanh"}),
    "fused_swiglu_oai": ("fused_swiglu_oai", BIASED, {"alpha": 1.702, "limit": 2.0}),  # half of the rows are clamped
}


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def arguments(shapes):
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(NUM_TOKENS, NUM_EXPERTS - 1, generator=generator).topk(TOP_K).indices
    shapes = (NUM_TOKENS, HIDDEN_SIZE), *shapes, (NUM_TOKENS, TOP_K)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return *drawn, ids + (ids >= 2)  # expert 2 has no rows


def results_of(function, inputs, options):
    out = function(*inputs, **options)
    return out, *torch.autograd.grad(out, inputs[:-1], torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5], indirect=True)  # 5 divides no width
@pytest.mark.parametrize("batch_elements", [1, 12 * 20, 2**19])  # one expert each, some, all
def test_threads_and_batches_change_no_result(kind, threads, batch_elements, monkeypatch):
    monkeypatch.setattr(expert_rows, "BATCH_ELEMENTS", batch_elements)
    name, shapes, options = KINDS[kind]
    compiled, right = getattr(experts, name), getattr(reference, name)
    inputs = arguments(shapes)
    for ours, expected in zip(results_of(compiled, inputs, options), results_of(right, inputs, options), strict=True):
        assert_equal_to_rounding(ours, expected)
    without_gradients = compiled(*(each.detach() for each in inputs), **options)
    assert_equal_to_rounding(without_gradients, right(*inputs, **options).detach())


@pytest.mark.parametrize("needed", range(7))
def test_each_gradient_comes_alone(needed):
    name, shapes, options = KINDS["fused_swiglu_oai"]
    inputs = arguments(shapes)
    expected = results_of(getattr(reference, name), inputs, options)[1 + needed : 2 + needed] if needed < 6 else ()
    tracked = [each.detach().requires_grad_(index == needed) for index, each in enumerate(inputs[:-1])]
    out = getattr(experts, name)(*tracked, inputs[-1], **options)
    assert out.requires_grad == bool(expected)
    if expected:
        ours = torch.autograd.grad(out, tracked[needed], torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))
        for one, other in zip(ours, expected, strict=True):
            assert_equal_to_rounding(one, other)


@pytest.mark.parametrize("kind", ["fused_swiglu", "fused_gelu_mlp", "fused_swiglu_oai"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_lie_in_memory_as_the_weights_do(kind, dtype):
    """Else autograd copies a gradient of all experts to the order of its parameter."""
    name, shapes, options = KINDS[kind]
    tokens, *weights, topk_weights, ids = (each.detach() for each in arguments(shapes))
    weights = [each.mT.contiguous().mT if each.dim() == 3 else each for each in weights]
    inputs = [*(each.to(dtype).requires_grad_() for each in (tokens, *weights)), topk_weights.requires_grad_(), ids]
    for ours, weight in zip(results_of(getattr(experts, name), inputs, options)[2:-1], inputs[1:-2], strict=True):
        assert ours.stride() == weight.stride()


@pytest.mark.parametrize("kind", ["fused_swiglu", "fused_swiglu_oai"])
def test_routing_weights_may_be_of_another_dtype(kind):
    name, shapes, options = KINDS[kind]
    *drawn, ids = arguments(shapes)
    inputs = *drawn[:-1], drawn[-1].detach().bfloat16().requires_grad_(), ids
    theirs = results_of(getattr(reference, name), inputs, options)
    for ours, expected in zip(results_of(getattr(experts, name), inputs, options), theirs, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_an_expert_without_rows_may_have_any_bias(spoilt):
    name, shapes, options = KINDS["fused_swiglu_oai"]
    inputs = arguments(shapes)
    with torch.no_grad():
        inputs[2][2] = inputs[4][2] = spoilt  # expert 2
    for each in results_of(getattr(experts, name), inputs, options):
        assert each.isfinite().all()


@pytest.mark.parametrize("experts", [[], [0], [4], [1, 2], [0, 2, 4], [0, 1, 2, 3, 4]], ids=str)
def test_gradients_of_experts_without_rows_are_zero(experts, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: torch.full_like(like, 7))
    gradient = expert_rows.gradient_of(torch.zeros(5, 2, 3, dtype=torch.bfloat16), experts)
    assert gradient.shape == (5, 2, 3) and gradient.dtype == torch.bfloat16
    assert [int(each) for each in gradient.amax((1, 2))] == [7 * (expert in experts) for expert in range(5)]


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_gpt_oss_layer_is_the_references(threads):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "router.weight": (NUM_EXPERTS, HIDDEN_SIZE), "router.bias": (NUM_EXPERTS,),
        "experts.gate_up_proj": (NUM_EXPERTS, HIDDEN_SIZE, 2 * INTERMEDIATE_SIZE),
        "experts.gate_up_proj_bias": (NUM_EXPERTS, 2 * INTERMEDIATE_SIZE),
        "experts.down_proj": (NUM_EXPERTS, INTERMEDIATE_SIZE, HIDDEN_SIZE), "experts.down_proj_bias": (NUM_EXPERTS, HIDDEN_SIZE),
    }  # fmt: skip
    state = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()
    }
    tokens = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator, dtype=torch.float64).requires_grad_()
    results = []
    for layers in (biased_moe_layers, reference_layers):
        out, logits, ids = layers.gpt_oss_moe(tokens, state, top_k=TOP_K, alpha=1.702, limit=2.0)
        gradients = torch.autograd.grad(out.square().sum() + logits.sum(), [tokens, *state.values()])
        results.append((ids, out, logits, *gradients))
    assert torch.equal(results[0][0], results[1][0])
    for ours, expected in zip(*(each[1:] for each in results), strict=True):
        assert_equal_to_rounding(ours, expected)
