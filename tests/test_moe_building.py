"""MoE layers built of parts: pairs that fit compute what their parts do, others fail when the layer is built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.reference.jax import moe_building as of_jax
from gaugeblock.reference.moe_parts import ROUTERS, RUNNERS
from gaugeblock.reference.torch import capacity_routers, experts, moe_building, moe_layers, noisy_routers, routers, soft_routers

T, H, INNER, E, K = 7, 12, 10, 5, 2
DIGITS = {"rtol": 1e-10, "atol": 1e-12}  # of float64, whose sums run in another order
TOP2 = {"top_k": K, "renormalize": True}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


HIDDEN, GATE, W13, W2 = draw(T, H), draw(E, H, seed=1), draw(E, 2 * INNER, H, seed=2), draw(E, H, INNER, seed=3)


OPTIONS = {
    "top_k": K, "renormalize": True, "num_groups": 5, "topk_groups": 3, "routed_scaling_factor": 2.5, "norm_min": 1e-3,
    "jitter_eps": 0.1, "noise_std": 0.1, "training": True, "capacity_factor": 1.25, "second_expert_policy": "all",
    "normalize_before_dropping": True, "num_iterations": 3, "score_function": "sigmoid", "approximate": "none", "alpha": 1.702,
    "limit": 7.0,
}  # fmt: skip


def chosen(names) -> dict:
    return {name: OPTIONS[name] for name in names}


def build(router: str, runner: str, framework=moe_building, **options):
    known = ROUTERS.get(router, ROUTERS["bypass"]).options, RUNNERS.get(runner, RUNNERS["fused_swiglu"]).options
    options = {"router_options": chosen(known[0]), "runner_options": chosen(known[1])} | options
    return framework.build_moe_layer(router=router, runner=runner, **options)


@pytest.mark.parametrize("framework", [moe_building, of_jax], ids=["torch", "jax"])
def test_a_bypass_router_with_a_runner_that_needs_ids_fails_when_the_layer_is_built(framework):
    with pytest.raises(
        ValueError, match="runner 'fused_swiglu' needs ids and weights, but router 'bypass' hands on logits; it fits"
    ):
        build("bypass", "fused_swiglu", framework)


@pytest.mark.parametrize(("router", "runner"), [(one, other) for one in ROUTERS for other in RUNNERS])
def test_a_pair_is_built_if_the_runner_takes_what_the_router_hands_on(router, runner):
    if ROUTERS[router].hands_on == RUNNERS[runner].takes:
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


ARRAYS = {
    "e_score_correction_bias": draw(E, seed=5).float(),
    "token_ids": torch.arange(T),
    "table": torch.arange(T) % E,
    "noise_logits": draw(T, E, seed=6),
    "noise": draw(T, E, seed=7),
    "attention_mask": torch.ones(T, dtype=torch.bool),
}
MODULES = (routers, noisy_routers, capacity_routers, soft_routers)


@pytest.mark.parametrize("name", [name for name in ROUTERS if ROUTERS[name].hands_on == "ids and weights"])
def test_every_router_that_hands_on_ids_and_weights_is_built(name):
    """Those that need more than logits are given it by name; what they return beside ids and weights is left."""
    router = ROUTERS[name]
    arrays = {each: ARRAYS[each] for each in router.needs}
    layer = build(name, "fused_swiglu")
    got = layer(HIDDEN, GATE if router.reads_logits else None, W13, W2, **arrays)

    function = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    logits = (HIDDEN @ GATE.mT,) if router.reads_logits else ()
    weights, ids = function(*logits, *arrays.values(), **chosen(router.options))[:2]
    expected = experts.fused_swiglu(HIDDEN, W13, W2, weights.reshape(T, -1), ids.reshape(T, -1))
    assert torch.equal(got, expected)
    if arrays:
        with pytest.raises(
            ValueError, match=f"arrays must be {', '.join(arrays)} of router '{name}', which lacks {router.needs[0]}"
        ):
            layer(HIDDEN, GATE, W13, W2)


def test_an_array_that_a_router_does_not_take_is_refused():
    with pytest.raises(ValueError, match="arrays must be empty of router 'softmax_topk', which has no noise"):
        build("softmax_topk", "fused_swiglu")(HIDDEN, GATE, W13, W2, noise=ARRAYS["noise"])


def test_an_option_that_is_missing_is_told_when_the_layer_is_built():
    with pytest.raises(ValueError, match="router_options must be top_k, renormalize of router 'softmax_topk', which lacks top_k"):
        build("softmax_topk", "fused_swiglu", router_options={"renormalize": True})


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
