"""MoE layers over ranks: what the conformance suite does not ask of every implementation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_four_ranks import (
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_EXPERTS,
    RANKS,
    TOKENS,
    assert_equal_to_rounding,
    draw,
    four_ranks,
    mesh_of,
)

from gaugeblock.optimized.distributed import moe_layers
from gaugeblock.optimized.distributed.dispatchers import DISPATCHERS
from gaugeblock.reference import moe_parts, moe_states
from gaugeblock.reference.configs import DiTMoEConfig
from gaugeblock.reference.moe_configs import MOE_LAYER_PRESETS
from gaugeblock.reference.torch import biased_moe_layers, dit_moe_layers, moe_building

on_ranks = pytest.fixture(scope="module")(four_ranks)
SIZES = {
    "num_experts": NUM_EXPERTS,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE_SIZE,
    "two_intermediate_sizes": 2 * INTERMEDIATE_SIZE,
    "shared_intermediate_size": 6,
    "one": 1,
}
Outputs = tuple[torch.Tensor, ...]
WAYS = {name: getattr(moe_layers, f"qwen2_moe{name}") for name in ("", "_gathered", "_replicated", "_tensor_parallel")}


def state_of(axes: moe_states.StateAxes) -> dict[str, torch.Tensor]:
    return {name: draw(*(SIZES[axis] for axis in axes[name]), seed=seed) for seed, name in enumerate(axes)}


def with_experts_of(state: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The parameters that a rank has, of whole ones."""
    return {name: each.chunk(RANKS)[rank] if name.startswith("experts.") else each for name, each in state.items()}


def state_of_rank(way: str, rank: int) -> dict[str, torch.Tensor]:
    """The parameters of Qwen2-MoE's layer that a rank has."""
    state = state_of(moe_states.QWEN2)
    if way != "_tensor_parallel":
        return with_experts_of(state, rank)
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


def call_dit_moe(of_rank_2: str) -> str:
    """Call DiT-MoE's layer, badly on rank 2 alone, then well; return what the first call raised."""
    mesh = mesh_of(RANKS)
    rank, bad = mesh.get_local_rank(), mesh.get_local_rank() == 2
    tokens, state = draw(1 + rank, 3, HIDDEN_SIZE, seed=9), with_experts_of(state_of(moe_states.DIT_MOE), rank)
    call: dict[str, Any] = {"hidden_states": tokens, "state": state, "config": DiTMoEConfig(), "mesh": mesh}
    name = "shared_experts.up_proj.weight"
    changes: dict[str, dict[str, Any]] = {
        "another loss": {"config": DiTMoEConfig(per_sample=True)},
        "no config": {"config": None},
        "tokens of no sample": {"hidden_states": tokens.flatten(0, 1)},
        "no state": {"state": None},
        "an entry less": {"state": {name: each for name, each in state.items() if name != "gate.weight"}},
        "a gradient": {"state": state | {name: state[name].clone().requires_grad_()}},
    }
    try:
        moe_layers.dit_moe(**(call | changes[of_rank_2] if bad else call))
    except (TypeError, ValueError) as error:
        good = {name: each.detach().requires_grad_() for name, each in state.items()}
        sum(each.sum() for each in moe_layers.dit_moe(**call | {"state": good})).backward()
        assert all(each.grad is not None for each in good.values())
        return str(error)
    return "nothing raised"


ALIKE = "on every rank, got"


@pytest.mark.parametrize(
    ("of_rank_2", "told"),
    [
        ("another loss", f"config must have the same per_sample {ALIKE} [0, 0, 1, 0]"),
        ("no config", "config must be a DiTMoEConfig, got NoneType"),
        ("tokens of no sample", "hidden_states must be [batch_size, num_tokens, hidden_size], got (9, 12)"),
        ("no state", "state must be a dict of arrays, got NoneType"),
        ("an entry less", "state must have gate.weight, got none"),
        ("a gradient", f"state['shared_experts.up_proj.weight'] must require a gradient alike {ALIKE} [0, 0, 1, 0]"),
    ],
)
def test_ranks_that_do_not_agree_on_a_layer_with_a_loss_all_raise_and_the_next_call_works(on_ranks, of_rank_2, told):
    for rank, message in enumerate(on_ranks(call_dit_moe, of_rank_2)):
        assert message.startswith(told), message
        assert message.endswith("(on rank 2)") == (rank != 2 and ALIKE not in told), message


def call_upcycled_gpt2() -> str:
    """Call the layer with noise for another number of tokens on rank 2 alone, then well; return what the first call raised."""
    mesh = mesh_of(RANKS)
    rank, options = mesh.get_local_rank(), {"top_k": 2, "noise_std": 0.1, "training": True, "mesh": mesh}
    tokens, state = draw(rank, HIDDEN_SIZE, seed=9), with_experts_of(state_of(moe_states.UPCYCLED_GPT2), rank)
    noise = draw(rank, NUM_EXPERTS, seed=8)
    try:
        moe_layers.upcycled_gpt2_moe(tokens, state, noise[1:] if rank == 2 else noise, **options)
    except ValueError as error:
        *_, load = moe_layers.upcycled_gpt2_moe(tokens, state, noise, **options)
        torch.testing.assert_close(load.sum().item(), 1.0)
        return str(error)
    return "nothing raised"


