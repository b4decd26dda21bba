"""The ways to spread experts over ranks: whatever the way, the operation and the layout, results are the reference's."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from on_four_ranks import (
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_EXPERTS,
    RANKS,
    TOKENS,
    TOP_K,
    assert_equal_to_rounding,
    draw,
    four_ranks,
    mesh_of,
    out_and_gradients,
)

from gaugeblock.conformance.engine.processes.traffic import counted_traffic
from gaugeblock.optimized.distributed import (
    collectives,
    experts,
    experts_gathered_tokens,
    experts_in_layout,
    experts_replicated_tokens,
    experts_tensor_parallel,
)
from gaugeblock.optimized.parallel_layout import ParallelLayout, slice_of_gate_and_up
from gaugeblock.reference.torch import experts as reference

on_ranks = pytest.fixture(scope="module")(four_ranks)


class Operation(NamedTuple):
    """The weights of an operation, and its options."""

    weights: dict[str, tuple[int, ...]]
    options: dict[str, Any]


DOWN = {"w2": (HIDDEN_SIZE, INTERMEDIATE_SIZE)}
GATED = {"w13": (2 * INTERMEDIATE_SIZE, HIDDEN_SIZE)}
BIASES = {"b2": (HIDDEN_SIZE,)}
OPERATIONS = {
    "fused_swiglu": Operation(GATED | DOWN, {}),
    "fused_geglu": Operation(GATED | DOWN, {"approximate": "tanh"}),
    "fused_gelu_mlp": Operation(
        {"w1": (INTERMEDIATE_SIZE, HIDDEN_SIZE), "b1": (INTERMEDIATE_SIZE,)} | DOWN | BIASES, {"approximate": "none"}
    ),
    "fused_swiglu_oai": Operation(GATED | {"b13": (2 * INTERMEDIATE_SIZE,)} | DOWN | BIASES, {"alpha": 1.702, "limit": 0.5}),
}
WAYS = {
    "exchanged": experts,
    "gathered": experts_gathered_tokens,
    "replicated": experts_replicated_tokens,
    "sliced": experts_tensor_parallel,
}
WITH_ALL_TOKENS = ("replicated", "sliced")


def arguments(operation: str, num_tokens: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return floats by name, in the order of the call, and ids that leave an expert empty."""
    shapes = {"hidden_states": (num_tokens, HIDDEN_SIZE)}
    shapes |= {name: (NUM_EXPERTS, *shape) for name, shape in OPERATIONS[operation].weights.items()}
    shapes |= {"topk_weights": (num_tokens, TOP_K)}
    floats = {name: draw(*shape, seed=10 * seed + place) for place, (name, shape) in enumerate(shapes.items())}
    return floats, torch.randint(1, NUM_EXPERTS, (num_tokens, TOP_K), generator=torch.Generator().manual_seed(seed))


