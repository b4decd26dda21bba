"""The short ways of our interpreter's operators and functions give what Triton's long ones give, mistakes included."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import triton.language as tl

from gaugeblock.conformance.engine.triton.interpreter import language, tensors
from gaugeblock.conformance.engine.triton.interpreter import launch as launches
from gaugeblock.conformance.engine.triton.interpreter.builder import Builder
from gaugeblock.conformance.engine.triton.interpreter.handle import Handle, held_dtype, rounded
from gaugeblock.conformance.engine.triton.interpreter.memory import Extent, Memory
from gaugeblock.conformance.engine.triton.interpreter.tensors import SEMANTIC, Tensor, of

DTYPES = [tl.int1, tl.int8, tl.int32, tl.int64, tl.uint8, tl.uint32, tl.float16, tl.bfloat16, tl.float32, tl.float64]
OPERATORS = [
    f"__{'r' * reflected}{name}__" for name in "add sub mul lt le gt ge eq ne and or xor".split() for reflected in (0, 1)
]
SHAPES = [((), ()), ((), (4,)), ((4,), ()), ((4,), (4,)), ((1, 4), (2, 1)), ((4,), (2,)), ((2, 4), (4,)), ((1,), (1,))]
CONSTANTS = [
    0, 1, -1, 127, 128, 2**31, -(2**31) - 1, 2**63, 2**64, True, False, 0.0, -0.0, 0.1, float("nan"), float("inf"), 1e-40, 1e300,
    tl.constexpr(3), tl.constexpr(2.5), tl.constexpr(None), None, "text",
]  # fmt: skip
PROGRAMS = 3
MEMORY = np.zeros(64, np.float32)


@contextmanager
def launch() -> Iterator[Builder]:
    start = MEMORY.ctypes.data
    memory = Memory("kernel", (PROGRAMS, 1, 1), [Extent("memory", start, start + MEMORY.nbytes, 4, (1,))])
    builder = Builder(memory, (PROGRAMS, 1, 1), poison=True)
    with language.speaking_to(builder), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder.start_batch(np.arange(PROGRAMS))
        yield builder


@contextmanager
def long_ways() -> Iterator[None]:
    """Without the shortcuts of Triton's semantic, but for a broadcast that copies nothing."""
    ours = {name: vars(SEMANTIC).pop(name) for name in ("to_tensor", "cast", "binary_op_type_checking_impl")}
    try:
        yield
    finally:
        vars(SEMANTIC).update(ours)


def tensor(dtype: Any, shape: tuple[int, ...], programs: int = PROGRAMS) -> Tensor:
    """Inside a launch."""
    values = np.resize([0.0, -0.0, 0.1, -2.5, 7.0, np.nan, 300.0, -1e30, 2.0**31], (programs, *shape))
    held = held_dtype(dtype)
    if held.kind != "f":
        values = np.nan_to_num(values).clip(-(2.0**40), 2.0**40).astype(np.int64).astype(held)
    return of(rounded(values, dtype, shape), dtype)


def pointers(element: Any, shape: tuple[int, ...]) -> Tensor:
    offsets = 4 * (np.arange(PROGRAMS * int(np.prod(shape))) % 16).reshape(PROGRAMS, *shape)
    addresses, dtype = np.uint64(MEMORY.ctypes.data) + offsets.astype(np.uint64), tl.pointer_type(element)
    return of(Handle(addresses, dtype, shape), dtype)


def outcome(function: Callable, *arguments: Any) -> tuple:
    """What a function returns, to the bit, or how it fails."""
    try:
        results = function(*arguments)
    except BaseException as error:  # programs may part
        return type(error).__name__, str(error)
    return tuple(map(described, results if isinstance(results, tuple) else (results,)))


def described(result: Any) -> Any:
    if not isinstance(result, tl.tensor):
        return repr(result)
    handle = result.handle
    of_tensor = type(result), str(result.type), result.dtype.name, str(result.shape), result.numel.value
    return *of_tensor, handle.dtype.name, handle.shape, handle.data.dtype.name, handle.full.tobytes()


