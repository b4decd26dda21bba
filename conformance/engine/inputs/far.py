"""Tensors whose elements lie further apart than 32 bits can say, in memory that is reserved and never touched."""

import mmap

import torch

FAR = 2**31  # elements: the first offset that int32 does not hold
ALIGNED = 64  # elements, of rows
MAP_NORESERVE = 0x4000  # of Linux, which Python names from 3.13 on: address space alone, no promise of memory


def far_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the last row (along the first dimension that has several) at least 2^31 elements behind the first.

    With more than two rows the stride itself fits into 32 bits, and only its product with the row does not: that is where
    kernels go wrong, since a stride beyond 32 bits is passed as a wider number. Whatever an offset of 32 bits reaches by mistake
    is memory of this view too, and holds 0. Only the pages of the values take memory; the rest is address space: 2^32 elements.

    It depends on the values alone: another process is sent these, and calls this function. `is_far` knows such a tensor.

    Args:
        tensor: On the CPU.
    """
    several = [dimension for dimension, size in enumerate(tensor.shape) if size > 1]
    if not tensor.numel() or not several:
        return tensor.clone(memory_format=torch.contiguous_format)
    first = several[0]
    rows, row = tensor.shape[first], tensor[(0,) * first + (0,)].numel()
    stride = max(row, -(-FAR // (rows - 1))) // ALIGNED * ALIGNED + ALIGNED
    strides = [*tensor.shape]
    for dimension in reversed(range(tensor.ndim)):
        inner = 1 if dimension == tensor.ndim - 1 else strides[dimension + 1] * tensor.shape[dimension + 1]
        strides[dimension] = stride if dimension == first else inner
    elements = FAR + stride * rows
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    reserved = mmap.mmap(-1, elements * tensor.element_size(), flags=flags)
    segment = torch.frombuffer(reserved, dtype=tensor.dtype)
    return segment.as_strided(tensor.shape, strides, FAR).copy_(tensor)


def is_far(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a far view: its storage is a segment that nobody could afford to copy."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= 2 * FAR * tensor.element_size()
