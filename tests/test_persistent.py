"""Persistent grids and descriptors of the Triton experts: who computes which tile, and that bits do not depend on it."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from gaugeblock.conformance.engine.inputs.cases import Case, make_inputs
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.engine.triton.interpreter import watch
from gaugeblock.optimized.triton import expert_passes, expert_products, grouped_matmul, launch
from gaugeblock.optimized.triton.experts import fused_swiglu_fast
from gaugeblock.optimized.triton.persistent import Grid, choose_grid, descriptor_of, tile_of

DEVICE = "cpu" if launch.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels run as the gate runs them."""
    with watch():
        yield


@triton.jit
def tiles_kernel(blocks_ptr, column_blocks_ptr, num_blocks, num_column_blocks):
    index = tl.program_id(0)
    block, column_block = tile_of(index, num_blocks, num_column_blocks)
    tl.store(blocks_ptr + index, block)
    tl.store(column_blocks_ptr + index, column_block)


@pytest.mark.parametrize(("num_blocks", "num_column_blocks"), [(1, 1), (1, 5), (5, 1), (8, 3), (19, 3), (16, 2)])
def test_every_tile_is_computed_once_and_eight_blocks_of_rows_meet_the_same_columns(num_blocks, num_column_blocks):
    tiles = torch.full((2, num_blocks * num_column_blocks), -1, device=DEVICE)
    tiles_kernel[(tiles.shape[1],)](*tiles, num_blocks, num_column_blocks)
    in_groups = [
        (block, column)
        for first in range(0, num_blocks, 8)
        for column in range(num_column_blocks)
        for block in range(first, min(first + 8, num_blocks))
    ]
    assert list(zip(*tiles.tolist(), strict=True)) == in_groups


def test_only_many_tiles_for_each_multiprocessor_make_a_persistent_grid():
    assert choose_grid((11, 6, 4), 132) == Grid((11, 6, 4), persistent=False)
    assert choose_grid((53, 5, 1), 132) == Grid((132,), persistent=True)
    assert choose_grid((1000, 1000, 1), None) == Grid((1000, 1000, 1), persistent=False)
    assert choose_grid((1000, 1000, 2), 132, splits=2) == Grid((1000, 1000, 2), persistent=False)


def test_few_rows_keep_a_program_for_each_tile():
    left, matrices = (torch.ones(size, dtype=torch.bfloat16, device=DEVICE) for size in ((4, 16), (2, 32, 16)))
    few = grouped_matmul.choose_tiles(left, matrices, rows_per_expert=2, multiprocessors=1)
    many = grouped_matmul.choose_tiles(left, matrices, rows_per_expert=200, multiprocessors=1)
    assert (few.multiprocessors, many.multiprocessors) == (None, 1)


@pytest.mark.parametrize(
    ("strides", "offset", "readable"),
    [
        ((2048, 64, 1), 0, True),
        ((4096, 128, 1), 8, True),
        ((2048, 1, 32), 0, False),  # the last axis is not contiguous
        ((32 * 65, 65, 1), 0, False),  # rows do not begin at multiples of 16 bytes,
        ((2048, 64, 1), 4, False),  # nor does the first
        ((64, 128, 1), 0, False),  # experts within a row's stride
        ((0, 64, 1), 0, False),
    ],
)
def test_weights_are_described_where_the_chip_can_read_them(strides, offset, readable):
    weights = torch.zeros(10000, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 32, 64), strides, offset)
    descriptor = descriptor_of(weights, (1, 16, 16), rows=128)
    assert (descriptor is not None) == readable
    if descriptor is not None:
        assert (descriptor.shape, descriptor.strides, descriptor.block_shape) == ([2, 32, 64], [*strides], [1, 16, 16])


def test_weights_are_described_where_it_pays():
    weights = torch.zeros(2, 32, 64, dtype=torch.bfloat16, device=DEVICE)
    assert descriptor_of(weights, (1, 16, 16), rows=64) is None
    assert descriptor_of(weights.float(), (1, 16, 16), rows=128) is None
    assert descriptor_of(weights[:, :0], (1, 16, 16), rows=128) is None


def largest_landmark(dtype: str) -> list[torch.Tensor]:
    contract = find_contract("experts.fused_swiglu")
    sizes = max(contract.landmarks, key=lambda landmark: landmark["num_tokens"])
    return [each.to(DEVICE) for each in make_inputs(contract, Case(**sizes, regime="dithered"), dtype).values()]


def out_and_gradients(*tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    out = fused_swiglu_fast(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves[:4])]


@pytest.mark.parametrize(
    (
        "dtype",
        "grids",
    ),  # of the two products forward, of those of tokens and weights backward; float32 splits sums of its small tiles
    [("float32", [True, False, False, True, True]), ("bfloat16", [True, True, True, True, False])],
)
def test_bits_depend_neither_on_the_grid_nor_on_descriptors(dtype, grids, monkeypatch):
    tensors = largest_landmark(dtype)
    persistent, described = [], []

    def noted_grid(*arguments, **options):
        grid = choose_grid(*arguments, **options)
        persistent.append(grid.persistent)
        return grid

    def noted_descriptor(*arguments):
        descriptor = descriptor_of(*arguments)
        described.append(descriptor is not None)
        return descriptor

    for module in (grouped_matmul, expert_products):
        monkeypatch.setattr(module, "choose_grid", noted_grid)
        monkeypatch.setattr(module, "descriptor_of", noted_descriptor)
    got = out_and_gradients(*tensors)
    assert persistent == grids
    assert described == ([True] * 3 if dtype == "bfloat16" else [False])

    for module in (grouped_matmul, expert_products):
        monkeypatch.setattr(module, "descriptor_of", lambda *_: None)
    by_pointers = out_and_gradients(*tensors)
    monkeypatch.setattr(expert_passes, "multiprocessors_of", lambda _: 1000)
    persistent.clear()
    a_program_each = out_and_gradients(*tensors)
    assert persistent == [False] * 5
    for one, other, third in zip(got, by_pointers, a_program_each, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
