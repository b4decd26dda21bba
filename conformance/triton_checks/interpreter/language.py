"""Triton's language during a launch: its functions speak to our builder, its loops and conditions to all programs at once.

Triton's own interpreter exchanges the same attributes, anew in each call of a device function, and 3.6 leaves them exchanged.
Here they are found once, in their original form, and exchanged for the time of a launch.
"""

import ast
import inspect
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from triton import language as tl
from triton.runtime import interpreter as stock

from gaugeblock.conformance.triton_checks.interpreter import reductions
from gaugeblock.conformance.triton_checks.interpreter.builder import Builder
from gaugeblock.conformance.triton_checks.interpreter.control_flow import turns
from gaugeblock.conformance.triton_checks.interpreter.handle import Handle

Patch = tuple[Any, str, Any]  # an owner, the name of its attribute, and the value to be
_MISSING = object()


@contextmanager
def patched(patches: list[Patch]) -> Iterator[None]:
    """Sets attributes for a while."""
    before = [(owner, name, vars(owner).get(name, _MISSING)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextmanager
def speaking_to(builder: Builder) -> Iterator[None]:
    """Has kernels that are called inside run in the programs of the builder's batch."""
    builders = [(stock, "interpreter_builder", builder), (stock.interpreter_semantic, "builder", builder)]
    with patched([*_language(), *builders]):
        yield


def builder() -> Builder:
    """The builder that is spoken to."""
    return stock.interpreter_semantic.builder


@cache
def _language() -> list[Patch]:
    patches: list[Patch] = []
    for owner in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        members = [(name, _original(member)) for name, member in inspect.getmembers(owner)]
        patches += [(owner, name, _with_semantic(member)) for name, member in members if tl.core.is_builtin(member)]
    for module in (tl, tl.core):
        patches += [
            (module, "range", lockstep_range),
            (module, "static_range", lockstep_range),
            (module, "reduce", reductions.reduce),
            (module, "associative_scan", reductions.associative_scan),
            (module, "static_assert", _static_assert),
            (module, "static_print", print),
            (module, "multiple_of", partial(_hint, name="tt.divisibility")),
            (module, "max_contiguous", partial(_hint, name="tt.contiguity")),
            (module, "max_constancy", partial(_hint, name="tt.constancy")),
        ]
    if hasattr(tl, "condition"):
        patches.append((tl.condition, "__bool__", lambda self: bool(self.condition)))
    patches += [
        (tl.dtype, "to_ir", lambda self, builder: self),
        (tl.tensor, "__init__", _init_tensor),
        (tl.tensor, "__index__", lambda self: builder().agreement.agree_on(self.handle.scalars)),
        (tl.tensor, "__bool__", _truth),
        (tl.tensor, "__repr__", lambda self: repr(self.handle.full)),
        (tl.tensor, "__str__", lambda self: str(self.handle.full)),
        (tl.tensor, "T", property(_transposed)),
        (tl.block_type, "__init__", _block_types(tl.block_type.__init__)),
        (stock.TritonSemantic, "broadcast_impl_value", _broadcasting(stock.TritonSemantic.broadcast_impl_value)),
        (stock.InterpretedFunction, "__call__", lambda self, *args, **kwargs: rewritten(self)(*args, **kwargs)),
        (stock, "TensorHandle", Handle),
    ]
    return patches


def _original(member: Any) -> Any:
    """What Triton's own interpreter has exchanged: it keeps the original as a default of the keyword `member`."""
    while "member" in (getattr(member, "__kwdefaults__", None) or {}):
        member = member.__kwdefaults__["member"]
    return member


def _with_semantic(member: Callable) -> Callable:
    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return member(*args, _semantic=stock.interpreter_semantic, **kwargs)

    return call


def lockstep_range(start: Any, stop: Any = None, step: Any = 1, **_: Any) -> Any:
    """`range`, `tl.range` and `tl.static_range`."""
    start, stop = (0, start) if stop is None else (start, stop)
    return turns(builder().agreement, start, stop, 1 if step is None else step)


def _extreme(python: Callable, name: str) -> Callable:
    def extreme(*values: Any) -> Any:
        if not any(isinstance(each, tl.tensor) for each in values):
            return python(*values)
        first, *others = values
        for each in others:
            first = getattr(tl, name)(first, each)
        return first

    return extreme


# What kernels call by Python's names.
_PYTHON: dict[str, Callable] = {
    "range": lockstep_range,
    "min": _extreme(min, "minimum"),
    "max": _extreme(max, "maximum"),
}


class _Transformer(stock.ASTTransformer):
    """Triton's changes of a kernel's text, and our functions for Python's, but where a module has its own of the name."""

    def __init__(self, names_of_module: Container[str]) -> None:
        self.names = [name for name in _PYTHON if name not in names_of_module]

    def visit_Name(self, node: ast.Name) -> ast.Name:
        """`range` becomes `_lockstep_range`."""
        if node.id in self.names:
            node.id = f"_lockstep_{node.id}"
        return node


class _Rewriter(stock.FunctionRewriter):
    def __init__(self, function: Any, **kwargs: Any) -> None:
        super().__init__(function, **kwargs)
        self.ast_transformer = _Transformer(function.__globals__)


_rewritten: dict[Callable, Callable] = {}


def rewritten(function: Any) -> Callable:
    """The Python function of an `InterpretedFunction`, ready to be called in a launch."""
    if function.fn not in _rewritten:
        function.fn.__globals__.update({f"_lockstep_{name}": value for name, value in _PYTHON.items()})
        _rewritten[function.fn] = _Rewriter(function.fn, **function.kwargs).rewrite_ast()
    return _rewritten[function.fn]


def _static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


def _hint(tensor: Any, values: Any, name: str) -> Any:
    if isinstance(tensor, tl.tensor):
        tensor.handle.set_attr(name, values)
    return tensor


def _truth(self: Any) -> bool:
    """Of a scalar, what all programs have; a block is true, as in Triton's interpreter."""
    return builder().agreement.agree_on(self.handle.scalars != 0) if self.numel.value == 1 else True


def _transposed(self: Any) -> Any:
    *others, rows, columns = self.handle.shape
    order = (*range(len(others)), len(others) + 1, len(others))
    return tl.tensor(builder().create_trans(self.handle, order), tl.block_type(self.dtype, [*others, columns, rows]))


# Types are made in every operation, a fifth of its time: those of one shape share what is computed from it.


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """As `tl.tensor.__init__`."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _sizes(type.sizes if type.is_block() else ())


@cache
def _sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
    numel = 1
    for size in shape:
        numel *= size
    return tl.core.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(numel)


def _block_types(original: Callable) -> Callable:
    """`tl.block_type.__init__`, which checks each shape once. `sizes` is the shape as Python's tuple."""
    known: dict[tuple[int, ...], tuple[Any, int]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([each.value if isinstance(each, tl.constexpr) else each for each in shape])
        if sizes not in known:
            original(self, element_ty, list(sizes))
            known[sizes] = self.shape, self.numel
        self.sizes, self.element_ty = sizes, element_ty
        self.shape, self.numel = known[sizes]
        self.name = f"<{sizes}, {element_ty}>"

    return init


def _broadcasting(original: Callable) -> Callable:
    """`broadcast_impl_value`, which copies nothing: an axis that is repeated stays 1 in the data."""

    def broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.handle.shape, rhs.handle.shape
        if left == right:
            return lhs, rhs
        if left and right:
            if len(left) != len(right) or any(m != n and m != 1 and n != 1 for m, n in zip(left, right, strict=True)):
                return original(self, lhs, rhs)
            shape = tuple([max(sizes) for sizes in zip(left, right, strict=True)])
        else:
            shape = left or right
        return _spread(lhs, shape), _spread(rhs, shape)

    return broadcast


def _spread(tensor: Any, shape: tuple[int, ...]) -> Any:
    handle = tensor.handle
    if handle.shape == shape:
        return tensor
    data = handle.data if handle.shape else handle.data.reshape(-1, *(1,) * len(shape))
    return tl.tensor(Handle(data, handle.dtype, shape), tl.block_type(tensor.type.scalar, shape))
