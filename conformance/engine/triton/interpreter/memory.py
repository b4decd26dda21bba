"""The memory that a launch may touch: where an address lies, what was written by whom, and how it is undone."""

import ctypes
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np


class OutOfBoundsAccess(IndexError):
    """A lane that no mask disables reads or writes outside every tensor of its launch."""


class Extent:
    """The bytes [start, stop) that a tensor's sizes and strides span, as arrays."""

    def __init__(self, name: str, start: int, stop: int, itemsize: int, strides: tuple[int, ...] = ()) -> None:
        self.name, self.start, self.stop, self.itemsize, self.strides = name, start, stop, itemsize, strides
        self._views: dict[int, np.ndarray] = {}

    def view(self, dtype: np.dtype) -> np.ndarray:
        """As many elements of a dtype as there is room for."""
        view = self._views.get(dtype.num)
        if view is None:
            count = (self.stop - self.start) // dtype.itemsize
            memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.start)
            view = self._views[dtype.num] = np.frombuffer(memory, dtype)  # type: ignore[call-overload]
        return view

    def element(self, address: int) -> str:
        """Which element of the tensor lies at an address, as `name[i, j]`."""
        rest = (address - self.start) // self.itemsize
        index = [0] * len(self.strides)
        for axis in sorted(range(len(self.strides)), key=lambda axis: -self.strides[axis]):
            if self.strides[axis]:
                index[axis], rest = divmod(rest, self.strides[axis])
        return f"{self.name}[{', '.join(map(str, index))}]"


def extents_of(name: str, argument: Any) -> Iterator[Extent]:
    """The extents of the tensors in one argument: a tensor, a tuple of them, a descriptor, or neither."""
    if isinstance(argument, int | float):
        return
    if isinstance(argument, tuple):
        for item in argument:
            yield from extents_of(name, item)
    while hasattr(argument, "base"):  # TensorDescriptor, and TensorWrapper of a reinterpreted dtype
        argument = argument.base
    if hasattr(argument, "data_ptr") and argument.numel():
        start, itemsize = argument.data_ptr(), argument.element_size()
        elements = 1 + sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
        yield Extent(name, start, start + elements * itemsize, itemsize, tuple(argument.stride()))


class Place(NamedTuple):
    """Where in one extent some lanes lie.

    Attributes:
        extent: The extent.
        memory: The extent as an array.
        at: Of each lane, an index into memory; of elements that lie askew in it, [lanes, itemsize] indices of bytes.
        lanes: Their positions among all lanes asked for; None for all.
    """

    extent: Extent
    memory: np.ndarray
    at: np.ndarray
    lanes: np.ndarray | None = None

    def read(self, dtype: np.dtype) -> np.ndarray:
        """What memory holds there."""
        if self.memory.dtype == dtype:
            return self.memory.take(self.at)
        return self.memory[self.at].view(dtype)[..., 0]

    def write(self, values: np.ndarray) -> None:
        """Writes one after another: of lanes at one address the last counts."""
        askew = self.memory.dtype != values.dtype
        self.memory[self.at] = np.ascontiguousarray(values)[..., None].view(np.uint8) if askew else values


class Write(NamedTuple):
    """A store or an atomic of one batch of programs, as it is undone and searched for races.

    Attributes:
        places: Where.
        before: What was there.
        addresses, programs: Of each lane; none for an atomic, which may share its address.
        itemsize: Of an element.
    """

    places: list[Place]
    before: list[np.ndarray]
    addresses: np.ndarray
    programs: np.ndarray
    itemsize: int

    def undo(self) -> None:
        """Puts back what was overwritten."""
        for place, values in zip(self.places, self.before, strict=True):
            place.write(values)


