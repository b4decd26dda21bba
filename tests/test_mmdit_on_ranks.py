"""MMDiT over ranks: what the conformance suite does not ask of every implementation."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from agreement import assert_agree
from on_four_ranks import RANKS, draw, four_ranks, mesh_of

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.distributed import mmdit_sequence_parallel, mmdit_tensor_parallel, sequence_parallel, tensor_parallel
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.torch import mmdit
from gaugeblock.reference.torch.attention import attention

on_ranks = pytest.fixture(scope="module")(four_ranks)
CONFIG = MMDiTConfig(
    in_channels=3, num_layers=3, attention_head_dim=6, num_attention_heads=4, joint_attention_dim=7, caption_projection_dim=24,
    pooled_projection_dim=5, out_channels=3, pos_embed_max_size=4, dual_attention_layers=(0,), qk_norm="rms_norm",
)  # fmt: skip
WAYS = {"tensor": mmdit_tensor_parallel.mmdit, "sequence": mmdit_sequence_parallel.mmdit}
INPUTS = ("latents", "encoder_hidden_states", "pooled_projections")


def call_of(config: MMDiTConfig, *, text: int = 5, rows: int = 2, columns: int = 3) -> tuple[dict[str, torch.Tensor], list]:
    shapes = mmdit.state_shapes(config)
    state = {name: draw(*shape, seed=seed) * max(shape) ** -0.5 for seed, (name, shape) in enumerate(shapes.items())}
    return state, [
        draw(3, config.in_channels, 2 * rows, 2 * columns, seed=90),
        draw(3, text, config.joint_attention_dim, seed=91),
        draw(3, config.pooled_projection_dim, seed=92),
        torch.tensor([0.0, 999.0, 1.5], dtype=torch.float64),
    ]


def results_of(function, state: dict, inputs: list, **options) -> dict[str, torch.Tensor]:
    """The result, and the gradient of every parameter and input by name."""
    leaves = {**state, **dict(zip(INPUTS, inputs, strict=False))}
    leaves = {name: each.detach().clone().requires_grad_() for name, each in leaves.items()}
    own_state = {name: leaves[name] for name in state}
    out = function(own_state, *(leaves[name] for name in INPUTS), inputs[3], **options)
    gradients = torch.autograd.grad(out, [*leaves.values()], draw(*out.shape, seed=93))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def agrees(way: str, changes: dict, sizes: dict) -> bool:
    """Whether a way gives the reference's result and gradients."""
    config = replace(CONFIG, **changes)
    state, inputs = call_of(config, **sizes)
    expected = results_of(mmdit.mmdit, state, inputs, config=config)
    assert_agree(results_of(WAYS[way], state, inputs, config=config, mesh=mesh_of(RANKS)), expected)
    return True


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, {}),
        ({"qk_norm": None, "dual_attention_layers": ()}, {"text": 8, "rows": 4, "columns": 4}),  # nothing is filled up
        ({"dual_attention_layers": (2,)}, {"text": 1, "rows": 1, "columns": 1}),  # three ranks have none of them
    ],
)
def test_outputs_and_gradients_are_those_of_the_reference(on_ranks, way, changes, sizes):
    assert on_ranks(agrees, way, changes, sizes) == [True] * RANKS


def raised_by(way: str, change: str) -> str:
    """Make a call that is bad, some of them on rank 2 alone, then a good one; return what the first raised."""
    mesh = mesh_of(RANKS)
    config, is_mine = CONFIG, mesh.get_local_rank() == 2
    if change == "three heads":
        config = replace(CONFIG, num_attention_heads=3, attention_head_dim=8)
    state, inputs = call_of(config)
    if is_mine and change == "a longer text":
        inputs = call_of(config, text=6)[1]
    elif is_mine and change == "a wider image":
        inputs = call_of(config, columns=4)[1]
    elif is_mine and change == "times of integers":
        inputs[3] = inputs[3].long()
    message = "nothing raised"
    try:
        WAYS[way](state, *inputs, config=config, mesh=mesh)
    except (TypeError, ValueError) as error:
        message = str(error)
    agrees(way, {}, {})
    return message


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("three heads", "num_attention_heads must be a multiple of the 4 ranks that share it, got 3"),
        ("a longer text", "latents must have the same num_text_tokens on every rank, got [5, 5, 6, 5]"),
        ("a wider image", "latents must have the same width on every rank, got [6, 6, 8, 6]"),
        ("times of integers", "timesteps must be"),
    ],
)
def test_a_bad_call_raises_on_every_rank_and_the_next_call_works(on_ranks, way, change, told):
    for message in on_ranks(raised_by, way, change):
        assert message.startswith(told), message


