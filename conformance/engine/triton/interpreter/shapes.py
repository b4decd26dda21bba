"""Operations that move elements and compute nothing: a block's axes stand behind that of the programs."""

from typing import Any

import numpy as np
from triton import language as tl

from gaugeblock.conformance.engine.triton.interpreter.handle import Handle


class Shapes:
    """The builder's operations on shapes."""

    def create_make_range(self, type_of_result: Any, start: int, stop: int) -> Handle:
        return Handle(np.arange(start, stop, dtype=np.int32)[None], tl.int32)

    def create_splat(self, type_of_result: Any, scalar: Handle) -> Handle:
        shape = tuple(int(size) for size in type_of_result.shape)
        return Handle(scalar.data.reshape(-1, *(1,) * len(shape)), scalar.dtype.scalar, shape)

    def create_unsplat(self, block: Handle) -> Handle:
        return Handle(block.scalars, block.dtype.scalar)

    def create_expand_dims(self, block: Handle, axis: int) -> Handle:
        shape = (*block.shape[:axis], 1, *block.shape[axis:])
        return Handle(np.expand_dims(block.data, axis + 1), block.dtype.scalar, shape)

    def create_broadcast(self, block: Handle, shape: Any) -> Handle:
        return Handle(block.data, block.dtype.scalar, tuple(int(size) for size in shape))

    def create_reshape(self, block: Handle, shape: Any, allow_reorder: bool) -> Handle:
        return Handle(block.full.reshape(-1, *(int(size) for size in shape)), block.dtype.scalar)

    def create_trans(self, block: Handle, order: Any) -> Handle:
        order = [int(axis) for axis in order]
        data = np.transpose(block.data, (0, *(axis + 1 for axis in order)))
        return Handle(data, block.dtype.scalar, tuple(block.shape[axis] for axis in order))

    def create_cat(self, left: Handle, right: Handle) -> Handle:
        return Handle(np.concatenate(_same_programs(left, right), axis=1), left.dtype.scalar)

    def create_join(self, left: Handle, right: Handle) -> Handle:
        return Handle(np.stack(_same_programs(left, right), axis=-1), left.dtype.scalar)

    def create_split(self, block: Handle) -> tuple[Handle, Handle]:
        first, second = np.moveaxis(block.full, -1, 0)
        return Handle(first, block.dtype.scalar), Handle(second, block.dtype.scalar)

    def create_gather(self, source: Handle, index: Handle, axis: int) -> Handle:
        data, where = _same_programs(source, index)
        return Handle(np.take_along_axis(data, where, axis=axis + 1), source.dtype.scalar)

    def create_histogram(self, block: Handle, bins: int, mask: Handle | None) -> Handle:
        """Counts of 0 to bins - 1; what is outside counts nowhere, as on a GPU."""
        values = block.full
        counted = (values >= 0) & (values < bins)
        if mask is not None:
            values, counted = np.broadcast_arrays(values, counted & mask.data)
        programs = values.shape[0]
        bin_of_programs = np.arange(programs)[:, None] * bins + values.reshape(programs, -1).astype(np.int64)
        counts = np.bincount(bin_of_programs[counted.reshape(programs, -1)], minlength=programs * bins)
        return Handle(counts.reshape(programs, bins).astype(np.int32), tl.int32)


def _same_programs(*blocks: Handle) -> list[np.ndarray]:
    count = max(block.data.shape[0] for block in blocks)
    return [block.for_programs(count) for block in blocks]