def test_noise_for_other_tokens_on_one_rank_raises_on_all_and_the_next_call_works(on_ranks):
    told = "noise must be [num_tokens=2, num_experts=8], got (1, 8)"
    assert on_ranks(call_upcycled_gpt2) == [told if rank == 2 else f"{told} (on rank 2)" for rank in range(RANKS)]


def differentiated(
    layer: Callable[..., Outputs],
    arrays: list[torch.Tensor],
    state: dict[str, torch.Tensor],
    objective: Callable[..., torch.Tensor],
) -> tuple[Outputs, dict[str, torch.Tensor]]:
    """Return a layer's outputs, and the gradients of an objective of them."""
    arrays = [arrays[0].detach().requires_grad_(), *arrays[1:]]
    state = {name: each.detach().requires_grad_() for name, each in state.items()}
    outputs = layer(arrays[0], state, *arrays[1:])
    objective(*outputs).backward()
    return outputs, {name: each.grad for name, each in {"hidden_states": arrays[0], **state}.items()}


def check_layer(
    axes: moe_states.StateAxes,
    alone: Callable[..., Outputs],
    spread: Callable[..., Outputs],
    arrays: list[torch.Tensor],
    objective: Callable[..., torch.Tensor],
    whole_outputs: tuple[int, ...],
) -> Outputs:
    """Compare this rank's results with those of one device; return what is of all tokens.

    Args:
        arrays: Of all ranks, whose first axis is split.
        objective: Of a rank's outputs: sums over its tokens, and what is of all tokens once.
        whole_outputs: Places of the outputs that are of all tokens.
    """
    mesh, sizes = mesh_of(RANKS), TOKENS[RANKS]
    rank, state = mesh.get_local_rank(), state_of(axes)
    mine = [each.split(sizes)[rank] for each in arrays]
    outputs, gradients = differentiated(alone, arrays, state, objective)
    of_rank, gradients_of_rank = differentiated(
        lambda *call: spread(*call, mesh=mesh), mine, with_experts_of(state, rank), objective
    )
    for place, (one_actual, one_expected) in enumerate(zip(of_rank, outputs, strict=True)):
        one_actual, one_expected = one_actual.double(), one_expected.double()  # ids among them
        assert_equal_to_rounding(one_actual, one_expected if place in whole_outputs else one_expected.split(sizes)[rank])
    expected = {"hidden_states": gradients["hidden_states"].split(sizes)[rank]}
    expected |= with_experts_of({name: gradients[name] for name in state}, rank)
    for name, gradient in gradients_of_rank.items():
        assert_equal_to_rounding(gradient, expected[name])
    return tuple(of_rank[place].detach() for place in whole_outputs)


def check_dit_moe(config: DiTMoEConfig, num_tokens: int) -> Outputs:
    def alone(*call: Any) -> Outputs:
        return dit_moe_layers.dit_moe(*call, config=config)

    def spread(*call: Any, **options: Any) -> Outputs:
        return moe_layers.dit_moe(*call, config=config, **options)

    def objective(out: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return out.square().sum() + 1000 * loss  # both gradients of the gate as large

    tokens = draw(sum(TOKENS[RANKS]), num_tokens, HIDDEN_SIZE, seed=9)
    return check_layer(moe_states.DIT_MOE, alone, spread, [tokens], objective, (3,))


@pytest.mark.parametrize("num_tokens", [3, 0])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_loss_of_all_ranks_counts_once_and_has_the_same_bits_on_every_rank(on_ranks, per_sample, scores, num_tokens):
    losses = on_ranks(check_dit_moe, DiTMoEConfig(3, 1.0, per_sample, scores), num_tokens)
    assert all(isinstance(each, tuple) and torch.equal(each[0], losses[0][0]) for each in losses), losses
    assert (losses[0][0] > 0) == (num_tokens > 0)


def check_upcycled_gpt2(top_k: int) -> Outputs:
    options = {"top_k": top_k, "noise_std": 0.5, "training": True}

    def alone(*call: Any) -> Outputs:
        return biased_moe_layers.upcycled_gpt2_moe(*call, **options)

    def spread(*call: Any, mesh: Any) -> Outputs:
        return moe_layers.upcycled_gpt2_moe(*call, **options, mesh=mesh)

    def objective(out: torch.Tensor, logits: torch.Tensor, _: Any, probs: torch.Tensor, entropy: torch.Tensor, load: Any) -> Any:
        return out.square().sum() + logits.square().sum() + (load * probs).sum() + entropy.sum()

    tokens = sum(TOKENS[RANKS])
    arrays = [draw(tokens, HIDDEN_SIZE, seed=9), draw(tokens, NUM_EXPERTS, seed=8)]
    return check_layer(moe_states.UPCYCLED_GPT2, alone, spread, arrays, objective, (5,))


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_load_is_that_of_all_ranks_tokens(on_ranks, top_k):
    loads = on_ranks(check_upcycled_gpt2, top_k)
    assert all(isinstance(each, tuple) and torch.equal(each[0], loads[0][0]) for each in loads), loads
