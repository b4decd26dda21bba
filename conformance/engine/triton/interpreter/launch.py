"""One launch: its programs run in batches, and each batch in lockstep; programs that part start anew, in groups that agree.

What a batch wrote before its programs parted is undone, so that a kernel that works in place and one that counts with atomics are
exact as well. A group may part again; the number of runs is that of the ways through the kernel, not of the programs.
"""

import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from gaugeblock.conformance.engine.triton.interpreter.builder import Builder
from gaugeblock.conformance.engine.triton.interpreter.control_flow import Diverged, Unbatched, WaitsForever
from gaugeblock.conformance.engine.triton.interpreter.handle import Handle, stored_dtype
from gaugeblock.conformance.engine.triton.interpreter.language import rewritten, speaking_to
from gaugeblock.conformance.engine.triton.interpreter.memory import Extent, Memory, OutOfBoundsAccess, Write, extents_of
from gaugeblock.conformance.engine.triton.patching import wrapped

MOST_PROGRAMS = 256  # of a batch: more save no time, and take memory
SHUFFLED_BATCHES = 4


@dataclass
class Launch:
    """A call of a kernel."""

    function: Any
    """Triton's `InterpretedFunction`."""
    arguments: tuple
    keywords: dict[str, Any]
    """As the caller gave them."""
    grid: Any
    """A tuple, or a function of the arguments."""
    reachable: list[Extent]
    """What it may touch besides its arguments."""
    poison: bool = False
    """Lanes masked without `other` load NaN or odd integers in place of 0."""
    order: random.Random | None = None
    """Draws the order of the programs; None for the grid's, in batches as large as can be."""

    def run(self) -> list[str]:
        """Runs all programs. Returns the races, a sentence for each.

        Raises:
            OutOfBoundsAccess: a program touches what belongs to no tensor.
            WaitsForever: a loop does not end.
            InterpreterError: anything else that the kernel raises.
            Unbatched: it cannot be run in lockstep; nothing is changed.
        """
        kernel = rewritten(self.function)
        names, executor = _parameters(kernel), _executor(kernel)
        keywords = {name: value for name, value in self.keywords.items() if name in names.args or name in names.kwonlyargs}
        host_arguments, host_keywords = executor._init_args_hst(self.arguments, keywords)
        for hook in self.function.pre_run_hooks:
            hook(*host_arguments, **host_keywords)
        bound = _bound(kernel, host_arguments, host_keywords)
        grid = tuple(int(size) for size in (self.grid(bound) if callable(self.grid) else self.grid))
        grid += (1,) * (3 - len(grid))
        extents = [extent for name, value in bound.items() for extent in extents_of(name, value)]
        memory = Memory(self.function.fn.__name__, grid, extents + self.reachable)
        builder = Builder(memory, grid, self.poison)
        with speaking_to(builder), np.errstate(all="ignore"):
            tensors = {name: value if name in executor.constexprs else as_tensor(value) for name, value in bound.items()}
            try:
                writes = _run_batches(kernel, tensors, builder, self._batches(math.prod(grid)))
            except (OutOfBoundsAccess, WaitsForever):
                raise
            except Exception as error:
                raise InterpreterError(repr(error)) from error
        if not all(map(_is_on_host, (*self.arguments, *keywords.values()))):
            executor._restore_args_dev(self.arguments, host_arguments, keywords, host_keywords)
        return [] if builder.has_atomics else memory.races(writes)

    def _batches(self, count: int) -> list[np.ndarray]:
        if self.order is None:
            return [np.arange(first, min(first + MOST_PROGRAMS, count)) for first in range(0, count, MOST_PROGRAMS)]
        numbers = list(range(count))
        while count > 1 and numbers == sorted(numbers):  # of two programs every other order is the grid's
            self.order.shuffle(numbers)
        parts = max(min(count, SHUFFLED_BATCHES), math.ceil(count / MOST_PROGRAMS))
        return [each for each in np.array_split(np.array(numbers, np.int64), parts) if each.size] if count else []

    def run_one_by_one(self, run: Callable[[], Any]) -> None:
        """Runs the kernel under Triton's own interpreter, guarded."""
        try:
            with _guarded(self.function.fn.__name__, self.reachable):
                run()
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OutOfBoundsAccess):
                cause = cause.__cause__  # Triton wraps errors, once per nested device function
            if cause is None:
                raise
            raise cause from None


@cache
def _parameters(kernel: Callable) -> inspect.FullArgSpec:
    return inspect.getfullargspec(kernel)


@cache
def _executor(kernel: Callable) -> Any:
    """Triton's, for what it knows of arguments; it runs nothing."""
    return stock.GridExecutor(kernel, [*_parameters(kernel).args, *_parameters(kernel).kwonlyargs], None)


