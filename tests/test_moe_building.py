"""MoE layers built of parts: pairs that fit compute what their parts do, others fail when the layer is built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.reference.jax import moe_building as of_jax
from gaugeblock.reference.moe_parts import ROUTERS, RUNNERS
from gaugeblock.reference.torch import experts, moe_building, moe_layers, routers

T, H, INNER, E, K = 7, 12, 10, 5, 2
DIGITS = {"rtol": 1e-10, "atol": 1e-12}  # of float64, whose sums run in another order
TOP2 = {"top_k": K, "renormalize": True}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


HIDDEN, GATE, W13, W2 = draw(T, H), draw(E, H, seed=1), draw(E, 2 * INNER, H, seed=2), draw(E, H, INNER, seed=3)


def build(router: str, runner: str, framework=moe_building, **options):
    options = {"router_options": {}, "runner_options": {}} | options
    return framework.build_moe_layer(router=router, runner=runner, **options)


@pytest.mark.parametrize("framework", [moe_building, of_jax], ids=["torch", "jax"])
def test_a_bypass_router_with_a_runner_that_needs_ids_fails_when_the_layer_is_built(framework):
    with pytest.raises(
        ValueError, match="runner 'fused_swiglu' needs ids and weights, but router 'bypass' hands on logits; it fits"
    ):
        build("bypass", "fused_swiglu", framework)


@pytest.mark.parametrize(("router", "runner"), [(one, other) for one in ROUTERS for other in RUNNERS])
def test_a_pair_is_built_if_the_runner_takes_what_the_router_hands_on(router, runner):
    if ROUTERS[router] == RUNNERS[runner]:
        assert callable(build(router, runner))
    else:
        with pytest.raises(ValueError, match=rf"runner '{runner}' needs .* but router '{router}' hands on"):
            build(router, runner)


@pytest.mark.parametrize(("part", "name"), [("router", "softmax"), ("runner", "swiglu")])
def test_an_unknown_name_is_answered_with_the_known_ones(part, name):
    names = {"router": "softmax_topk", "runner": "fused_swiglu"} | {part: name}
    with pytest.raises(ValueError, match=rf"{part} must be one of .*, got '{name}'"):
        build(**names)


def test_a_layer_of_mixtrals_parts_is_mixtrals():
    layer = build("softmax_topk", "fused_swiglu", router_options=TOP2)
    state = {"gate.weight": GATE, "experts.gate_up_proj": W13, "experts.down_proj": W2}
    assert torch.equal(layer(HIDDEN, GATE, W13, W2), moe_layers.mixtral_moe(HIDDEN, state, top_k=K)[0])


def test_a_runner_that_routes_needs_no_router():
    alone, with_router = (
        build("bypass", "routing_swiglu", runner_options=TOP2),
        build("softmax_topk", "fused_swiglu", router_options=TOP2),
    )
    assert torch.equal(alone(HIDDEN, GATE, W13, W2), with_router(HIDDEN, GATE, W13, W2))


def test_weights_of_inputs_scale_inputs():
    """An expert that is not linear makes another thing of them than of weights of outputs."""
    layer = build("sigmoid_input_scaling", "input_scaled_swiglu", router_options={"top_k": 1})
    weights, ids = routers.sigmoid_input_scaling(HIDDEN @ GATE.mT, top_k=1)
    expected = experts.fused_swiglu(HIDDEN * weights, W13, W2, torch.ones_like(weights), ids)
    torch.testing.assert_close(layer(HIDDEN, GATE, W13, W2), expected, **DIGITS)
    of_outputs = experts.fused_swiglu(HIDDEN, W13, W2, weights, ids)
    assert (expected - of_outputs).norm() > expected.norm() / 10


@pytest.mark.parametrize(
    ("router", "runner", "options"),
    [
        ("softmax_topk", "fused_swiglu", {"router_options": TOP2}),
        ("bypass", "routing_swiglu", {"runner_options": TOP2}),
        ("sigmoid_input_scaling", "input_scaled_swiglu", {"router_options": {"top_k": K}}),
        ("topk_softmax", "fused_geglu", {"router_options": {"top_k": K}, "runner_options": {"approximate": "tanh"}}),
    ],
)
def test_layers_of_jax_are_those_of_torch(router, runner, options):
    tensors = (HIDDEN, GATE, W13, W2)
    expected = build(router, runner, **options)(*tensors)
    with jax.enable_x64(True):
        layer = build(router, runner, of_jax, **options)
        got = jax.jit(layer)(*(jnp.asarray(each.numpy()) for each in tensors))
    np.testing.assert_allclose(np.asarray(got), expected.numpy(), **DIGITS)