def exchanges(way: str) -> list[int]:
    """How many collectives a forward and a backward pass have more with one block more that is neither dual nor the last."""
    mesh, counts = mesh_of(RANKS), []
    names = ["all_to_all_single", "all_gather", "all_reduce"]
    for num_layers in (2, 3):
        config = replace(CONFIG, num_layers=num_layers)
        state, inputs = call_of(config)
        state = {name: each.requires_grad_() for name, each in state.items()}
        with mock.patch.multiple(dist, **{name: mock.Mock(wraps=getattr(dist, name)) for name in names}):
            out = WAYS[way](state, *inputs, config=config, mesh=mesh)
            forward = sum(getattr(dist, name).call_count for name in names)
            out.sum().backward()
            counts += [forward, sum(getattr(dist, name).call_count for name in names) - forward]
    return [counts[2] - counts[0], counts[3] - counts[1]]


@pytest.mark.parametrize(
    ("way", "both"),
    # a sum for joint attention and each feed-forward network; an exchange before and after attention
    [("tensor", [3, 3]), ("sequence", [2, 2])],
)
def test_a_block_has_few_exchanges(on_ranks, way, both):
    assert on_ranks(exchanges, way) == [both] * RANKS


def parts_alone() -> bool:
    """Whether a model of which a rank keeps only its parts gives the whole model's result, and the parts' gradients."""
    mesh, (state, inputs) = mesh_of(RANKS), call_of(CONFIG)
    group, rank = mesh.get_group(), mesh.get_local_rank()
    with torch.no_grad():
        parts = tensor_parallel.parts_of_state(state, partition_rules.MMDIT, group)
    expected = results_of(mmdit.mmdit, state, inputs, config=CONFIG)
    for name in state:
        cut = partition_rules.cut_of(name, partition_rules.MMDIT)
        expected[name] = partition_rules.part(expected[name], cut, rank=rank, ranks=RANKS)
    assert_agree(results_of(mmdit_tensor_parallel.mmdit_of_parts, parts, inputs, config=CONFIG, group=group), expected)
    return True


def test_a_rank_can_keep_its_parts_alone(on_ranks):
    assert on_ranks(parts_alone) == [True] * RANKS


def test_places_are_those_of_each_streams_own_tokens():
    # ranks have 2 of the image and 1 of the text each: i i t | i i t | i . t | . . .
    assert sequence_parallel.places_of_tokens((5, 3), 4) == [0, 1, 2, 3, 4, 5, 6, 8]
    assert sequence_parallel.places_of_tokens((4, 8), 4) == [*range(12)]
    assert sequence_parallel.places_of_tokens((1,), 4) == [0]


def only_own_tokens() -> list[bool]:
    """Whether what fills a stream up, here a NaN, changes nothing of what counts, and is answered with 0."""
    group, rank = mesh_of(RANKS).get_group(), mesh_of(RANKS).get_local_rank()
    whole = [sequence_parallel.filled_up(draw(2, length, 24, seed=length), RANKS) for length in (5, 3)]
    tokens = torch.cat([sequence_parallel.own_tokens(each, group) for each in whole], 1)
    places = sequence_parallel.places_of_tokens((5, 3), RANKS)
    counts = torch.tensor([rank * 3 + place in places for place in range(3)])
    tokens[:, ~counts] = torch.nan
    heads = tokens.unflatten(-1, (4, 6)).transpose(1, 2).repeat(3, 1, 1, 1, 1)
    attended = sequence_parallel.attention_over_ranks(heads, group, places)
    every = torch.cat([each[:, :length] for each, length in zip(whole, (5, 3), strict=True)], 1)
    expected = attention(*[every.unflatten(-1, (4, 6)).transpose(1, 2)] * 3)
    share = [place for place in (2 * rank, 2 * rank + 1) if place < 5] + ([5 + rank] if rank < 3 else [])
    assert_agree({"counted": attended[:, :, counts]}, {"counted": expected[:, :, share]})
    return (attended[:, :, ~counts] == 0).flatten().tolist()


def test_what_fills_a_stream_up_changes_nothing(on_ranks):
    assert [all(zeros) for zeros in on_ranks(only_own_tokens)] == [True] * RANKS
