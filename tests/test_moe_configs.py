"""MoE layers as configurations: presets against the layers of their models, public configs read, and what does not fit."""

import copy
import importlib
import importlib.util
import pickle
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from gaugeblock.reference.expert_layouts import ExpertWeights, from_w13
from gaugeblock.reference.jax import moe_building as of_jax
from gaugeblock.reference.moe_configs import MOE_LAYER_PRESETS, MoELayerConfig, from_public_config
from gaugeblock.reference.moe_parts import DISPATCHERS, ROUTERS, RUNNERS
from gaugeblock.reference.torch import moe_building

T, H, E, INNER, SHARED = 9, 12, 8, 10, 14
SIZES = {
    "num_experts": E, "hidden_size": H, "intermediate_size": INNER, "two_intermediate_sizes": 2 * INNER,
    "shared_intermediate_size": SHARED, "one": 1,
}  # fmt: skip
DIGITS = {"rtol": 1e-10, "atol": 1e-12}  # of float64, whose sums run in another order
TOP2 = {"top_k": 2, "renormalize": True}
# of each preset, the layer of its model, which not every branch has
LAYERS = {
    "mixtral_8x7b": "moe_layers.mixtral_moe",
    "qwen3_30b_a3b": "moe_layers.qwen3_moe",
    "qwen2_57b_a14b": "moe_layers.qwen2_moe",
    "olmoe_1b_7b": "moe_layers.qwen3_moe",
    "deepseek_v3": "grouped_moe_layers.deepseek_v3_moe",
    "gpt_oss_120b": "biased_moe_layers.gpt_oss_moe",
    "llama4_scout": "input_scaled_moe_layers.llama4_moe",
}
# of each preset, transformers' class of its config, and where the model's own differs from the class' defaults
PUBLIC = {
    "mixtral_8x7b": ("MixtralConfig", {}),
    "qwen3_30b_a3b": ("Qwen3MoeConfig", {"norm_topk_prob": True}),
    "qwen2_57b_a14b": ("Qwen2MoeConfig", {"num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False}),
    "olmoe_1b_7b": ("OlmoeConfig", {"norm_topk_prob": False}),
    "deepseek_v3": ("DeepseekV3Config", {}),
    "gpt_oss_120b": ("GptOssConfig", {}),
    "llama4_scout": ("Llama4TextConfig", {}),
}
PRESETS = pytest.mark.parametrize("preset", MOE_LAYER_PRESETS)


def layer_of(preset: str):
    """The layer of a preset's model; skips where this branch has none."""
    module, _, name = LAYERS[preset].partition(".")
    found = importlib.util.find_spec(f"gaugeblock.reference.torch.{module}")
    if found is None:
        pytest.skip(f"no {LAYERS[preset]}")
    return getattr(importlib.import_module(f"gaugeblock.reference.torch.{module}"), name)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def arguments(config: MoELayerConfig, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens, and a state of few experts."""
    axes = config.axes(E) | ({} if config.bias is None else {config.bias: ("num_experts",)})
    sizes = [[SIZES[axis] for axis in each] for each in axes.values()]
    state = {
        name: draw(*each, seed=seed).to(dtype) / each[-1] ** 0.5
        for seed, (name, each) in enumerate(zip(axes, sizes, strict=True))
    }
    if config.bias is not None:
        state[config.bias] = draw(E, seed=99).float()
    return draw(T, H, seed=98).to(dtype), state


def shrunk(preset: str) -> MoELayerConfig:
    """A preset with few experts."""
    config = MOE_LAYER_PRESETS[preset]
    small = {"num_groups": 4, "topk_groups": 2, "top_k": min(config.router_options["top_k"], 3)}
    options = {name: small.get(name, value) for name, value in config.router_options.items()}
    return replace(config, router_options=options)


def test_every_preset_has_a_layer_and_a_public_config():
    assert MOE_LAYER_PRESETS.keys() == LAYERS.keys() == PUBLIC.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@PRESETS
def test_a_layer_built_of_a_preset_is_that_of_its_model_bit_for_bit(preset, dtype):
    layer, config = layer_of(preset), shrunk(preset)
    hidden, state = arguments(config, dtype)
    options = dict(config.router_options) | dict(config.runner_options)
    options.pop("renormalize") if preset == "mixtral_8x7b" else None  # it always does
    built, expected = moe_building.build_layer(config)(hidden, state), layer(hidden, state, **options)
    for ours, theirs in zip(built, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@PRESETS
def test_layers_of_jax_are_those_of_torch(preset):
    config = shrunk(preset)
    hidden, state = arguments(config)
    expected = moe_building.build_layer(config)(hidden, state)
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(each.numpy()) for name, each in state.items()}
        got = jax.jit(of_jax.build_layer(config))(jnp.asarray(hidden.numpy()), arrays)
    for theirs, ours in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(theirs), ours.numpy(), **DIGITS)


@PRESETS
def test_a_preset_is_what_is_read_from_the_public_config(preset):
    name, published = PUBLIC[preset]
    config = getattr(transformers, name)(**published).to_dict()
    assert from_public_config(config) == MOE_LAYER_PRESETS[preset]
    spread = "replicated_tokens"
    assert from_public_config(config, dispatcher=spread) == replace(MOE_LAYER_PRESETS[preset], dispatcher=spread)


@PRESETS
def test_parameters_are_named_as_in_transformers(preset):
    """What the layers of the models have, transformers' modules have, but for what those convert when they load."""
    blocks = {
        "mixtral_8x7b": ("mixtral", "MixtralSparseMoeBlock"),
        "qwen3_30b_a3b": ("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
        "qwen2_57b_a14b": ("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
        "olmoe_1b_7b": ("olmoe", "OlmoeSparseMoeBlock"),
        "deepseek_v3": ("deepseek_v3", "DeepseekV3MoE"),
        "gpt_oss_120b": ("gpt_oss", "GptOssMLP"),
        "llama4_scout": ("llama4", "Llama4TextMoe"),
    }
    folder, block = blocks[preset]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    name, published = PUBLIC[preset]
    of_class = getattr(transformers, name)(**published)
    with torch.device("meta"):
        theirs = {name: tuple(each.shape) for name, each in getattr(module, block)(of_class).state_dict().items()}
    config = MOE_LAYER_PRESETS[preset]
    experts, width = theirs[f"{config.gate}.weight"]
    axes = config.axes(experts) | ({} if config.bias is None else {config.bias: ("num_experts",)})
    assert axes.keys() == theirs.keys()
    sizes = {"num_experts": experts, "hidden_size": width}
    for name, each in axes.items():
        sizes |= dict(zip(each, theirs[name], strict=True))
    assert all(tuple(sizes[axis] for axis in each) == theirs[name] for name, each in axes.items())
    assert sizes["two_intermediate_sizes"] == 2 * sizes["intermediate_size"]


@pytest.mark.parametrize(
    ("method", "num_groups", "topk_groups"), [("greedy", 1, 1), ("group_limited_greedy", 8, 3)], ids=["Lite", "V2"]
)
def test_deepseek_v2_chooses_among_groups_or_not(method, num_groups, topk_groups):
    public = transformers.DeepseekV2Config(
        num_experts_per_tok=6, topk_method=method, n_group=8, topk_group=3, routed_scaling_factor=16.0, n_shared_experts=2
    ).to_dict()
    config = from_public_config(public)
    options = {"top_k": 6, "num_groups": num_groups, "topk_groups": topk_groups, "routed_scaling_factor": 16.0}
    assert (config.router, config.router_options, config.shared) == ("grouped_softmax_topk", options, "shared_swiglu")
    assert from_public_config(public | {"n_shared_experts": 0}).shared == "none"


def test_of_a_model_with_several_towers_the_text_is_read():
    assert from_public_config(transformers.Llama4Config().to_dict()) == MOE_LAYER_PRESETS["llama4_scout"]


def test_what_was_a_constant_of_the_code_need_not_be_in_the_config():
    public = transformers.GptOssConfig().to_dict()
    del public["swiglu_alpha"]
    assert from_public_config(public) == MOE_LAYER_PRESETS["gpt_oss_120b"]


DEEPSEEK = transformers.DeepseekV3Config().to_dict()
QWEN = transformers.Qwen3MoeConfig().to_dict()


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ({}, "model_type must be one of mixtral, qwen3_moe, .*, got None"),
        (QWEN | {"model_type": "llama"}, "model_type must be one of .*, got 'llama'"),
        ({"model_type": "llama4"}, "model_type must be one of .*, got 'llama4'"),
        ({name: QWEN[name] for name in QWEN if name != "norm_topk_prob"}, "'qwen3_moe' must have norm_topk_prob, got none"),
        ({name: QWEN[name] for name in QWEN if name != "num_experts_per_tok"}, "must have num_experts_per_tok, got none"),
        (DEEPSEEK | {"n_group": None}, "'deepseek_v3' must have n_group, got none"),
        (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid' of model_type 'deepseek_v3', got 'softmax'"),
        (DEEPSEEK | {"hidden_act": "gelu"}, "hidden_act must be 'silu' of model_type 'deepseek_v3', got 'gelu'"),
    ],
)
def test_a_config_that_cannot_be_read_names_the_field(public, message):
    with pytest.raises(ValueError, match=message):
        from_public_config(public)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": "softmax"}, "router must be one of softmax_topk, .*, got 'softmax'"),
        ({"dispatcher": "ring"}, "dispatcher must be one of local, all_to_all, .*, got 'ring'"),
        ({"shared": "swiglu"}, "shared must be 'none' or 'shared_swiglu' or 'gated_shared_swiglu', got 'swiglu'"),
        ({"router_options": {"top_k": 2}}, "must be top_k, renormalize of router 'softmax_topk', which lacks renorm"),
        ({"router_options": TOP2 | {"groups": 1}}, "router_options must be .* of router 'softmax_topk', which has no groups"),
        ({"runner_options": {"limit": 7.0}}, "runner_options must be empty of runner 'fused_swiglu', which has no limit"),
        ({"runner": "input_scaled_swiglu"}, "needs ids and input weights, but router 'softmax_topk' hands on ids and w"),
        ({"expert_layout": "packed"}, "expert_layout must be one of linear, .*, got 'packed'"),
        (
            {"expert_layout": "interleaved"},
            "expert_layout 'interleaved' holds w13, w2, b13, b2, gate and up in turn, but runner 'fused_swiglu' takes w13, w2, "
            "gates first; it fits linear, mixtral-linear, stacked, transposed, w13",
        ),
        (
            {"runner": "fused_gelu_mlp", "runner_options": {"approximate": "none"}},
            "but runner 'fused_gelu_mlp' takes w1, b1, w2, b2, gates first; it fits none: `build_moe_layer` takes them",
        ),
        (
            {"router": "hash_router", "router_options": {}},
            "router must read the logits of a gate, got 'hash_router'",
        ),
        (
            {
                "router": "bypass", "router_options": {}, "runner": "routing_swiglu", "runner_options": TOP2,
                "dispatcher": "all_to_all",
            },
            "dispatcher 'all_to_all' needs ids and weights or ids and input weights, but runner 'routing_swiglu' takes logits; "
            "it fits local, tensor_parallel",
        ),
        (
            {"router": "switch_top1", "router_options": {"capacity_factor": 1.0}, "dispatcher": "all_gather"},
            "dispatcher 'all_gather' shows each rank a part of the tokens, but router 'switch_top1' chooses by all of them; "
            "it fits local, replicated_tokens, tensor_parallel",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named_with_what_does(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MOE_LAYER_PRESETS["mixtral_8x7b"], **changes)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_every_dispatcher_has_a_config(dispatcher):
    assert replace(MOE_LAYER_PRESETS["mixtral_8x7b"], dispatcher=dispatcher).dispatcher == dispatcher


@pytest.mark.parametrize("framework", [moe_building, of_jax], ids=["torch", "jax"])
def test_a_dispatcher_needs_its_mesh_and_a_realm_that_has_it(framework):
    config = replace(MOE_LAYER_PRESETS["mixtral_8x7b"], dispatcher="all_to_all")
    with pytest.raises(ValueError, match="mesh must be given for dispatcher 'all_to_all', which spreads experts over ranks"):
        framework.build_layer(config)
    with pytest.raises(ValueError, match="dispatchers must have 'all_to_all', got local"):
        framework.build_layer(config, mesh=object())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_realm_hands_in_how_it_spreads_experts(rank):
    """Here on two ranks that have all tokens: what a rank's runner is given are its experts, and the routes of all of them."""
    whole = MOE_LAYER_PRESETS["mixtral_8x7b"]
    hidden, state = arguments(whole)
    expected = moe_building.build_layer(whole)(hidden, state)
    held = slice(rank * E // 2, (rank + 1) * E // 2)
    share = {name: each[held] if name.startswith("experts.") else each for name, each in state.items()}
    other = {name: each for name, each in state.items() if name.startswith("experts.")}

    def replicated_tokens(run, mesh):
        def spread(tokens, w13, w2, weights, ids):
            assert (
                mesh == "mesh" and torch.equal(w13, share["experts.gate_up_proj"]) and torch.equal(w2, share["experts.down_proj"])
            )
            return run(tokens, other["experts.gate_up_proj"], other["experts.down_proj"], weights, ids)

        return spread

    config = replace(whole, dispatcher="replicated_tokens")
    layer = moe_building.build_layer(config, mesh="mesh", dispatchers={"replicated_tokens": replicated_tokens})
    assert torch.equal(layer(hidden, share)[0], expected[0])
    with pytest.raises(
        ValueError, match=r"expert_layout 'linear' has all experts by their numbers, .*; it fits stacked, transposed, w13"
    ):
        replace(config, expert_layout="linear")


def test_every_layout_of_one_runner_gives_the_same():
    config = shrunk("qwen3_30b_a3b")
    hidden, state = arguments(config)
    expected = moe_building.build_layer(config)(hidden, state)
    weights = ExpertWeights(state.pop("experts.gate_up_proj"), state.pop("experts.down_proj"))
    for layout in ("linear", "mixtral-linear", "transposed", "w13"):
        other = replace(config, expert_layout=layout, experts="moe.experts")
        got = moe_building.build_layer(other)(hidden, state | from_w13(weights, layout, prefix="moe.experts."))
        torch.testing.assert_close(got[0], expected[0], **DIGITS)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda state: {name: state[name] for name in state if name != "gate.weight"}, ValueError, "state must have gate.weight"),
        (lambda state: state | {"more": state["gate.weight"]}, ValueError, "state must have no other entries, got more"),
        (lambda state: [*state.values()], TypeError, "state must be a dict of arrays, got list"),
        (
            lambda state: state | {"gate.weight": state["gate.weight"][:-1]},
            ValueError,
            "experts.down_proj.* must be .num_experts=7",
        ),
        (
            lambda state: state | {"gate.weight": state["gate.weight"].float()},
            TypeError,
            "gate.weight.* must be float64, got float32",
        ),
        (
            lambda state: {name: state[name] for name in state if "bias" not in name},
            ValueError,
            "state must have gate.e_score_correction_bias, got none",
        ),
        (
            lambda state: state | {"gate.e_score_correction_bias": state["gate.e_score_correction_bias"][:-1]},
            ValueError,
            "e_score_correction_bias must be .num_experts=8., got .7",
        ),
    ],
)
def test_a_bad_state_is_named(spoil, error, message):
    config = shrunk("deepseek_v3")
    hidden, state = arguments(config)
    with pytest.raises(error, match=message):
        moe_building.build_layer(config)(hidden, spoil(state))


def test_a_layer_whose_runner_chooses_returns_no_ids():
    config = MoELayerConfig(router="bypass", router_options={}, runner="routing_swiglu", runner_options=TOP2)
    hidden, state = arguments(config)
    out, logits, ids = moe_building.build_layer(config)(hidden, state)
    expected = moe_building.build_layer(MOE_LAYER_PRESETS["mixtral_8x7b"])(hidden, state)
    assert torch.equal(out, expected[0]) and torch.equal(logits, expected[1]) and ids is None


def test_what_a_router_needs_beside_its_state_is_given_by_name():
    config = MoELayerConfig(router="ste_topk", router_options={"top_k": 2, "noise_std": 0.1, "training": True})
    hidden, state = arguments(config)
    layer = moe_building.build_layer(config)
    quiet, loud = (layer(hidden, state, noise=scale * draw(T, E, seed=5))[0] for scale in (0, 1))
    assert not torch.equal(quiet, loud)
    with pytest.raises(ValueError, match=re.escape("arrays must be noise of router 'ste_topk', which lacks noise")):
        layer(hidden, state)


def test_configs_are_values():
    config = MOE_LAYER_PRESETS["deepseek_v3"]
    again = pickle.loads(pickle.dumps(config))
    assert again == copy.deepcopy(config) == config and hash(again) == hash(config)
    assert config != replace(config, router_options=dict(config.router_options) | {"top_k": 4})


def test_the_names_of_parts_are_those_of_the_references():
    modules = moe_building.ROUTER_MODULES
    for name in set(ROUTERS) - {"bypass"}:
        assert any(hasattr(module, name) for module in modules)
    assert all(callable(moe_building.runner_of(name)) for name in RUNNERS)
