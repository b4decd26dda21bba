"""Tensors whose elements lie further apart than 32 bits can say, in memory that is reserved and never touched."""

import mmap

import torch

FAR = 2**31  # elements: the first offset that int32 does not hold
ALIGNED = 64  # elements, of rows
MOST_SCATTERED = 2**13  # elements that get a page each: 32 MB
MAP_NORESERVE = 0x4000  # of Linux, which Python names from 3.13 on: address space alone, no promise of memory


def far_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the last row (along the first dimension that has several) at least 2^31 elements behind the first, and so
    the last column, unless there are too many elements to give each a page of its own.

    With more than two rows the stride itself fits into 32 bits, and only its product with the row does not: that is where
    kernels go wrong, since a stride beyond 32 bits is passed as a wider number. Whatever offsets of 32 bits reach by mistake
    is memory of this view too, and holds 0. Only the pages of the values take memory; the rest is address space.

    It depends on the values alone: another process is sent these, and calls this function. `is_far` knows such a tensor.

    Args:
        tensor: On the CPU.
    """
    several = [dimension for dimension, size in enumerate(tensor.shape) if size > 1]
    if not tensor.numel() or not several:
        return tensor.clone(memory_format=torch.contiguous_format)
    strides = _strides(tensor.shape, several[0], several[-1] if tensor.numel() <= MOST_SCATTERED else several[0])
    reach = sum(stride * (size - 1) for stride, size in zip(strides, tensor.shape, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    reserved = mmap.mmap(-1, (2 * FAR + reach) * tensor.element_size(), flags=flags)
    segment = torch.frombuffer(reserved, dtype=tensor.dtype)
    return segment.as_strided(tensor.shape, strides, 2 * FAR).copy_(tensor)


def _strides(shape: torch.Size, first: int, last: int) -> list[int]:
    """Strides that put no two elements in one place: all but the far dimensions lie close, in blocks of a power of two.

    Rows begin at multiples of as many blocks as there are columns, and a column one block further.
    """
    strides, close = [1] * len(shape), 1
    for dimension in reversed(range(len(shape))):
        if dimension not in (first, last):
            strides[dimension], close = close, close * shape[dimension]
    block = max(ALIGNED, 1 << (close - 1).bit_length())
    blocks = block << (shape[last] - 1).bit_length() if last != first else block
    strides[first] = -(-FAR // (shape[first] - 1) // blocks) * blocks
    if last != first:
        strides[last] = -(-FAR // (shape[last] - 1) // blocks) * blocks + block
    return strides


def is_far(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a far view: its storage is a segment that nobody could afford to copy."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= 2 * FAR * tensor.element_size()