class Memory:
    """What one launch may touch.

    Args:
        kernel: The kernel's name.
        grid: Its programs along three axes.
        extents: Of its arguments, and of what else it may reach.
    """

    def __init__(self, kernel: str, grid: tuple[int, ...], extents: Iterable[Extent]) -> None:
        self.kernel, self.grid, self.extents = kernel, grid, list(extents)

    def locate(self, access: str, addresses: np.ndarray, dtype: np.dtype, programs: np.ndarray) -> list[Place]:
        """Where the lanes of an access lie.

        Args:
            access: What the kernel does, for the error.
            addresses: Of the enabled lanes, any shape.
            dtype: Of an element.
            programs: The program of each lane, of a shape that `addresses` has or is broadcast from; for the error.

        Raises:
            OutOfBoundsAccess: if a lane lies in none of the extents.
        """
        # Nearly every access stays within one tensor, so its lowest and highest address decide.
        low, high = int(np.minimum.reduce(addresses, axis=None)), int(np.maximum.reduce(addresses, axis=None))
        for extent in self.extents:
            if extent.start <= low and high + dtype.itemsize <= extent.stop:
                return [_place(extent, addresses, dtype)]
        owners = np.full(addresses.shape, -1)
        for number, extent in enumerate(self.extents):
            owners[(addresses >= extent.start) & (addresses <= extent.stop - dtype.itemsize)] = number
        if (owners < 0).any():
            self._raise_outside(access, addresses, dtype.itemsize, np.broadcast_to(programs, addresses.shape), owners < 0)
        flat = addresses.reshape(-1)
        some = [(self.extents[number], np.flatnonzero(owners == number)) for number in np.unique(owners)]
        return [_place(extent, flat[lanes], dtype)._replace(lanes=lanes) for extent, lanes in some]

    def read(self, access: str, addresses: np.ndarray, dtype: np.dtype, programs: np.ndarray) -> np.ndarray:
        """What memory holds at the addresses, of their shape; the arguments of `locate`."""
        places = self.locate(access, addresses, dtype, programs)
        if places[0].lanes is None:
            return places[0].read(dtype)
        values = np.empty(addresses.size, dtype)
        for place in places:
            values[place.lanes] = place.read(dtype)
        return values.reshape(addresses.shape)

    def name(self, program: int) -> str:
        """A program's indices."""
        return str(tuple(int(index) for index in np.unravel_index(program, self.grid)))

    def _raise_outside(
        self, access: str, addresses: np.ndarray, itemsize: int, programs: np.ndarray, outside: np.ndarray
    ) -> None:
        first = programs[outside].min()
        addresses, outside = addresses[programs == first], outside[programs == first]
        distance, end = max(_distance(int(address), itemsize, self.extents) for address in addresses[outside])
        raise OutOfBoundsAccess(
            f"{access} in {self.kernel}, program {self.name(first)}: {outside.sum()} of {addresses.size} lanes outside every "
            f"tensor of the launch, as far as {distance} bytes {end}"
        )

    def races(self, writes: Iterable[Write]) -> list[str]:
        """A sentence for each tensor that has an element that two programs write."""
        if math.prod(self.grid) < 2:
            return []
        found: dict[str, str] = {}
        writers: dict[tuple[int, int], np.ndarray] = {}  # by start of a span and size of an element: the last that wrote each
        spans = _spans(self.extents)
        for write in writes:
            for place in write.places:
                start, stop = next(each for each in spans if each[0] <= place.extent.start < each[1])
                key = start, write.itemsize
                if key not in writers:
                    writers[key] = np.full((stop - start) // write.itemsize + 1, -1, np.int64)
                addresses = write.addresses if place.lanes is None else write.addresses[place.lanes]
                programs = write.programs if place.lanes is None else write.programs[place.lanes]
                index = (addresses - np.uint64(start)) // np.uint64(write.itemsize)
                before = writers[key][index]
                writers[key][index] = programs
                others = np.where((before >= 0) & (before != programs), before, writers[key][index])
                if place.extent.name not in found and (others != programs).any():
                    lane = int(np.argmax(others != programs))
                    both = " and ".join(self.name(program) for program in sorted((others[lane], programs[lane])))
                    element = place.extent.element(int(addresses[lane]))
                    found[place.extent.name] = f"{self.kernel}: programs {both} both write {element}"
        return list(found.values())


def _place(extent: Extent, addresses: np.ndarray, dtype: np.dtype) -> Place:
    offsets = (addresses - np.uint64(extent.start)).view(np.int64)
    if dtype.itemsize == 1:
        return Place(extent, extent.view(dtype), offsets)
    if not int(np.bitwise_or.reduce(offsets, axis=None)) % dtype.itemsize:
        return Place(extent, extent.view(dtype), offsets >> (dtype.itemsize.bit_length() - 1))
    return Place(extent, extent.view(np.dtype(np.uint8)), offsets[..., None] + np.arange(dtype.itemsize))


def _spans(extents: list[Extent]) -> list[tuple[int, int]]:
    """The extents without overlaps: two views of one tensor are one span."""
    spans: list[tuple[int, int]] = []
    for extent in sorted(extents, key=lambda each: each.start):
        if spans and extent.start < spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], extent.stop)
        else:
            spans.append((extent.start, extent.stop))
    return spans


def _distance(address: int, itemsize: int, extents: list[Extent]) -> tuple[int, str]:
    """How many bytes an access reaches out of the nearest extent, and over which end of which argument."""
    return min(
        (extent.start - address, f"before the start of {extent.name}")
        if address < extent.start
        else (address + itemsize - extent.stop, f"past the end of {extent.name}")
        for extent in extents or [Extent("address 0 (the launch has no tensor)", 0, 0, 1)]
    )
