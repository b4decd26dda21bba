"""MoE layers over ranks: what the conformance suite does not ask of every implementation."""

from dataclasses import replace

import pytest
import torch
from on_four_ranks import HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, RANKS, assert_equal_to_rounding, draw, four_ranks, mesh_of

from gaugeblock.optimized.distributed import moe_layers
from gaugeblock.optimized.distributed.dispatchers import DISPATCHERS
from gaugeblock.reference import moe_parts, moe_states
from gaugeblock.reference.moe_configs import MOE_LAYER_PRESETS
from gaugeblock.reference.torch import moe_building

on_ranks = pytest.fixture(scope="module")(four_ranks)
SIZES = {
    "num_experts": NUM_EXPERTS,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE_SIZE,
    "two_intermediate_sizes": 2 * INTERMEDIATE_SIZE,
    "shared_intermediate_size": 6,
    "one": 1,
}
WAYS = {name: getattr(moe_layers, f"qwen2_moe{name}") for name in ("", "_gathered", "_replicated", "_tensor_parallel")}


def state_of_rank(way: str, rank: int) -> dict[str, torch.Tensor]:
    """The parameters of Qwen2-MoE's layer that a rank has."""
    axes = moe_states.QWEN2
    state = {name: draw(*(SIZES[axis] for axis in axes[name]), seed=seed) for seed, name in enumerate(axes)}
    if way != "_tensor_parallel":
        return {name: each.chunk(RANKS)[rank] if name.startswith("experts.") else each for name, each in state.items()}
    w13 = state["experts.gate_up_proj"].unflatten(1, (2, RANKS, -1))[:, :, rank].flatten(1, 2)
    return state | {"experts.gate_up_proj": w13, "experts.down_proj": state["experts.down_proj"].chunk(RANKS, 2)[rank]}


def call_layer(way: str, change: str) -> str:
    """Make a call that is bad on rank 2 alone, then a good one; return what the first raised."""
    mesh = mesh_of(RANKS)
    rank, layer, options = mesh.get_local_rank(), WAYS[way], {"top_k": 3, "renormalize": False}
    hidden_states, state = draw(5, HIDDEN_SIZE, seed=9).requires_grad_(), state_of_rank(way, mesh.get_local_rank())
    bad_state, bad_options = dict(state), dict(options)
    if rank == 2:
        if change == "a gate of another width":
            bad_state["gate.weight"] = state["gate.weight"][:, 1:]
        elif change == "top_k above num_experts":
            bad_options["top_k"] = NUM_EXPERTS + 1
        elif change == "a gradient":
            bad_state["gate.weight"] = state["gate.weight"].clone().requires_grad_()
    try:
        layer(hidden_states, bad_state, **bad_options, mesh=mesh)
    except (TypeError, ValueError) as error:
        layer(hidden_states, state, **options, mesh=mesh)[0].sum().backward()
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("a gate of another width", "state['gate.weight'] must be [num_experts, hidden_size=12], got (8, 11)"),
        ("top_k above num_experts", "top_k must be in 1..num_experts=8, got 9"),
        (
            "a gradient",
            "state['gate.weight'] must require a gradient alike on every rank, got [0, 0, 1, 0]",
        ),
    ],
)
def test_a_bad_call_on_one_rank_raises_on_all_and_the_next_call_works(on_ranks, way, change, told):
    for rank, message in enumerate(on_ranks(call_layer, way, change)):
        there = f"ValueError: {told}"
        assert message == (there if rank == 2 or change == "a gradient" else f"{there} (on rank 2)"), message


def differing_tokens(way: str) -> list[str]:
    """Call a layer whose ranks must have the same tokens with others on each."""
    mesh = mesh_of(RANKS)
    rank = mesh.get_local_rank()
    with pytest.raises(ValueError, match="hidden_states must have the same num_tokens on every rank, got"):
        WAYS[way](draw(1 + rank, HIDDEN_SIZE, seed=9), state_of_rank(way, rank), top_k=2, renormalize=True, mesh=mesh)
    return ["raised"]


@pytest.mark.parametrize("way", ["_replicated", "_tensor_parallel"])
def test_ranks_that_must_have_the_same_tokens_say_if_they_have_not(on_ranks, way):
    assert on_ranks(differing_tokens, way) == [["raised"]] * RANKS


def built_over_ranks(preset: str, dispatcher: str) -> bool:
    """Whether a layer of a preset, built with its experts spread, gives what it gives with all on one rank."""
    mesh = mesh_of(RANKS)
    rank, config = mesh.get_local_rank(), replace(MOE_LAYER_PRESETS[preset], dispatcher=dispatcher)
    spec = moe_parts.DISPATCHERS[dispatcher]
    axes = MOE_LAYER_PRESETS[preset].axes(NUM_EXPERTS)
    state = {name: draw(*(SIZES[axis] for axis in axes[name]), seed=seed) for seed, name in enumerate(axes)}
    if config.bias is not None:
        state[config.bias] = draw(NUM_EXPERTS, seed=50)
    mine = {name: each.chunk(RANKS)[rank] if name.startswith(f"{config.experts}.") else each for name, each in state.items()}
    tokens = draw(8, HIDDEN_SIZE, seed=9)
    of_rank = tokens.chunk(RANKS)[rank] if spec.splits_tokens else tokens

    alone = moe_building.build_layer(replace(config, dispatcher="local"))(tokens, state)[0]
    spread = moe_building.build_layer(config, mesh=mesh, dispatchers=DISPATCHERS)(of_rank, mine)[0]
    assert_equal_to_rounding(spread, alone.chunk(RANKS)[rank] if spec.splits_tokens else alone)
    return True


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather", "replicated_tokens"])
@pytest.mark.parametrize("preset", ["mixtral_8x7b", "gpt_oss_120b", "llama4_scout"])
def test_a_layer_that_is_built_spreads_its_experts(on_ranks, preset, dispatcher):
    assert on_ranks(built_over_ranks, preset, dispatcher) == [True] * RANKS


def test_every_dispatcher_is_there():
    assert {"local", *DISPATCHERS} == set(moe_parts.DISPATCHERS)
