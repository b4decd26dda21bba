"""Loads, stores and atomics of all programs at once, and descriptors of tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter as stock

from gaugeblock.conformance.engine.triton.interpreter.functions import Operation
from gaugeblock.conformance.engine.triton.interpreter.handle import (
    Handle,
    common_shape,
    narrow_format,
    packed,
    stored_dtype,
    unpacked,
)
from gaugeblock.conformance.engine.triton.interpreter.memory import Memory, OutOfBoundsAccess, Write

_ENABLED = Handle(np.ones(1, bool), tl.int1)


class Descriptor:
    """A tensor in memory, of which blocks are loaded and stored by their offsets."""

    def __init__(
        self, base: Handle, shape: list[Handle], strides: list[Handle], block_shape: list[int], signed: bool, padding: Any
    ) -> None:
        self.base, self.shape, self.strides, self.padding = base, shape, strides, padding
        self.block_shape = tuple(int(size) for size in block_shape)
        self.round_f32_to_tf32 = False  # set from outside, by Triton 3.9
        self.itemsize = stored_dtype(base.get_element_ty()).itemsize
        assert (base.data % 16 == 0).all(), "base must be 16-byte aligned"
        assert all((stride.data * self.itemsize % 16 == 0).all() for stride in strides[:-1]), "stride must be 16-byte aligned"
        assert (strides[-1].data == 1).all(), "last dim must be contiguous"

    def pointers(self, offsets: list[Handle]) -> tuple[Handle, Handle]:
        """The pointers of a block, and a mask of those inside the tensor."""
        rank = len(self.block_shape)
        assert (offsets[-1].data * self.itemsize % 16 == 0).all(), "block offset start must be 16-byte aligned"

        def of_programs(scalar: Handle) -> np.ndarray:
            return scalar.data.reshape(-1, *(1,) * rank).astype(np.int64)

        addresses, inside = self.base.data.reshape(-1, *(1,) * rank), np.ones((1,) * (rank + 1), bool)
        for axis, size in enumerate(self.block_shape):
            index = of_programs(offsets[axis]) + np.arange(size).reshape(-1, *(1,) * (rank - axis - 1))
            addresses = addresses + (index * of_programs(self.strides[axis]) * self.itemsize).view(np.uint64)
            inside = inside & (index >= 0) & (index < of_programs(self.shape[axis]))
        return Handle(addresses, self.base.dtype.scalar, self.block_shape), Handle(inside, tl.int1, self.block_shape)


class Accesses:
    """The builder's operations on memory. The builder has `programs`, `memory`, `poison`, `writes` and `rewrites`."""

    programs: np.ndarray  # the programs of this batch, by their numbers in the grid
    memory: Memory
    poison: bool
    writes: list[Write]  # of this batch
    has_atomics: bool  # in this launch
    ir_rmw_op_to_interpreter_rmw_op: dict[Any, Any]
    ir_sem_to_interpreter_sem: dict[Any, Any]

    def create_load(self, pointers: Handle, *_: Any) -> Handle:
        return self.create_masked_load(pointers, _ENABLED, None)

    def create_masked_load(self, pointers: Handle, mask: Handle, other: Handle | None, *_: Any, **__: Any) -> Handle:
        element = pointers.get_element_ty()
        dtype, addresses, enabled = stored_dtype(element), pointers.data, mask.data
        count = np.count_nonzero(enabled)
        if count == enabled.size:
            return unpacked(self._read(addresses, dtype), element, pointers.shape)
        if other is None:
            rest = poison(element, pointers.shape) if self.poison else np.zeros(1, dtype)
        else:
            rest = packed(Handle(other.data, element))
        if count:
            harmless = _first_enabled(addresses, enabled)
            try:
                loaded = self._read(np.where(enabled, addresses, harmless), dtype)
            except OutOfBoundsAccess:  # said again, of the enabled lanes alone
                shape = np.broadcast_shapes(addresses.shape, enabled.shape)
                lanes, enabled_addresses = self._lanes(addresses, enabled, shape)
                self.memory.locate("load", enabled_addresses, dtype, self._programs_of(lanes, shape))
                raise
            loaded = np.where(enabled, loaded, rest)
        else:
            loaded = np.broadcast_to(rest, np.broadcast_shapes(rest.shape, (1,) * addresses.ndim))
        return unpacked(loaded, element, pointers.shape)

    def create_store(self, pointers: Handle, value: Handle, *_: Any) -> None:
        self.create_masked_store(pointers, value, _ENABLED)

    def create_masked_store(self, pointers: Handle, value: Handle, mask: Handle, *_: Any, **__: Any) -> None:
        data = packed(value)
        # each program writes, though what it writes be the same for all
        shape = (len(self.programs), *common_shape(pointers, value))
        write, lanes = self._overwrite("store", pointers.data, mask.data, shape, data.dtype)
        if write is None:
            return
        values = np.ascontiguousarray(np.broadcast_to(data, shape)).reshape(-1)
        values = values if lanes.size == values.size else values[lanes]
        for place in write.places:
            place.write(values if place.lanes is None else values[place.lanes])

    def create_atomic_load(self, pointers: Handle, mask: Handle, *_: Any) -> Handle:
        self.has_atomics = True
        return self.create_masked_load(pointers, mask, None)

    def create_atomic_store(self, pointers: Handle, value: Handle, mask: Handle, *_: Any) -> None:
        self.has_atomics = True
        self.create_masked_store(pointers, value, mask)

    def create_atomic_rmw(self, op: Any, pointers: Handle, value: Handle, mask: Handle, sem: Any, scope: Any) -> Handle:
        """Programs take their turns in the order of the batch, and lanes in theirs."""
        narrow = narrow_format(value.dtype)
        addresses, enabled = self._of_each_program(pointers), self._of_each_program(mask)
        self._start_atomic(addresses, enabled, stored_dtype(value.dtype))
        if narrow is None:
            op, sem = self.ir_rmw_op_to_interpreter_rmw_op[op], self.ir_sem_to_interpreter_sem[sem]
            data = self._of_each_program(value)
            return Handle(stock._interpreter.atomic_rmw(op, addresses, data, enabled, sem), value.dtype.scalar)
        combine: dict[Any, Operation] = {stock._ir.ATOMIC_OP.FADD: np.add, stock._ir.ATOMIC_OP.XCHG: lambda old, new: new}

        def update(old: np.ndarray, lanes: np.ndarray) -> np.ndarray:
            return narrow.pack(narrow.rounded(combine[op](narrow.unpack(old), values[lanes])))

        values = self._of_each_program(value).reshape(-1)
        return unpacked(self._in_turns(addresses, enabled, narrow.stored, update), value.dtype)

    def create_atomic_cas(self, pointers: Handle, expected: Handle, value: Handle, sem: Any, scope: Any) -> Handle:
        addresses = self._of_each_program(pointers)
        enabled = np.ones(addresses.shape, bool)
        bits = [self._of_each_program(Handle(packed(each), each.dtype, each.shape)).reshape(-1) for each in (expected, value)]
        self._start_atomic(addresses, enabled, bits[0].dtype)

        def update(old: np.ndarray, lanes: np.ndarray) -> np.ndarray:
            return np.where(old == bits[0][lanes], bits[1][lanes], old)

        return unpacked(self._in_turns(addresses, enabled, bits[0].dtype, update), expected.dtype)

    def create_make_tensor_descriptor(self, *arguments: Any) -> Descriptor:
        return Descriptor(*arguments)

    def create_descriptor_load(self, descriptor: Descriptor, offsets: list[Handle], *_: Any) -> Handle:
        pointers, mask = descriptor.pointers(offsets)
        element = pointers.get_element_ty()
        outside = np.nan if descriptor.padding == stock._ir.PADDING_OPTION.PAD_NAN else 0
        other = Handle(np.full((1,) * (len(pointers.shape) + 1), outside).astype(np.float32), element)
        if narrow_format(element) is None:
            other.data = other.data.astype(stored_dtype(element))
        loaded = self.create_masked_load(pointers, mask, other)
        if descriptor.round_f32_to_tf32 and element == tl.float32:
            loaded.data = stock._round_f32_to_tf32(loaded.data)
        return loaded

    def create_descriptor_store(self, descriptor: Descriptor, value: Handle, offsets: list[Handle]) -> None:
        pointers, mask = descriptor.pointers(offsets)
        self.create_masked_store(pointers, value, mask)

    def _read(self, addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
        programs = self.programs[: addresses.shape[0]].reshape(-1, *(1,) * (addresses.ndim - 1))
        return self.memory.read("load", addresses, dtype, programs)

    def _programs_of(self, lanes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return self.programs[lanes // (int(np.prod(shape)) // shape[0])]

    def _lanes(self, addresses: np.ndarray, enabled: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The enabled lanes, by their numbers, and their addresses."""
        flat = np.ascontiguousarray(np.broadcast_to(addresses, shape)).reshape(-1)
        if enabled.all():
            return np.arange(flat.size), flat
        lanes = np.flatnonzero(np.broadcast_to(enabled, shape))
        return lanes, flat[lanes]

    def _overwrite(
        self, access: str, addresses: np.ndarray, enabled: np.ndarray, shape: tuple[int, ...], dtype: np.dtype
    ) -> tuple[Write | None, np.ndarray]:
        """Notes what is overwritten, and by whom. Returns that and the enabled lanes; None if there are none."""
        lanes, addresses = self._lanes(addresses, enabled, shape)
        if not lanes.size:
            return None, lanes
        programs = self._programs_of(lanes, shape)
        places = self.memory.locate(access, addresses, dtype, programs)
        write = Write(places, [place.read(dtype) for place in places], addresses, programs, dtype.itemsize)
        self.writes.append(write)
        return write, lanes

    def _of_each_program(self, handle: Handle) -> np.ndarray:
        """The data of each program: an atomic happens as often as there are programs, though its operands agree."""
        return np.ascontiguousarray(handle.for_programs(len(self.programs)))

    def _start_atomic(self, addresses: np.ndarray, enabled: np.ndarray, dtype: np.dtype) -> None:
        self.has_atomics = True
        self._overwrite("atomic", addresses, enabled, addresses.shape, dtype)

    def _in_turns(
        self,
        addresses: np.ndarray,
        enabled: np.ndarray,
        dtype: np.dtype,
        update: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Lets lanes at one address update it one after another; returns what each found."""
        lanes = np.flatnonzero(enabled)
        found = np.zeros(addresses.size, dtype)
        if lanes.size:
            addresses_of_lanes = addresses.reshape(-1)[lanes]
            place = self.memory.locate("atomic", addresses_of_lanes, dtype, self.programs[:1])[0]
            if place.lanes is not None:
                raise NotImplementedError("an atomic whose lanes are in several tensors")
            order = np.argsort(addresses_of_lanes, kind="stable")
            in_order = addresses_of_lanes[order]
            is_first = np.concatenate([[True], in_order[1:] != in_order[:-1]])
            start = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
            turns = np.arange(len(order)) - start
            for turn in range(int(turns.max()) + 1):
                now = order[turns == turn]
                index = place.at[now]
                found[lanes[now]] = place.memory[index]
                place.memory[index] = update(place.memory[index], lanes[now])
        return found.reshape(addresses.shape)


def _first_enabled(addresses: np.ndarray, enabled: np.ndarray) -> np.uint64:
    first = int(enabled.argmax())
    if addresses.shape == enabled.shape:
        return addresses.flat[first]
    indices = np.unravel_index(first, enabled.shape)  # in addresses too, but where they have an axis of 1
    return addresses[tuple([min(index, size - 1) for index, size in zip(indices, addresses.shape, strict=True)])]


def poison(element: Any, shape: tuple[int, ...]) -> np.ndarray:
    """What masked lanes load in place of 0: NaN, or by turns a large, a negative and a zero integer, as it is in memory.

    No single integer shows in a maximum, in an index and in a count of expert 0; fp8e4b15 has no NaN but a largest value.
    """
    dtype, narrow = stored_dtype(element), narrow_format(element)
    if narrow is not None:
        return narrow.pack(np.full(1, np.nan, np.float32))
    if dtype.kind == "f":
        return np.full(1, np.nan, dtype)
    if dtype.kind == "b":
        return np.full(1, True)
    large = np.iinfo(dtype).max // 3  # no power of two: a stride would shift that out of the address
    return np.resize(np.array([large, -large, 0]).astype(dtype), (1, *shape))
