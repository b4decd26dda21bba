"""SDAR, LLaDA and Dream over ranks: what the conformance suite does not ask of every implementation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from on_four_ranks import RANKS, assert_equal_to_rounding, draw, four_ranks, mesh_of

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.distributed import (
    decoder_expert_parallel,
    decoder_tensor_parallel,
    fully_sharded_models,
    tensor_parallel,
)
from gaugeblock.reference.configs import DreamConfig, LLaDAConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.torch import dream, llada, sdar

on_ranks = pytest.fixture(scope="module")(four_ranks)
SMALL = {
    "vocab_size": 20, "hidden_size": 10, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 6, "rms_norm_eps": 1e-3, "rope_theta": 100.0, "mask_token_id": 19,
}  # fmt: skip
DENSE = SDARConfig(**SMALL, intermediate_size=12, block_length=3)
SPARSE = SDARMoEConfig(**SMALL, moe_intermediate_size=7, block_length=3, num_experts=4, num_experts_per_tok=2)
LLADA, DREAM = (each(**SMALL, intermediate_size=12) for each in (LLaDAConfig, DreamConfig))
MASK = torch.tensor([[True, True, False, True, True, True, False], [False, True, True, True, True, False, True]])
SAMPLES = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [7] * 7])
REFERENCES: dict[str, Callable] = {
    "llada": llada.llada, "dream": dream.dream, "sdar": sdar.sdar, "sdar_moe": sdar.sdar_moe, "sdar_cached": sdar.sdar_cached,
    "sdar_training": sdar.sdar_training,
}  # fmt: skip
CALLS = [
    ("llada", LLADA), ("dream", DREAM), ("sdar", DENSE), ("sdar_moe", SPARSE), ("sdar_cached", DENSE), ("sdar_cached", SPARSE),
    ("sdar_training", DENSE), ("sdar_training", SPARSE),
]  # fmt: skip

WAYS = {"experts": decoder_expert_parallel, "fsdp2": fully_sharded_models}


def state_of(config: Any) -> dict[str, torch.Tensor]:
    module = llada if isinstance(config, LLaDAConfig) else dream if isinstance(config, DreamConfig) else sdar
    shapes = module.state_shapes(config).items()
    return {name: draw(*shape, seed=seed) * max(shape) ** -0.5 for seed, (name, shape) in enumerate(shapes)}


def arrays_of(operation: str, config: Any, batch_size: int = 2) -> list[torch.Tensor]:
    ids = torch.stack([torch.arange(7) * 3 % 20, 19 - torch.arange(7)])[:batch_size]
    past = (config.num_hidden_layers, batch_size, config.num_key_value_heads, 6, config.head_dim)
    others = {
        "llada": [MASK], "dream": [MASK], "sdar_cached": [draw(*past, seed=90), draw(*past, seed=91)],
        "sdar_training": [ids.flip(1), SAMPLES],
    }  # fmt: skip
    return [ids, *(each if each.ndim == 5 else each[:batch_size] for each in others.get(operation, []))]


def as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def batch_axis(shape: Any) -> int:
    """Behind the layers, of what has them."""
    return 1 if len(shape) > 3 else 0


def results(
    function: Callable,
    state: dict[str, torch.Tensor],
    arrays: list[torch.Tensor],
    mine: Callable[[torch.Tensor], torch.Tensor] = lambda each: each,
    batch_size: int = 2,
    **options: Any,
) -> dict[str, Any]:
    """Outputs, and the gradients of the state and of what is floating beside it, by name; of a rank's examples of a batch."""
    leaves = {name: each.clone().requires_grad_() for name, each in state.items()}
    arrays = [mine(each).clone().requires_grad_() if each.is_floating_point() else mine(each) for each in arrays]
    outs = as_tuple(function(leaves, *arrays, **options))
    shapes = [[*each.shape] for each in outs]
    for shape in shapes:
        shape[batch_axis(shape)] = batch_size
    cotangents = [mine(draw(*shape, seed=95 + place)) for place, shape in enumerate(shapes)]
    tracked = leaves | {f"argument {place}": each for place, each in enumerate(arrays) if each.is_floating_point()}
    gradients = torch.autograd.grad(outs, [*tracked.values()], cotangents)
    return {f"out {place}": each.detach() for place, each in enumerate(outs)} | dict(zip(tracked, gradients, strict=True))