def _bound(kernel: Callable, arguments: list, keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, in the order of `inspect.getcallargs`, which is asked for the error when they do not fit."""
    names = _parameters(kernel)
    bound = dict(zip(names.args, arguments, strict=False)) | keywords
    defaults = dict(zip(reversed(names.args), reversed(names.defaults or ()), strict=False))
    for name in (*names.args, *names.kwonlyargs):
        if name not in bound:
            if name in defaults:
                bound[name] = defaults[name]
            elif names.kwonlydefaults and name in names.kwonlydefaults:
                bound[name] = names.kwonlydefaults[name]
    fits = len(bound) == len(names.args) + len(names.kwonlyargs) and not (names.varargs or names.varkw)
    once = len(arguments) <= len(names.args) and not any(name in keywords for name in names.args[: len(arguments)])
    return bound if fits and once else inspect.getcallargs(kernel, *arguments, **keywords)


def _is_on_host(argument: Any) -> bool:
    """There is no copy of it that kernels worked on."""
    if isinstance(argument, tuple | TensorDescriptor):
        return False
    return bool(getattr(argument, "is_cpu", not hasattr(argument, "data_ptr")))


def _run_batches(kernel: Callable, arguments: dict[str, Any], builder: Builder, batches: list[np.ndarray]) -> list[Write]:
    done: list[Write] = []
    while batches:
        builder.start_batch(batches.pop(0))
        try:
            kernel(**arguments)
        except Diverged as divergence:
            _undo(builder.writes)
            batches = divergence.groups + batches
        except Unbatched:
            _undo(done + builder.writes)
            raise
        else:
            done += builder.writes
    return done


def _undo(writes: list[Write]) -> None:
    for write in reversed(writes):
        write.undo()


@cache
def _type_of(mangled: str) -> Any:
    return tl.str_to_ty(mangled, None)


def _scalar(value: float, mangled: str) -> Any:
    dtype = _type_of(mangled)
    return tl.tensor(Handle(np.array([value], stored_dtype(dtype)), dtype), dtype)


@lru_cache(4096, typed=True)
def _integer(value: int) -> Any:
    return _scalar(value, mangle_type(value))


def as_tensor(argument: Any) -> Any:
    """An argument as a kernel sees it: a pointer, a scalar or a descriptor of Triton's; other things are constants."""
    if isinstance(argument, bool):
        return tl.tensor(Handle(np.array([argument]), tl.int1), tl.int1)
    if isinstance(argument, int):
        return _integer(argument)
    if isinstance(argument, float):  # a float32, as on a chip; in Triton's own interpreter it stays Python's
        return _scalar(argument, mangle_type(argument))
    if hasattr(argument, "data_ptr"):
        return _scalar(argument.data_ptr(), mangle_type(argument))
    if isinstance(argument, tuple):
        values = [as_tensor(each) for each in argument]
        return type(argument)(*values) if hasattr(argument, "_fields") else type(argument)(values)
    if isinstance(argument, TensorDescriptor):
        descriptor = stock.interpreter_semantic.make_tensor_descriptor(
            base=as_tensor(argument.base),
            shape=[as_tensor(size) for size in argument.shape],
            strides=[*(as_tensor(stride) for stride in argument.strides[:-1]), tl.constexpr(argument.strides[-1])],
            block_shape=[tl.constexpr(size) for size in argument.block_shape],
            padding_option=argument.padding,
        )
        descriptor.handle.round_f32_to_tf32 = getattr(argument, "round_f32_to_tf32", False)
        return descriptor
    return argument


@contextmanager
def _guarded(kernel: str, reachable: list[Extent]) -> Iterator[None]:
    """Has Triton's own interpreter raise where an access is out of bounds, and not end the process."""
    memory = Memory(kernel, (1, 1, 1), reachable)

    def note_arguments(to_host: Callable, executor: Any, args: tuple, kwargs: dict) -> Any:
        host_args, host_kwargs = to_host(executor, args, kwargs)
        named = [*zip(executor.arg_names, host_args, strict=False), *host_kwargs.items()]
        memory.extents = [extent for item in named for extent in extents_of(*item)] + reachable
        return host_args, host_kwargs

    def check(access: str, builder: Any, pointers: Any, mask: Any) -> None:
        addresses = pointers.data if mask is None else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if addresses.size:
            memory.grid = builder.grid_dim
            program = np.array([np.ravel_multi_index(builder.grid_idx, builder.grid_dim)])
            memory.locate(access, addresses.reshape(-1), stored_dtype(pointers.get_element_ty()), program)

    def load(original: Callable, builder: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check("load", builder, pointers, mask)
        return original(builder, pointers, mask, *rest, **options)

    def store(original: Callable, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("store", builder, pointers, mask)
        return original(builder, pointers, value, mask, *rest)

    def update(original: Callable, builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("atomic", builder, pointers, mask)
        return original(builder, op, pointers, value, mask, *rest)

    def swap(original: Callable, builder: Any, pointers: Any, *rest: Any) -> Any:
        check("atomic", builder, pointers, None)
        return original(builder, pointers, *rest)

    with ExitStack() as patches:
        patches.enter_context(wrapped(stock.GridExecutor, "_init_args_hst", note_arguments))
        for operation, guard in (("masked_load", load), ("masked_store", store), ("atomic_rmw", update), ("atomic_cas", swap)):
            patches.enter_context(wrapped(stock.InterpreterBuilder, f"create_{operation}", guard))
        yield
