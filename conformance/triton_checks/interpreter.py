"""Watches Triton kernels run: which were launched and, under the interpreter, what memory they touch.

Left alone, the interpreter (TRITON_INTERPRET=1) reads and writes any address of the process, so a kernel that
forgets a mask passes on garbage or kills pytest; it gives 0 for lanes masked without `other`, which a GPU
leaves undefined; and it runs programs in grid order, which hides dependence on that order. `watch` mends the
first two, `shuffled_programs` the third. Both wrap private functions of Triton, the same in 3.6 to 3.9, and
put the originals back. Like the interpreter itself they are not thread-safe.
"""

import importlib.util
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gaugeblock.conformance.triton_checks.patching import wrapped


class OutOfBoundsAccess(IndexError):
    """A lane that no mask disables reads or writes outside every tensor of its launch."""


class _Extent(NamedTuple):
    """The bytes [start, stop) that a tensor's sizes and strides span."""

    name: str
    start: int
    stop: int


@dataclass
class Watch:
    """What the kernels did inside `watch`.

    Attributes:
        launches: launches per kernel name; the evidence that a kernel really ran.
    """

    launches: Counter[str] = field(default_factory=Counter)
    _reachable: list[_Extent] = field(default_factory=list)
    _extents: list[_Extent] = field(default_factory=list)
    races: list[str] = field(default_factory=list)
    unbatched: list[str] = field(default_factory=list)
    _kernel: str = ""

    def _start_launch(self, run: Callable, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps `JITFunction.run` and `InterpretedFunction.run`."""
        if not kwargs["warmup"]:
            self._kernel = kernel.fn.__name__
            self.launches[self._kernel] += 1
        try:
            return run(kernel, *args, **kwargs)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OutOfBoundsAccess):
                cause = cause.__cause__  # the interpreter wraps errors, once per nested device function
            if cause is None:
                raise
            raise cause from None

    def _note_arguments(self, to_host: Callable, executor: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps `GridExecutor._init_args_hst`, which hands the kernel host copies of its arguments."""
        host_args, host_kwargs = to_host(executor, args, kwargs)
        named = [*zip(executor.arg_names, host_args, strict=False), *host_kwargs.items()]
        self._extents = [extent for item in named for extent in _extents(*item)] + self._reachable
        return host_args, host_kwargs

    def _load(
        self, load: Callable, builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any
    ) -> Any:
        self._check("load", builder, pointers, mask)
        if other is None and not np.all(mask.data):
            other = _poison(pointers)
        return load(builder, pointers, mask, other, *rest, **options)

    def _store(self, store: Callable, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self._check("store", builder, pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    def _atomic_rmw(
        self, rmw: Callable, builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        self._check("atomic", builder, pointers, mask)
        return rmw(builder, op, pointers, value, mask, *rest)

    def _atomic_cas(self, cas: Callable, builder: Any, pointers: Any, *rest: Any) -> Any:
        self._check("atomic", builder, pointers, None)
        return cas(builder, pointers, *rest)

    def _check(self, access: str, builder: Any, pointers: Any, mask: Any) -> None:
        """Raises OutOfBoundsAccess unless every enabled lane lies within one of the launch's extents."""
        itemsize = _itemsize(pointers)
        addresses = pointers.data
        if mask is not None and not (enabled := np.asarray(mask.data)).all():
            addresses = addresses[np.broadcast_to(enabled, addresses.shape)]
        if addresses.size == 0:
            return
        # Nearly every access stays within one tensor, so its lowest and highest address decide.
        start, stop = int(addresses.min()), int(addresses.max()) + itemsize
        if any(extent.start <= start and stop <= extent.stop for extent in self._extents):
            return
        outside = np.ones(addresses.shape, dtype=bool)
        for extent in self._extents:
            outside &= (addresses < extent.start) | (addresses > extent.stop - itemsize)
        if outside.any():
            distance, end = max(_distance(int(lane), itemsize, self._extents) for lane in addresses[outside])
            raise OutOfBoundsAccess(
                f"{access} in {self._kernel}, program {builder.grid_idx}: "
                f"{outside.sum()} of {addresses.size} lanes outside every tensor of the launch, "
                f"as far as {distance} bytes {end}"
            )


@contextmanager
def watch(reachable: Iterable[Any] = (), *, poison: bool = False, order: int | None = None) -> Iterator[Watch]:
    """Counts kernel launches and, under the interpreter, guards and poisons what the kernels load and store.

    An enabled lane of a load, store or atomic may touch only the bytes that the sizes and strides of the
    launch's tensor arguments span (not their whole storage, so that views inside guarded buffers are guarded
    too). Lanes masked without `other` load NaN, or for integers, by turns, a large, a negative and a zero
    value: no single integer shows in a maximum, in an index and in a count of expert 0. Nests; does nothing
    without Triton. Launches replayed from a CUDA graph are not seen.

    Args:
        reachable: tensors that every launch may touch besides its arguments, for kernels that reach them
            through addresses, such as a table of pointers.

    Yields:
        The `Watch`, whose `launches` stay readable afterwards.

    Raises:
        OutOfBoundsAccess: out of the launch, naming the kernel, the program, the access and the distance.
    """
    seen = Watch(_reachable=[extent for tensor in reachable for extent in _extents("an input", tensor)])
    if importlib.util.find_spec("triton") is None:
        yield seen
        return

    from triton.runtime import interpreter, jit

    builder = type(interpreter.interpreter_builder)
    with ExitStack() as patches:
        for owner, name, wrapper in (
            (jit.JITFunction, "run", seen._start_launch),
            (interpreter.InterpretedFunction, "run", seen._start_launch),
            (interpreter.GridExecutor, "_init_args_hst", seen._note_arguments),
            (builder, "create_masked_load", seen._load),
            (builder, "create_masked_store", seen._store),
            (builder, "create_atomic_rmw", seen._atomic_rmw),
            (builder, "create_atomic_cas", seen._atomic_cas),
        ):
            patches.enter_context(wrapped(owner, name, wrapper))
        if order is not None:
            patches.enter_context(shuffled_programs(order))
        if hasattr(interpreter, "_LangPatchScope"):  # not in Triton 3.6
            patches.enter_context(wrapped(interpreter, "_patch_lang", _patch_language_once))
        yield seen


def _patch_language_once(original: Callable, function: Any) -> Any:
    """Saves the interpreter a third of its time: it prepares the language anew in each call of a device function."""
    from triton import language
    from triton.runtime import interpreter

    languages = [each for each in function.__globals__.values() if each is language or each is language.core]
    is_prepared = not any(language.core.is_builtin(each.load) for each in languages)
    return interpreter._LangPatchScope() if is_prepared else original(function)


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Runs the programs of each interpreted launch once each, in an order drawn from the seed.

    A kernel whose programs are independent, as the GPU demands, gives the same bits in any order.
    """
    from triton.runtime import interpreter

    generator = random.Random(seed)
    order: list[int] = []

    def set_grid_dim(original: Callable, builder: Any, *dims: int) -> None:
        original(builder, *dims)
        order[:] = generator.sample(range(int(np.prod(dims))), k=int(np.prod(dims)))

    def set_grid_idx(original: Callable, builder: Any, *index: int) -> None:
        turn = np.ravel_multi_index(index, builder.grid_dim)
        original(builder, *map(int, np.unravel_index(order[turn], builder.grid_dim)))

    builder = type(interpreter.interpreter_builder)
    with wrapped(builder, "set_grid_dim", set_grid_dim), wrapped(builder, "set_grid_idx", set_grid_idx):
        yield


def _extents(name: str, argument: Any) -> Iterator[_Extent]:
    """The extents of the tensors in one argument: a tensor, a tuple of them, a descriptor, or neither."""
    if isinstance(argument, tuple):
        for item in argument:
            yield from _extents(name, item)
    while hasattr(argument, "base"):  # TensorDescriptor, and TensorWrapper of a reinterpreted dtype
        argument = argument.base
    if hasattr(argument, "data_ptr") and argument.numel():
        start = argument.data_ptr()
        strides = zip(argument.shape, argument.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in strides)
        yield _Extent(name, start, start + elements * argument.element_size())


def _distance(address: int, itemsize: int, extents: list[_Extent]) -> tuple[int, str]:
    """How many bytes an access reaches out of the nearest extent, and over which end of which argument."""
    return min(
        (extent.start - address, f"before the start of {extent.name}")
        if address < extent.start
        else (address + itemsize - extent.stop, f"past the end of {extent.name}")
        for extent in extents or [_Extent("address 0 (the launch has no tensor)", 0, 0)]
    )


def _itemsize(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)  # int1 takes a byte


# Floating formats that the interpreter keeps as integers. fp8e4b15 has no NaN; 0x7F is its largest value.
_NAN_BITS = {
    "bf16": 0x7FC0,
    "fp8e4nv": 0x7F,
    "fp8e5": 0x7F,
    "fp8e4b15": 0x7F,
    "fp8e4b8": 0x80,
    "fp8e5b16": 0x80,
}


def _poison(pointers: Any) -> Any:
    """What masked lanes load in place of the interpreter's 0: a value that shows wherever it is used."""
    from triton.runtime import interpreter

    element_type = pointers.get_element_ty()
    shape, dtype = pointers.data.shape, interpreter._get_np_dtype(element_type)
    if dtype.kind == "f":
        values = np.full(shape, np.nan, dtype)
    elif element_type.is_floating():
        values = np.full(shape, _NAN_BITS[element_type.name], dtype)
    elif dtype.kind == "b":
        values = np.full(shape, True)
    else:
        large = np.iinfo(dtype).max // 3  # no power of two: a stride would shift that out of the address
        values = np.resize(np.array([large, -large, 0]).astype(dtype), shape)
    return interpreter.TensorHandle(values, element_type)