def both(short: Callable, long: Callable, *arguments: Any) -> tuple[tuple, tuple]:
    one = outcome(short, *arguments)
    with long_ways():
        return one, outcome(long, *arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    long = language._builtins(tl.tensor)[name]
    with launch():
        short = getattr(Tensor, name)
        operands = [*DTYPES, tl.pointer_type(tl.float32)]
        for (one, other), (left, right), programs in product(product(operands, operands), SHAPES, (1, PROGRAMS)):
            made = tensor(one, left), tensor(other, right, programs)
            results = both(short, long, *made)
            assert results[0] == results[1], (one, other, left, right)
        for dtype, shape, constant in product(operands, ((), (4,)), CONSTANTS):
            results = both(short, long, tensor(dtype, shape), constant)
            assert results[0] == results[1], (dtype, shape, constant)


@pytest.mark.parametrize("name", ["cast", "to_tensor", "binary_op_type_checking_impl"])
def test_functions_of_the_semantic(name):
    def short(*arguments: Any) -> Any:
        return vars(SEMANTIC)[name](*arguments)

    def long(*arguments: Any) -> Any:
        return getattr(type(SEMANTIC), name)(SEMANTIC, *arguments)

    with launch():
        blocks = [tensor(dtype, shape) for dtype, shape in product(DTYPES, ((), (4,)))]
        calls = {
            "cast": product(blocks, DTYPES, (None, "rtne", "rtz", "up")),
            "to_tensor": product([*blocks, *CONSTANTS], (True, False)),
            "binary_op_type_checking_impl": [
                (*sides, *flags)
                for pair in product([*blocks, pointers(tl.float32, (4,))], [*blocks, *CONSTANTS[:-4]])
                for sides in (pair, pair[::-1])
                for flags in ((), (True, True), (False, False, False), (False, False, True, True))
            ],
        }[name]
        for arguments in calls:
            results = both(short, long, *arguments)
            assert results[0] == results[1], arguments


def test_axes_are_added():
    item = language._builtins(tl.tensor)["__getitem__"]
    every = slice(None)
    with launch():
        indices = [None, every, (None,), (every, None), (None, every), (every, every), (every, None, every), (), (slice(1), None)]
        for shape, index in product(((), (4,), (2, 4)), [*indices, 0, tl.constexpr(None), (tl.constexpr(None), every)]):
            results = both(Tensor.__getitem__, item, tensor(tl.float32, shape), index)
            assert results[0] == results[1], (shape, index)


def test_loads():
    long = language._builtins(tl)["load"]
    MEMORY[:] = np.arange(64)
    with launch():
        masks = [None, True, *(tensor(tl.int1, shape) for shape in ((), (4,), (1,), (1, 4), (2, 1))), tensor(tl.int32, (4,))]
        others = [None, 0, 1.5, -0.0, *(tensor(tl.float32, shape) for shape in ((), (4,), (1,), (2, 4))), tl.constexpr(2)]
        elements = [tl.float32, tl.bfloat16, tl.int32, tl.uint8, tl.int1]
        for element, shape, mask, other in product(elements, ((), (4,), (1,), (2, 4)), masks, others):
            results = both(tl.load, long, pointers(element, shape), mask, other)
            assert results[0] == results[1], (element, shape, mask, other)


def test_ranges():
    long = language._builtins(tl)["arange"]
    with launch():
        for arguments in ((0, 4), (tl.constexpr(0), tl.constexpr(4)), (4, 8), (0, 3), (0, 4.0), (4, 0), (False, True), (0,)):
            results = both(tl.arange, long, *arguments)
            assert results[0] == results[1], arguments


def test_shortcuts_last_for_a_launch():
    before = tl.tensor, tl.core.tensor, tl.load, tl.dtype.__eq__, dict(vars(SEMANTIC))
    with launch():
        assert tl.tensor is tl.core.tensor is tensors.Tensor
    assert (tl.tensor, tl.core.tensor, tl.load, tl.dtype.__eq__, dict(vars(SEMANTIC))) == before


def test_arguments_are_bound_as_python_binds_them():
    def plain(a, b, c): ...
    def with_defaults(a, b=2, *, c, d=4): ...
    def variadic(a, *rest, **others): ...

    calls = [
        ([1, 2, 3], {}),
        ([1], {"c": 3, "b": 2}),
        ([1, 2], {"b": 2, "c": 3}),
        ([], {"c": 3, "a": 1}),
        ([1, 2, 3, 4], {}),
        ([], {}),
    ]
    for function, (arguments, keywords) in product((plain, with_defaults, variadic), calls):
        expected = outcome(partial(inspect.getcallargs, function, *arguments, **keywords))
        assert outcome(launches._bound, function, arguments, keywords) == expected