def slice_of(operation: str, name: str, weights: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What tensor parallelism gives a rank."""
    features = slice(rank * INTERMEDIATE_SIZE // ranks, (rank + 1) * INTERMEDIATE_SIZE // ranks)
    if name in ("w13", "b13"):
        return slice_of_gate_and_up(weights, features, interleaved=operation == "fused_swiglu_oai")
    return {"w1": weights[:, features], "b1": weights[:, features], "w2": weights[..., features]}.get(name, weights)


def check_way(way: str, operation: str, ranks: int) -> None:
    mesh, sizes, rank = mesh_of(ranks), TOKENS[ranks], dist.get_rank() % ranks
    floats, ids = arguments(operation, sum(sizes))
    cotangent, options = draw(sum(sizes), HIDDEN_SIZE, seed=5), OPERATIONS[operation].options
    whole = getattr(reference, operation)
    expected = out_and_gradients(lambda *each: whole(*each, ids, **options), [*floats.values()], cotangent)

    def mine(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in ("hidden_states", "topk_weights", "topk_ids", "out"):
            return tensor if way in WITH_ALL_TOKENS else tensor.split(sizes)[rank]
        return slice_of(operation, name, tensor, rank, ranks) if way == "sliced" else tensor.chunk(ranks)[rank]

    function = getattr(WAYS[way], operation)
    shard = [mine(name, each) for name, each in floats.items()]
    actual = out_and_gradients(
        lambda *each: function(*each, mine("topk_ids", ids), **options, mesh=mesh), shard, mine("out", cotangent)
    )
    for name, one_actual, one_expected in zip(["out", *floats], actual, expected, strict=True):
        assert_equal_to_rounding(one_actual, mine(name, one_expected))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_experts_on_ranks_are_those_on_one(on_ranks, way, operation):
    for ranks in TOKENS:  # two times two, and four
        assert on_ranks(check_way, way, operation, ranks) == [None] * RANKS


def bits_of(way: str, **options: Any) -> list[torch.Tensor]:
    """Return the output and gradients of this rank, in bfloat16, of tokens that all ranks have or a part of them."""
    (floats, ids), mesh, rank = arguments("fused_swiglu", 7), mesh_of(RANKS), dist.get_rank()
    hidden_states, w13, w2, topk_weights = (each.bfloat16() for each in floats.values())
    if way == "sliced":
        w13, w2 = (slice_of("fused_swiglu", name, each, rank, RANKS) for name, each in (("w13", w13), ("w2", w2)))
    else:
        w13, w2 = (each.chunk(RANKS)[rank] for each in (w13, w2))
    if way not in WITH_ALL_TOKENS:
        hidden_states, topk_weights, ids = (each.tensor_split(RANKS)[rank] for each in (hidden_states, topk_weights, ids))
    cotangent = draw(*hidden_states.shape, seed=6).bfloat16()
    floats = [hidden_states, w13, w2, topk_weights]
    return out_and_gradients(lambda *each: WAYS[way].fused_swiglu(*each, ids, mesh=mesh, **options), floats, cotangent)


def same_bits_in_parts() -> list[bool]:
    expected = bits_of("exchanged")
    found = [bits_of("exchanged", parts=parts) for parts in (2, 3, 100)]  # of two experts each
    return [torch.equal(one, other) for each in found for one, other in zip(each, expected, strict=True)]


def test_the_number_of_parts_changes_no_bits(on_ranks):
    assert on_ranks(same_bits_in_parts) == [[True] * 15] * RANKS


def overlap() -> list[str]:
    """Return what a rank does, in order, in three parts: begins an exchange, waits for one, multiplies."""
    from gaugeblock.optimized.distributed import expert_exchange
    from gaugeblock.optimized.distributed.expert_calls import ExpertCall

    done, begin, outputs = [], expert_exchange.begin_exchange, ExpertCall.outputs

    def begun(*arguments: Any) -> Callable[[], torch.Tensor]:
        done.append("begin")
        wait = begin(*arguments)
        return lambda: (done.append("wait"), wait())[1]

    def multiplied(*arguments: Any, **options: Any) -> torch.Tensor:
        done.append("multiply")
        return outputs(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_exchange, "begin_exchange", begun)
        patch.setattr(ExpertCall, "outputs", multiplied)
        bits_of("exchanged", parts=2)
    return done


def test_a_part_is_multiplied_while_others_travel(on_ranks):
    forward = ["begin", "begin", "wait", "multiply", "begin", "wait", "multiply", "begin", "wait", "wait"]
    weights_and_rows = ["begin"] * 4
    backward = [*weights_and_rows, "wait", "wait", "begin", "wait", "wait", "begin", "wait", "wait"]
    assert on_ranks(overlap) == [[*forward, *backward]] * RANKS


def backward_twice() -> str:
    (floats, ids), mesh, rank = arguments("fused_swiglu", 3), mesh_of(RANKS), dist.get_rank()
    hidden_states, w13, w2, topk_weights = floats.values()
    leaves = [hidden_states, *(each.chunk(RANKS)[rank] for each in (w13, w2)), topk_weights]
    leaves = [each.clone().requires_grad_() for each in leaves]
    out = experts.fused_swiglu(*leaves, ids, mesh=mesh)
    first = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    again = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(*each) for each in zip(first, again, strict=True))
    try:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    except RuntimeError as error:
        return str(error)
    return "nothing raised"


def test_gradients_can_be_asked_for_again_if_the_graph_is_retained(on_ranks):
    assert all("backward through the graph a second time" in each for each in on_ranks(backward_twice))


def collectives_of(way: str) -> list[list[str]]:
    """Return which collectives a rank enters forward, and backward; some have no tokens."""
    entered: list[list[str]] = [[], []]

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            entered[direction].append(name)
            return function(*arguments, **options)

        return call

    (floats, ids), mesh, rank = arguments("fused_swiglu", 3), mesh_of(RANKS), dist.get_rank()
    hidden_states, w13, w2, topk_weights = floats.values()
    if way == "sliced":
        w13, w2 = (slice_of("fused_swiglu", name, each, rank, RANKS) for name, each in (("w13", w13), ("w2", w2)))
    else:
        w13, w2 = (each.chunk(RANKS)[rank] for each in (w13, w2))
    if way not in WITH_ALL_TOKENS:
        hidden_states, topk_weights, ids = (each.tensor_split(RANKS)[rank] for each in (hidden_states, topk_weights, ids))
    leaves = [each.clone().requires_grad_() for each in (hidden_states, w13, w2, topk_weights)]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_to_all_single", "all_gather", "all_reduce"):
            patch.setattr(dist, name, counted(name))
        direction = 0
        out = WAYS[way].fused_swiglu(*leaves, ids, mesh=mesh)
        direction = 1
        out.sum().backward()
    return entered


def traffic_of_known_calls() -> tuple[int, int]:
    rank, rows = dist.get_rank(), torch.zeros(RANKS + 1, 2)
    with counted_traffic() as traffic:
        dist.all_reduce(rows)  # 40 bytes, 3/4 of them twice
        dist.all_to_all_single(torch.zeros(RANKS, 2), rows[:RANKS])  # 8 bytes to each of three
        splits = [1 + (other == rank) for other in range(RANKS)]
        dist.all_to_all_single(torch.zeros(RANKS + 1, 2), rows, splits, splits)  # as many; 16 bytes stay
        dist.all_gather([torch.zeros(2) for _ in range(RANKS)], rows[0])  # 8 bytes to each of three
    return traffic.collectives, traffic.sent_bytes


def test_what_ranks_send_each_other_is_counted(on_ranks):
    assert on_ranks(traffic_of_known_calls) == [(4, 60 + 24 + 24 + 24)] * RANKS


def sums_in_one_exchange_and_in_two() -> list[list[int]]:
    """Return how many collectives each takes; their bits are the same, and those of the sum in the order of the ranks."""
    counts = []
    for ranks in (2, 4):
        mesh = mesh_of(ranks)
        for shape in ((1,), (7,), (3, 5), (8, 2, 3), (0, 4)):
            of_ranks = [1000**rank * draw(*shape, seed=rank, dtype=torch.float32) for rank in range(ranks)]
            expected, entered = sum(of_ranks[1:], of_ranks[0]), []
            for most in (collectives.MOST_GATHERED_BYTES, 0):
                with pytest.MonkeyPatch.context() as patch, counted_traffic() as traffic:
                    patch.setattr(collectives, "MOST_GATHERED_BYTES", most)
                    found = collectives.sum_over_ranks(of_ranks[mesh.get_local_rank()], mesh.get_group())
                assert torch.equal(found, expected), (ranks, shape, most)
                entered.append(traffic.collectives)
            counts.append(entered)
    return counts


def test_a_sum_over_ranks_has_the_same_bits_in_one_exchange_and_in_two(on_ranks):
    assert on_ranks(sums_in_one_exchange_and_in_two) == [2 * [*[[1, 2]] * 4, [0, 0]]] * RANKS


REDUCE = ["all_gather"]  # of few bytes


@pytest.mark.parametrize(
    ("way", "forward", "backward"),
    [
        # ranks agree; ids, tokens and weights are gathered; sums go to their ranks
        (
            "gathered",
            ["all_to_all_single", *["all_gather"] * 3, "all_to_all_single"],
            ["all_gather", "all_to_all_single"],
        ),
        ("replicated", ["all_to_all_single", *REDUCE], REDUCE),
        ("sliced", ["all_to_all_single", *REDUCE], REDUCE),
    ],
)
def test_every_rank_enters_the_same_collectives_and_gradients_travel_together(on_ranks, way, forward, backward):
    assert on_ranks(collectives_of, way) == [[forward, backward]] * RANKS


def call_badly(way: str, change: str) -> str:
    """Make a call that is bad on rank 2 alone, then a good one; return what the first raised."""
    (floats, topk_ids), mesh, rank = arguments("fused_swiglu", 2), mesh_of(RANKS), dist.get_rank()
    good = floats | {"topk_ids": topk_ids}
    for name in ("w13", "w2"):
        whole = good[name]
        good[name] = slice_of("fused_swiglu", name, whole, rank, RANKS) if way == "sliced" else whole.chunk(RANKS)[rank]
    changes = {
        "an id out of range": {"topk_ids": topk_ids + NUM_EXPERTS},
        "no tensor": {"hidden_states": None},
        "fewer tokens": {name: good[name][1:] for name in ("hidden_states", "topk_weights", "topk_ids")},
        "fewer features": {"w13": slice_of_gate_and_up(good["w13"], slice(1, None)), "w2": good["w2"][..., 1:]},
        "fewer choices": {name: good[name][:, 1:] for name in ("topk_weights", "topk_ids")},
        "another dtype": {"topk_weights": good["topk_weights"].float()},
        "a gradient": {"topk_weights": good["topk_weights"].clone().requires_grad_()},
    }
    try:
        WAYS[way].fused_swiglu(**(good | changes[change] if rank == 2 else good), mesh=mesh)
    except (TypeError, ValueError) as error:
        WAYS[way].fused_swiglu(**good, mesh=mesh)
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("an id out of range", "topk_ids must be in 0..7, got"),
        ("no tensor", "hidden_states must be an array, got NoneType"),
        ("fewer tokens", "hidden_states must have the same num_tokens on every rank, got [2, 2, 1, 2]"),
        ("fewer features", "w13 must have the same number of rows on every rank, got"),
        ("fewer choices", "topk_ids must have the same top_k on every rank, got [3, 3, 2, 3]"),
        ("another dtype", "topk_weights must have the same dtype on every rank, got"),
        ("a gradient", "topk_weights must require a gradient alike on every rank, got [0, 0, 1, 0]"),
    ],
)
def test_a_bad_call_on_one_rank_raises_on_all_and_the_next_call_works(on_ranks, way, change, message):
    if change == "fewer tokens" and way not in WITH_ALL_TOKENS:
        message = "nothing raised"  # ranks may have any number
    raised = on_ranks(call_badly, way, change)
    assert [each[: len(message)] for each in raised] == [message] * RANKS


# the sizes of tests/test_parallel_layout.py's table, on four ranks
LAYOUTS = [
    ParallelLayout(tp_size=4),
    ParallelLayout(tp_size=2, dp_size=2, expert_tp_size=2),
    ParallelLayout(ep_size=4),
    ParallelLayout(tp_size=2, dp_size=2, ep_size=2),
    ParallelLayout(tp_size=2, dp_size=2, ep_size=4),
    ParallelLayout(dp_size=4, ep_size=4),
    ParallelLayout(tp_size=2, dp_size=2, ep_size=2, expert_tp_size=2),
]


def check_layout(layout: ParallelLayout) -> None:
    """Every data-parallel shard has other tokens, and not as many."""
    rank, meshes = dist.get_rank(), experts_in_layout.meshes_of(layout, "cpu")
    sizes = [5, 0, 1, 3][: layout.dp_size]
    floats, ids = arguments("fused_swiglu", sum(sizes))
    cotangent = draw(sum(sizes), HIDDEN_SIZE, seed=5)
    expected = out_and_gradients(lambda *each: reference.fused_swiglu(*each, ids), [*floats.values()], cotangent)
    held, features = layout.experts_of(rank, NUM_EXPERTS), layout.features_of(rank, INTERMEDIATE_SIZE)

    def mine(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "w13":
            return slice_of_gate_and_up(tensor[held], features)
        return tensor[held][..., features] if name == "w2" else tensor.split(sizes)[layout.coordinates(rank).dp_rank]

    def function(*each: torch.Tensor) -> torch.Tensor:
        return experts_in_layout.fused_swiglu(*each, mine("topk_ids", ids), layout=layout, meshes=meshes)

    actual = out_and_gradients(function, [mine(name, each) for name, each in floats.items()], mine("out", cotangent))
    for name, one_actual, one_expected in zip(["out", *floats], actual, expected, strict=True):
        if name in ("w13", "w2") and layout.kind in ("base_model_only", "ep_per_dp_shard"):
            dist.all_reduce(one_actual, group=meshes["dp"].get_group())  # each shard holds all experts
        assert_equal_to_rounding(one_actual, mine(name, one_expected))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind}-{layout.ep_size}x{layout.expert_tp_size}")
def test_experts_in_any_layout_are_those_on_one_rank_though_shards_have_other_tokens(on_ranks, layout):
    assert on_ranks(check_layout, layout) == [None] * RANKS


@pytest.mark.long
def test_layouts_under_torchrun():
    script = Path(__file__).parent / "experts_under_torchrun.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), str(script)]
    done = subprocess.run(torchrun, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and done.stdout.strip() == f"{len(LAYOUTS)} layouts on {RANKS} ranks", done.stderr


def call_a_layout_badly(layout: ParallelLayout) -> str:
    rank, meshes = dist.get_rank(), experts_in_layout.meshes_of(layout, "cpu")
    (floats, ids), held = arguments("fused_swiglu", 2), layout.experts_of(rank, NUM_EXPERTS)
    w13 = slice_of_gate_and_up(floats["w13"][held], layout.features_of(rank, INTERMEDIATE_SIZE))
    w2 = floats["w2"][held][..., layout.features_of(rank, INTERMEDIATE_SIZE)]
    good = floats | {"w13": w13, "w2": w2, "topk_ids": ids}
    try:
        experts_in_layout.fused_swiglu(**good | ({"topk_ids": None} if rank == 2 else {}), layout=layout, meshes=meshes)
    except (TypeError, ValueError) as error:
        experts_in_layout.fused_swiglu(**good, layout=layout, meshes=meshes)
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize("layout", LAYOUTS[-3:], ids=lambda layout: layout.kind)
def test_a_bad_call_raises_on_all_ranks_of_a_layout(on_ranks, layout):
    assert all(message.startswith("topk_ids must be an array") for message in on_ranks(call_a_layout_badly, layout))


def build_for_eight() -> str:
    with pytest.raises(ValueError) as raised:
        experts_in_layout.meshes_of(ParallelLayout(tp_size=2, dp_size=4), "cpu")
    return str(raised.value)


def test_a_layout_for_more_ranks_than_there_are_is_refused(on_ranks):
    expected = "layout takes world_size 8, got 4: ParallelLayout(tp_size=2"
    assert all(message.startswith(expected) for message in on_ranks(build_for_eight))
