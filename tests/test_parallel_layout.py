"""Layouts of a model over ranks: how many ranks they take, and which rank holds what."""

import pytest
import torch

from gaugeblock.optimized.parallel_layout import ParallelLayout, slice_of_gate_and_up


@pytest.mark.parametrize(
    ("sizes", "kind", "world_size"),
    [
        ({}, "base_model_only", 1),
        ({"tp_size": 4, "dp_size": 8}, "base_model_only", 32),
        ({"tp_size": 4, "dp_size": 8, "expert_tp_size": 4}, "base_model_only", 32),
        ({"ep_size": 8}, "pure_ep", 8),
        ({"tp_size": 4, "dp_size": 8, "ep_size": 4}, "ep_per_dp_shard", 32),
        ({"tp_size": 4, "ep_size": 4}, "ep_per_dp_shard", 4),
        ({"tp_size": 4, "dp_size": 8, "ep_size": 32}, "global_ep", 32),
        ({"dp_size": 8, "ep_size": 8}, "global_ep", 8),
        ({"tp_size": 4, "dp_size": 8, "ep_size": 2, "expert_tp_size": 4}, "ep_times_tp", 32),
    ],
)
def test_sizes_tell_the_kind_and_every_rank_is_once_in_each_way(sizes, kind, world_size):
    layout = ParallelLayout(**sizes)
    assert (layout.kind, layout.world_size) == (kind, world_size)
    product = 1
    for size in layout.axes.values():
        product *= size
    assert product == world_size and set(layout.expert_axes) <= set(layout.axes)
    for way in ("tp", "dp", "ep"):
        groups = layout.groups(way)
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))
        assert len({len(group) for group in groups}) == 1
    assert {len(group) for group in layout.groups("ep")} == {layout.ep_size}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tp_size": 4, "dp_size": 8, "ep_size": 16},
            "ep_size must be 1, tp_size or tp_size * dp_size, got tp_size=4",
        ),
        ({"tp_size": 4, "ep_size": 3}, "ep_size must be 1, tp_size or tp_size * dp_size, got tp_size=4, dp_size=1, ep_size=3"),
        ({"tp_size": 0}, "tp_size must be a positive integer, got 0"),
        ({"dp_size": 2.0}, "dp_size must be a positive integer, got 2.0"),
        ({"ep_size": True}, "ep_size must be a positive integer, got True"),
        ({"tp_size": 4, "expert_tp_size": 2}, "expert_tp_size must be 1 or tp_size, got tp_size=4"),
        ({"tp_size": 2, "dp_size": 3, "ep_size": 2, "expert_tp_size": 2}, "ep_size must divide dp_size where experts are in"),
    ],
)
def test_sizes_that_fit_to_no_layout_are_named(sizes, message):
    with pytest.raises(ValueError) as raised:
        ParallelLayout(**sizes)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(("ep_size", "ep_rank"), [(32, 9), (4, 1)])
def test_the_example_of_tp_4_dp_8_rank_9(ep_size, ep_rank):
    layout = ParallelLayout(tp_size=4, dp_size=8, ep_size=ep_size)
    assert layout.coordinates(9) == (2, 1, ep_rank)
    assert (8, 9, 10, 11) in layout.groups("tp") and tuple(range(1, 32, 4)) in layout.groups("dp")
    assert (layout.groups("ep") == layout.groups("tp")) == (ep_size == 4)
    with pytest.raises(ValueError, match=r"^rank must be in 0..31, got 32"):
        layout.coordinates(32)


def test_slices_of_experts_lie_over_both():
    layout = ParallelLayout(tp_size=2, dp_size=4, ep_size=2, expert_tp_size=2)
    assert layout.groups("ep") == ((0, 2), (1, 3), (4, 6), (5, 7)) and layout.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.experts_of(7, 8) == slice(4, 8) and layout.features_of(7, 6) == slice(3, 6)
    assert layout.axes == {"dp": 2, "ep": 2, "tp": 2} and layout.expert_axes == ("ep",)


def test_what_cannot_be_dealt_evenly_is_named():
    layout = ParallelLayout(tp_size=4, dp_size=3, ep_size=3, expert_tp_size=4)
    with pytest.raises(ValueError, match=r"^num_experts must be a multiple of ep_size \(3\), got 8"):
        layout.experts_of(0, 8)
    with pytest.raises(ValueError, match=r"^intermediate_size must be a multiple of expert_tp_size \(4\), got 10"):
        layout.features_of(0, 10)
    with pytest.raises(ValueError, match=r"^num_experts must be a multiple of tp_size \(4\), got 6"):
        ParallelLayout(tp_size=4).experts_of(0, 6)
    with pytest.raises(ValueError, match=r"^w13 must hold as many gate rows as up rows, got 7 rows"):
        slice_of_gate_and_up(torch.zeros(2, 7, 3), slice(0, 1))


def test_gate_and_up_rows_of_the_same_features_are_taken():
    w13 = torch.arange(8)[None, :, None].expand(2, 8, 3)
    assert slice_of_gate_and_up(w13, slice(1, 3))[1, :, 0].tolist() == [1, 2, 5, 6]
    assert slice_of_gate_and_up(w13, slice(1, 3), interleaved=True)[1, :, 2].tolist() == [2, 3, 4, 5]
    assert slice_of_gate_and_up(w13[:, :, 0], slice(3, 4)).tolist() == [[3, 7], [3, 7]]  # as biases are
