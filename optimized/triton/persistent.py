"""Persistent grids and tensor descriptors: what large products gain where their programs may depend on the batch and the chip.

A persistent grid has a program for each multiprocessor, which computes one tile after another: nothing waits for the last
program of a wave, and neighbouring tiles, which read the same weights, are computed at the same time. A descriptor has the
chip's copy engine (TMA) bring whole tiles of weights, so that no register holds an address. Bits depend on neither: a tile is
computed in one way whichever program does it.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gaugeblock.optimized.triton.launch import has_tensor_descriptors

# With no more tiles for each there are two waves of programs at most, and a persistent grid has little to save.
TILES_PER_MULTIPROCESSOR = 2

# Of 16-bit operands only full tiles have so many rows. With fewer, experts have few tokens, and weights are read but once.
ROWS_FOR_DESCRIPTORS = 128


class Grid(NamedTuple):
    """The programs of a launch."""

    shape: tuple[int, ...]
    persistent: bool
    """Whether each computes tiles by stride; else one tile, of which the shape's axes are the axes."""


def choose_grid(num_tiles: tuple[int, int, int], multiprocessors: int | None, *, splits: int = 1) -> Grid:
    """Choose a persistent grid where there are many tiles.

    Args:
        num_tiles: Along each axis.
        multiprocessors: Of the chip; None if the grid must not depend on it.
        splits: Parts of each sum; there are several where tiles are few, so that each keeps a program of its own.
    """
    if multiprocessors is None:
        return Grid(num_tiles, persistent=False)
    if splits > 1 or math.prod(num_tiles) <= TILES_PER_MULTIPROCESSOR * multiprocessors:
        return Grid(num_tiles, persistent=False)
    return Grid((multiprocessors,), persistent=True)


@triton.jit
def tile_of(index, num_blocks, num_column_blocks, GROUP: tl.constexpr = 8):
    """Return the block of rows and the block of columns of a tile.

    A group of blocks of rows meets a block of columns while its weights are in the L2 cache, then the next one; of eight, as in
    Triton's tutorial of persistent products.
    """
    tiles = GROUP * num_column_blocks
    first = index // tiles * GROUP
    group = tl.minimum(num_blocks - first, GROUP)
    in_group = index % tiles
    return first + in_group % group, in_group // group


def descriptor_of(weights: torch.Tensor, block_shape: tuple[int, ...], rows: int) -> TensorDescriptor | None:
    """Describe weights where that pays and the chip can read by it; None if they are to be read by pointers.

    Args:
        weights: At most five axes.
        block_shape: What is read at a time.
        rows: Of a tile of the result.
    """
    pays = rows >= ROWS_FOR_DESCRIPTORS and weights.dtype.itemsize == 2
    if not (pays and has_tensor_descriptors() and _is_describable(weights)):
        return None
    return TensorDescriptor(weights, list(weights.shape), list(weights.stride()), list(block_shape))


def _is_describable(tensor: torch.Tensor) -> bool:
    """Whether the last axis is contiguous, rows lie at multiples of 16 bytes, and each stride is a multiple of the next.

    That is what CUDA's tensor maps need, and Triton's descriptors check in part, or a little more.
    """
    strides = tensor.stride()
    return (
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and strides[-1] == 1
        and all(stride > 0 and stride * tensor.itemsize % 16 == 0 for stride in strides[:-1])
        and all(outer % inner == 0 for outer, inner in pairwise(strides))
    )
