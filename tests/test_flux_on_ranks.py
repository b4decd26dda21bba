"""Flux over ranks: what the conformance suite does not ask of every implementation."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from on_four_ranks import RANKS, assert_equal_to_rounding, draw, four_ranks, mesh_of

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.distributed import flux_sequence_parallel, flux_tensor_parallel, tensor_parallel
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch import flux

on_ranks = pytest.fixture(scope="module")(four_ranks)
CONFIG = FluxConfig(
    in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=6,
    pooled_projection_dim=5, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
)  # fmt: skip
WAYS = {"tensor": flux_tensor_parallel.flux, "sequence": flux_sequence_parallel.flux}


def call_of(config: FluxConfig, image: int = 8, text: int = 4) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    shapes = flux.state_shapes(config)
    state = {name: draw(*shape, seed=seed) * max(shape) ** -0.5 for seed, (name, shape) in enumerate(shapes.items())}
    tokens = [draw(3, image, 4, seed=90), draw(3, text, 6, seed=91), draw(3, 5, seed=92)]
    times, guidance = torch.tensor([[0.0, 0.3, 1.0], [3.5, 1.0, 0.0]], dtype=torch.float64)
    return state, [*tokens, times, guidance, torch.arange(3.0 * image).view(image, 3), torch.zeros(text, 3)]


def raised_by(way: str, change: str) -> str:
    """Make a call that is bad, some of them on rank 2 alone, then a good one; return what the first raised."""
    mesh, config = mesh_of(RANKS), CONFIG
    state, arrays = call_of(config)
    is_mine = mesh.get_local_rank() == 2
    if change == "three heads":
        config = replace(CONFIG, num_attention_heads=3)
        state, arrays = call_of(config)
    elif change == "six tokens":
        arrays = call_of(config, 6)[1]
    elif change == "a text of five":
        arrays = call_of(config, text=5)[1]
    elif is_mine and change == "places of two axes":
        arrays = [*arrays[:5], arrays[5][:, :2], arrays[6]]
    elif is_mine and change == "a longer text":
        arrays = call_of(config, text=8)[1]
    message = "nothing raised"
    try:
        WAYS[way](state, *arrays, config=config, mesh=mesh)
    except ValueError as error:
        message = str(error)
    state, arrays = call_of(CONFIG)
    assert_equal_to_rounding(WAYS[way](state, *arrays, config=CONFIG, mesh=mesh), flux.flux(state, *arrays, config=CONFIG))
    return message


@pytest.mark.parametrize(
    ("way", "change", "told"),
    [
        *((way, "three heads", "num_attention_heads must be a multiple of the 4 ranks that share it, got 3") for way in WAYS),
        ("tensor", "six tokens", "nothing raised"),
        ("tensor", "a text of five", "nothing raised"),
        ("sequence", "six tokens", "num_image_tokens must be a multiple of the 4 ranks that share it, got 6"),
        ("sequence", "a text of five", "num_text_tokens must be a multiple of the 4 ranks that share it, got 5"),
        *((way, "places of two axes", "img_ids must be [num_tokens=8, axes=3], got (8, 2)") for way in WAYS),
        ("sequence", "a longer text", "hidden_states must have the same num_text_tokens on every rank, got [4, 4, 8, 4]"),
    ],
)
def test_a_bad_call_raises_on_every_rank_and_the_next_call_works(on_ranks, way, change, told):
    for rank, message in enumerate(on_ranks(raised_by, way, change)):
        assert message == (f"{told} (on rank 2)" if change == "places of two axes" and rank != 2 else told), message


def exchanges(way: str) -> list[list[int]]:
    """How many collectives forward and backward there are more with one block more, of two streams and of one."""
    mesh, names, counts = mesh_of(RANKS), ["all_to_all_single", "all_gather", "all_reduce"], []
    for layers, singles in ((1, 1), (2, 1), (1, 2)):
        config = replace(CONFIG, num_layers=layers, num_single_layers=singles)
        state, arrays = call_of(config)
        state = {name: each.requires_grad_() for name, each in state.items()}
        with mock.patch.multiple(dist, **{name: mock.Mock(wraps=getattr(dist, name)) for name in names}):
            out = WAYS[way](state, *arrays, config=config, mesh=mesh)
            forward = sum(getattr(dist, name).call_count for name in names)
            out.sum().backward()
            counts.append([forward, sum(getattr(dist, name).call_count for name in names) - forward])
    return [[more - fewer for more, fewer in zip(each, counts[0], strict=True)] for each in counts[1:]]


def test_a_block_has_as_few_exchanges_with_two_streams_as_with_one(on_ranks):
    assert on_ranks(exchanges, "tensor") == [[[2, 2], [1, 1]]] * RANKS
    assert on_ranks(exchanges, "sequence") == [[[2, 2], [2, 2]]] * RANKS


def parts_alone() -> bool:
    """Whether a model of which a rank keeps only its parts gives the whole model's result, and the parts' gradients."""
    mesh, (state, arrays) = mesh_of(RANKS), call_of(CONFIG)
    group, rank = mesh.get_group(), mesh.get_local_rank()
    with torch.no_grad():
        parts = tensor_parallel.parts_of_state(state, partition_rules.FLUX, group)
    parts = {name: each.clone().requires_grad_() for name, each in parts.items()}
    out = flux_tensor_parallel.flux_of_parts(parts, arrays, config=CONFIG, group=group)
    cotangent = draw(*out.shape, seed=93)
    state = {name: each.requires_grad_() for name, each in state.items()}
    expected = flux.flux(state, *arrays, config=CONFIG)
    assert_equal_to_rounding(out.detach(), expected.detach())
    gradients = torch.autograd.grad(out, [*parts.values()], cotangent)
    whole = torch.autograd.grad(expected, [*state.values()], cotangent)
    for name, actual, gradient in zip(state, gradients, whole, strict=True):
        if not name.endswith(("to_k.bias", "add_k_proj.bias")):  # 0 but for rotations and norms, of small terms
            cut = partition_rules.cut_of(name, partition_rules.FLUX)
            assert_equal_to_rounding(actual, partition_rules.part(gradient, cut, rank=rank, ranks=RANKS))
    return True


def test_a_rank_can_keep_its_parts_alone(on_ranks):
    assert on_ranks(parts_alone) == [True] * RANKS


def of_an_empty(what: str) -> list[tuple[int, ...]]:
    """Run both ways without examples, or without text."""
    state, arrays = call_of(CONFIG, text=0 if what == "text" else 4)
    if what == "batch":
        arrays = [*(each[:0] for each in arrays[:5]), *arrays[5:]]
    outs = [way(state, *arrays, config=CONFIG, mesh=mesh_of(RANKS)) for way in WAYS.values()]
    for out in outs:
        assert_equal_to_rounding(out, flux.flux(state, *arrays, config=CONFIG))
    return [tuple(out.shape) for out in outs]


@pytest.mark.parametrize(("what", "examples"), [("batch", 0), ("text", 3)])
def test_a_batch_or_a_text_may_be_empty(on_ranks, what, examples):
    assert on_ranks(of_an_empty, what) == [[(examples, 8, 4)] * 2] * RANKS
