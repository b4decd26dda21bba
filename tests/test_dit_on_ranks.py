"""DiT over ranks: what the conformance suite does not ask of every implementation."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from on_four_ranks import RANKS, assert_equal_to_rounding, draw, four_ranks, mesh_of

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.distributed import dit_sequence_parallel, dit_tensor_parallel, sequence_parallel, tensor_parallel
from gaugeblock.optimized.distributed.collectives import replicated
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch import dit
from gaugeblock.reference.torch.attention import attention, split_heads

on_ranks = pytest.fixture(scope="module")(four_ranks)
CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=24, depth=2, num_heads=4, mlp_ratio=1.5, num_classes=5)
WAYS = {"tensor": dit_tensor_parallel.dit, "sequence": dit_sequence_parallel.dit}


def call_of(config: DiTConfig) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    shapes = dit.state_shapes(config)
    state = {name: draw(*shape, seed=seed) * max(shape) ** -0.5 for seed, (name, shape) in enumerate(shapes.items())}
    latents = draw(3, config.in_channels, config.input_size, config.input_size, seed=90)
    return state, [latents, torch.tensor([0.0, 2.0, 1.5], dtype=torch.float64), torch.tensor([5, 0, 3])]


def raised_by(way: str, change: str) -> str:
    """Make a call that is bad, some of them on rank 2 alone, then a good one; return what the first raised."""
    mesh = mesh_of(RANKS)
    state, (latents, times, labels) = call_of(CONFIG)
    config, is_mine = CONFIG, mesh.get_local_rank() == 2
    if change == "three heads":
        config = replace(CONFIG, num_heads=3)
    elif change == "a hidden layer of 30":
        config = replace(CONFIG, mlp_ratio=1.25)
        state = call_of(config)[0]
    elif change == "nine patches":
        config = replace(CONFIG, input_size=6)
        latents = latents[..., :6, :6]
    elif is_mine and change == "labels":
        labels = labels + 1
    elif is_mine and change == "a batch of two":
        latents, times, labels = (each[:2] for each in (latents, times, labels))
    message = "nothing raised"
    try:
        WAYS[way](state, latents, times, labels, config=config, mesh=mesh)
    except ValueError as error:
        message = str(error)
    state, inputs = call_of(CONFIG)
    assert_equal_to_rounding(WAYS[way](state, *inputs, config=CONFIG, mesh=mesh), dit.dit(state, *inputs, config=CONFIG))
    return message


@pytest.mark.parametrize(
    ("way", "change", "told"),
    [
        ("tensor", "three heads", "num_heads must be a multiple of the 4 ranks that share it, got 3"),
        ("tensor", "a hidden layer of 30", "intermediate_size must be a multiple of the 4 ranks that share it, got 30"),
        ("tensor", "nine patches", "nothing raised"),
        ("sequence", "three heads", "num_heads must be a multiple of the 4 ranks that share it, got 3"),
        ("sequence", "nine patches", "num_patches must be a multiple of the 4 ranks that share it, got 9"),
        ("sequence", "a hidden layer of 30", "nothing raised"),
        *((way, "labels", "class_labels must be in 0..5, got 1..6") for way in WAYS),
        *((way, "a batch of two", "latents must have the same batch_size on every rank, got [3, 3, 2, 3]") for way in WAYS),
    ],
)
def test_a_bad_call_raises_on_every_rank_and_the_next_call_works(on_ranks, way, change, told):
    for rank, message in enumerate(on_ranks(raised_by, way, change)):
        assert message == (f"{told} (on rank 2)" if change == "labels" and rank != 2 else told), message


def exchanges(way: str) -> list[int]:
    """How many collectives a forward and a backward pass take, and how many there are more with one block more."""
    mesh, counts = mesh_of(RANKS), []
    names = ["all_to_all_single", "all_gather", "all_reduce"]
    for depth in (1, 2):
        config = replace(CONFIG, depth=depth)
        state, inputs = call_of(config)
        state = {name: each.requires_grad_() for name, each in state.items()}
        with mock.patch.multiple(dist, **{name: mock.Mock(wraps=getattr(dist, name)) for name in names}):
            out = WAYS[way](state, *inputs, config=config, mesh=mesh)
            forward = sum(getattr(dist, name).call_count for name in names)
            out.sum().backward()
            counts += [forward, sum(getattr(dist, name).call_count for name in names) - forward]
    return [counts[2] - counts[0], counts[3] - counts[1]]


def test_a_block_has_two_exchanges_each_way(on_ranks):
    for way in WAYS:
        assert on_ranks(exchanges, way) == [[2, 2]] * RANKS, way


def parts_alone() -> bool:
    """Whether a model of which a rank keeps only its parts gives the whole model's result, and the parts' gradients."""
    mesh, (state, inputs) = mesh_of(RANKS), call_of(CONFIG)
    group, rank = mesh.get_group(), mesh.get_local_rank()
    with torch.no_grad():
        parts = tensor_parallel.parts_of_state(state, partition_rules.DIT, group)
    parts = {name: each.clone().requires_grad_() for name, each in parts.items()}
    out = dit_tensor_parallel.dit_of_parts(parts, *inputs, config=CONFIG, group=group)
    cotangent = draw(*out.shape, seed=91)
    state = {name: each.requires_grad_() for name, each in state.items()}
    expected = dit.dit(state, *inputs, config=CONFIG)
    assert_equal_to_rounding(out.detach(), expected.detach())
    gradients = torch.autograd.grad(out, [*parts.values()], cotangent)
    whole = torch.autograd.grad(expected, [*state.values()], cotangent)
    for name, actual, gradient in zip(state, gradients, whole, strict=True):
        cut = partition_rules.cut_of(name, partition_rules.DIT)
        assert_equal_to_rounding(actual, partition_rules.part(gradient, cut, rank=rank, ranks=RANKS))
    return True


def test_a_rank_can_keep_its_parts_alone(on_ranks):
    assert on_ranks(parts_alone) == [True] * RANKS


def joint_attention(streams: list[torch.Tensor]) -> torch.Tensor:
    """Attention of all tokens of some streams, [B, A, S, F] each, to all."""
    tokens = torch.cat(streams, 2)
    return attention(tokens, tokens.tanh(), tokens.sin())


def two_streams() -> bool:
    """Whether joint attention of two streams, each cut by itself, is that of whole ones; outputs and gradients."""
    group = mesh_of(RANKS).get_group()
    whole = [draw(2, length, 24, seed=length) for length in (8, 16)]
    leaves = [each.clone().requires_grad_() for each in whole]
    mine = [sequence_parallel.own_tokens(each, group) for each in replicated(group, *leaves)]
    tokens = torch.cat([split_heads(each, 4) for each in mine], 2)
    attended = sequence_parallel.attention_over_ranks(torch.stack([tokens, tokens.tanh(), tokens.sin()]), group)
    of_streams = attended.split([8 // RANKS, 16 // RANKS], 2)
    out = [sequence_parallel.all_tokens(each.transpose(1, 2).flatten(2), group) for each in of_streams]

    others = [each.clone().requires_grad_() for each in whole]
    expected = joint_attention([split_heads(each, 4) for each in others]).split([8, 16], 2)
    expected = [each.transpose(1, 2).flatten(2) for each in expected]
    cotangents = [draw(*each.shape, seed=7) for each in expected]
    gradients, expected_gradients = (
        torch.autograd.grad(out, leaves, cotangents),
        torch.autograd.grad(expected, others, cotangents),
    )
    for actual, other in zip([*out, *gradients], [*expected, *expected_gradients], strict=True):
        assert_equal_to_rounding(actual.detach(), other.detach())
    return True


def test_streams_of_joint_attention_are_cut_each_by_itself(on_ranks):
    assert on_ranks(two_streams) == [True] * RANKS