def assert_agree(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, each in actual.items():
        if not name.endswith("k_proj.bias"):  # 0 but for rotations, of small terms
            assert_equal_to_rounding(each, expected[name])


def tensor_parallel_of(operation: str, config: Any, ranks: int) -> bool:
    """Whether ranks that share heads, features, experts and vocabulary give the whole model's results and gradients."""
    state, arrays = state_of(config), arrays_of(operation, config)
    expected = results(REFERENCES[operation], state, arrays, config=config)
    sharded = getattr(decoder_tensor_parallel, operation)
    assert_agree(results(sharded, state, arrays, config=config, mesh=mesh_of(ranks)), expected)
    return True


@pytest.mark.parametrize(("operation", "config"), CALLS)
def test_heads_and_features_over_ranks_give_the_reference(on_ranks, operation, config):
    for ranks in (2, RANKS):
        assert on_ranks(tensor_parallel_of, operation, config, ranks) == [True] * RANKS


def data_parallel_of(way: str, operation: str, config: Any) -> bool:
    """Whether ranks with examples of their own give the results of these, and the gradients of all; two have none."""
    mesh, state, arrays = mesh_of(RANKS), state_of(config), arrays_of(operation, config)
    first, last = ((0, 1), (1, 1), (1, 2), (2, 2))[mesh.get_local_rank()]

    def mine(each: torch.Tensor) -> torch.Tensor:
        return each.narrow(batch_axis(each.shape), first, last - first)

    expected = results(REFERENCES[operation], state, arrays, config=config)
    own = {name: mine(each) if name.startswith(("out", "argument")) else each for name, each in expected.items()}
    assert_agree(results(getattr(WAYS[way], operation), state, arrays, mine, config=config, mesh=mesh), own)
    return True


@pytest.mark.parametrize(
    ("way", "operation", "config"),
    [
        ("experts", "sdar_moe", SPARSE),
        ("fsdp2", "sdar_cached", DENSE),
        ("fsdp2", "sdar_training", SPARSE),
    ],
)
def test_ranks_may_have_examples_of_their_own(on_ranks, way, operation, config):
    assert on_ranks(data_parallel_of, way, operation, config) == [True] * RANKS


def experts_kept_alone() -> bool:
    """Whether a rank that keeps its experts gives what the whole model gives, and the gradients of its experts."""
    mesh, state, (ids,) = mesh_of(RANKS), state_of(SPARSE), arrays_of("sdar_moe", SPARSE)
    rules, rank = partition_rules.EXPERTS_OF_DECODER, mesh.get_local_rank()
    with torch.no_grad():
        parts = tensor_parallel.parts_of_state(state, rules, mesh.get_group())
    actual = results(decoder_expert_parallel.sdar_moe_of_parts, parts, [ids], config=SPARSE, mesh=mesh)
    expected = results(sdar.sdar_moe, state, [ids], config=SPARSE)
    for name in state:  # every rank has the same two examples: gradients are those of as many
        whole = RANKS * expected[name]
        expected[name] = partition_rules.part(whole, partition_rules.cut_of(name, rules), rank=rank, ranks=RANKS)
    assert_agree(actual, expected)
    return True


def test_a_rank_can_keep_its_experts_alone(on_ranks):
    assert on_ranks(experts_kept_alone) == [True] * RANKS


def decoded_by_parts() -> bool:
    """Whether a rank that keeps its parts, and the past of its own heads, decodes as the whole model does."""
    mesh, state = mesh_of(RANKS), state_of(SPARSE)
    group, rank = mesh.get_group(), mesh.get_local_rank()
    with torch.no_grad():
        parts = tensor_parallel.parts_of_state(state, partition_rules.of_decoder(SPARSE), group)
    assert sum(each.numel() for each in parts.values()) < 0.5 * sum(each.numel() for each in state.values())
    ids = torch.stack([torch.arange(9) * 7 % 20, torch.arange(9)])
    own = [torch.zeros(2, 2, 1, 0, 6, dtype=torch.float64) for _ in range(2)]
    for first in (0, 3, 6):
        logits, *more = decoder_tensor_parallel.sdar_cached.of_parts(
            parts, ids[:, first : first + 3], *own, config=SPARSE, mesh=mesh
        )
        own = [torch.cat(each, dim=3) for each in zip(own, more, strict=True)]
        expected = sdar.sdar_moe(state, ids[:, : first + 3], config=SPARSE)[0][:, first:]
        assert_equal_to_rounding(logits, expected)
    nothing = torch.zeros(2, 2, 4, 0, 6, dtype=torch.float64)
    _, *whole = sdar.sdar_cached(state, ids, nothing, nothing, config=SPARSE)
    for one, other in zip(own, whole, strict=True):
        assert_equal_to_rounding(one, other[:, :, rank : rank + 1])
    return True


def test_a_rank_can_keep_its_parts_and_the_past_of_its_heads_alone(on_ranks):
    assert on_ranks(decoded_by_parts) == [True] * RANKS


def exchanges(config: Any) -> list[int]:
    """How many collectives forward and backward there are more with one layer more."""
    names, counts = ["all_to_all_single", "all_gather", "all_reduce"], []
    for layers in (1, 2):
        changed = replace(config, num_hidden_layers=layers)
        leaves = {name: each.requires_grad_() for name, each in state_of(changed).items()}
        with mock.patch.multiple(dist, **{name: mock.Mock(wraps=getattr(dist, name)) for name in names}):
            (ids,) = arrays_of("sdar", changed)
            out = decoder_tensor_parallel.sdar(leaves, ids, config=changed, mesh=mesh_of(RANKS))
            forward = sum(getattr(dist, name).call_count for name in names)
            out.sum().backward()
            counts.append([forward, sum(getattr(dist, name).call_count for name in names) - forward])
    return [more - fewer for fewer, more in zip(*counts, strict=True)]


def test_a_layer_has_an_exchange_for_each_branch_and_way(on_ranks):
    assert on_ranks(exchanges, DENSE) == [[2, 2]] * RANKS


def of_no_sequence(operation: str, config: Any) -> bool:
    state, arrays = state_of(config), [each[:, :0] if each.ndim == 5 else each[:0] for each in arrays_of(operation, config)]
    expected = results(REFERENCES[operation], state, arrays, batch_size=0, config=config)
    sharded = getattr(decoder_tensor_parallel, operation)
    assert_agree(results(sharded, state, arrays, batch_size=0, config=config, mesh=mesh_of(RANKS)), expected)
    return True


@pytest.mark.parametrize(("operation", "config"), [("dream", DREAM), ("sdar_moe", SPARSE), ("sdar_cached", DENSE)])
def test_no_sequence_is_a_call(on_ranks, operation, config):
    assert on_ranks(of_no_sequence, operation, config) == [True] * RANKS


def raised_by(change: str) -> str:
    """Make a call that is bad, some of them on rank 2 alone, then a good one; return what the first raised."""
    mesh, changes = mesh_of(RANKS), {"two heads": {"num_key_value_heads": 2}, "13 features": {"intermediate_size": 13}}
    is_mine = mesh.get_local_rank() == 2
    config = replace(DENSE, **(changes | ({"one layer": {"num_hidden_layers": 1}} if is_mine else {})).get(change, {}))
    state, arrays = state_of(config), arrays_of("sdar_cached", config)
    if is_mine:
        arrays = {
            "fewer tokens": [arrays[0][:, :5], *arrays[1:]],
            "ids": [arrays[0] + 1, *arrays[1:]],
            "a longer past": [arrays[0], *(torch.cat([each, each], dim=3) for each in arrays[1:])],
            "a past of other heads": [arrays[0], *(each[:, :, :2] for each in arrays[1:])],
            "no array": [None, *arrays[1:]],
        }.get(change, arrays)
    message = "nothing raised"
    try:
        decoder_tensor_parallel.sdar_cached(state, *arrays, config=config, mesh=mesh)
    except (TypeError, ValueError) as error:
        message = str(error)
    state, arrays = state_of(DENSE), arrays_of("sdar_cached", DENSE)
    good = decoder_tensor_parallel.sdar_cached(state, *arrays, config=DENSE, mesh=mesh)
    assert_equal_to_rounding(good[0], sdar.sdar_cached(state, *arrays, config=DENSE)[0])
    return message


def raised_by_experts(change: str) -> str:
    """The same with examples of each rank's own, of which the next call has none on rank 2."""
    mesh, config = mesh_of(RANKS), replace(SPARSE, num_experts=6) if change == "six experts" else SPARSE
    state, (ids,) = state_of(config), arrays_of("sdar_moe", config)
    is_mine, message = mesh.get_local_rank() == 2, "nothing raised"
    if is_mine and change == "a state without a head":
        state.pop("lm_head.weight")
    try:
        decoder_expert_parallel.sdar_moe(state, ids + 1 if is_mine and change == "ids" else ids, config=config, mesh=mesh)
    except ValueError as error:
        message = str(error)
    state, mine = state_of(SPARSE), ids[:0] if is_mine else ids
    good = decoder_expert_parallel.sdar_moe(state, mine, config=SPARSE, mesh=mesh)
    for one, other in zip(good, sdar.sdar_moe(state, mine, config=SPARSE), strict=True):
        assert_equal_to_rounding(one, other)
    return message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("two heads", "num_key_value_heads must be a multiple of the 4 ranks that share it, got 2"),
        ("13 features", "intermediate_size must be a multiple of the 4 ranks that share it, got 13"),
        ("one layer", "state must have the same num_hidden_layers on every rank, got [2, 2, 1, 2]"),
        ("fewer tokens", "state must have the same num_tokens on every rank, got [7, 7, 5, 7]"),
        ("a longer past", "state must have the same num_past_tokens on every rank, got [6, 6, 12, 6]"),
        ("ids", "input_ids must be in 0..19, got"),
        ("a past of other heads", "past_keys must be [num_hidden_layers=2, batch_size=2, num_key_value_heads=4, "),
        ("no array", "input_ids must be"),
    ],
)
def test_a_bad_call_raises_on_every_rank_and_the_next_call_works(on_ranks, change, told):
    for message in on_ranks(raised_by, change):
        assert message.startswith(told), message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("six experts", "num_experts must be a multiple of the 4 ranks that share it, got 6"),
        ("ids", "input_ids must be in 0..19, got"),
        ("a state without a head", "state must have lm_head.weight, got none"),
    ],
)
def test_a_bad_call_of_experts_raises_on_every_rank_and_the_next_call_works(on_ranks, change, told):
    for message in on_ranks(raised_by_experts, change):
        assert message.startswith(told), message
