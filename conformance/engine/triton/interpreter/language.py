"""Triton's language during a launch: its functions speak to our builder, its loops and conditions to all programs at once.

Triton's own interpreter exchanges the same attributes, anew in each call of a device function, and 3.6 leaves them exchanged.
Here they are found once, in their original form, and exchanged for the time of a launch.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from triton import language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as nvidias
from triton.runtime import interpreter as stock

from gaugeblock.conformance.engine.triton.interpreter import reductions, shortcuts
from gaugeblock.conformance.engine.triton.interpreter.builder import Builder
from gaugeblock.conformance.engine.triton.interpreter.control_flow import turns
from gaugeblock.conformance.engine.triton.interpreter.handle import Handle
from gaugeblock.conformance.engine.triton.interpreter.tensors import SEMANTIC, Tensor, add_methods, block, sizes_of_tensor

_MISSING = object()
Attributes = dict[str, Any]


@contextmanager
def speaking_to(builder: Builder) -> Iterator[None]:
    """Has kernels that are called inside run in the programs of the builder's batch."""
    namespaces, types = _language()
    builders = [(vars(stock), {"interpreter_builder": builder}), (vars(SEMANTIC), {"builder": builder})]
    with _exchanged([*namespaces, *builders]), _set(types):
        yield


@contextmanager
def _exchanged(namespaces: list[tuple[Attributes, Attributes]]) -> Iterator[None]:
    """Gives modules and instances other attributes for a while: all of one at a time, since there are hundreds."""
    before = [{name: namespace.get(name, _MISSING) for name in values} for namespace, values in namespaces]
    for namespace, values in namespaces:
        namespace.update(values)
    try:
        yield
    finally:
        for (namespace, _), values in zip(reversed(namespaces), reversed(before), strict=True):
            namespace.update(values)
            for name in [name for name, value in values.items() if value is _MISSING]:
                del namespace[name]


@contextmanager
def _set(attributes: list[tuple[type, str, Any]]) -> Iterator[None]:
    """Sets attributes of types, each of its own, for a while."""
    before = [(owner, name, vars(owner).get(name, _MISSING)) for owner, name, _ in attributes]
    for owner, name, value in attributes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def builder() -> Builder:
    """The builder that is spoken to."""
    return SEMANTIC.builder


@cache
def _language() -> tuple[list[tuple[Attributes, Attributes]], list[tuple[type, str, Any]]]:
    """What modules and instances have instead, and types."""
    ours: Attributes = {
        "tensor": Tensor,
        "range": lockstep_range,
        "static_range": lockstep_range,
        "reduce": reductions.reduce,
        "associative_scan": reductions.associative_scan,
        "static_assert": _static_assert,
        "static_print": print,
        "multiple_of": partial(_hint, name="tt.divisibility"),
        "max_contiguous": partial(_hint, name="tt.contiguity"),
        "max_constancy": partial(_hint, name="tt.constancy"),
    }
    semantic = {
        "tensor": Tensor,
        "to_tensor": shortcuts.converting(SEMANTIC.to_tensor),
        "cast": shortcuts.casting(SEMANTIC.cast),
        "broadcast_impl_value": shortcuts.broadcasting(SEMANTIC.broadcast_impl_value),
        "binary_op_type_checking_impl": shortcuts.checking(SEMANTIC.binary_op_type_checking_impl),
    }
    unwrap = {"_unwrap_if_constexpr": shortcuts.unwrapping(tl.core._unwrap_if_constexpr)}
    for name, shortcut in (("arange", shortcuts.kept), ("load", shortcuts.loading)):
        ours[name] = shortcut(_builtins(tl)[name])
    namespaces = [(vars(tl), _builtins(tl) | ours), (vars(tl.core), _builtins(tl.core) | ours | unwrap)]
    namespaces += [(vars(each), _builtins(nvidias)) for each in (libdevice, nvidias)]  # the first has empty bodies
    namespaces += [(vars(tl.math), _builtins(tl.math)), (vars(SEMANTIC), semantic), (vars(stock), {"TensorHandle": Handle})]
    add_methods(_builtins(tl.tensor))
    descriptor = tl.core.tensor_descriptor_base
    types = [
        *((descriptor, name, member) for name, member in _builtins(descriptor).items()),
        (tl.dtype, "to_ir", lambda self, builder: self),
        (tl.dtype, "__eq__", shortcuts.equality(tl.dtype.__eq__)),
        (tl.block_type, "__init__", _block_types(tl.block_type.__init__)),
        (tl.block_type, "with_element_ty", lambda self, scalar_ty: block(scalar_ty, tuple(self.shape))),
        (stock.InterpretedFunction, "__call__", lambda self, *args, **kwargs: rewritten(self)(*args, **kwargs)),
    ]
    if hasattr(tl, "condition"):
        types.append((tl.condition, "__bool__", lambda self: bool(self.condition)))
    return namespaces, types


def _builtins(owner: Any) -> Attributes:
    """The functions of an owner that ask for a semantic, which they now have."""
    members = [(name, _original(member)) for name, member in inspect.getmembers(owner)]
    return {name: _with_semantic(member) for name, member in members if tl.core.is_builtin(member)}


def _original(member: Any) -> Any:
    """What Triton's own interpreter has exchanged: it keeps the original as a default of the keyword `member`."""
    while "member" in (getattr(member, "__kwdefaults__", None) or {}):
        member = member.__kwdefaults__["member"]
    return member


def _with_semantic(member: Any) -> Callable:
    # what `tl.core.builtin` wraps around a function only looks whether there is a semantic
    is_wrapped = getattr(member, "__code__", None) is _original(tl.core.to_tensor).__code__
    function = member.__wrapped__ if is_wrapped else member

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, _semantic=SEMANTIC, **kwargs)

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


def _in_launches(value: Any) -> Callable | None:
    """What stands in a launch for a function of the language that a kernel's module has imported by name, or None.

    The module that it is of has another then, and the kernel's module would still have the original.
    """
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if not (tl.core.is_builtin(value) or (module is libdevice and inspect.isfunction(value))):
        return None
    return lambda *args, **kwargs: getattr(module, value.__name__)(*args, **kwargs)


class _Transformer(stock.ASTTransformer):
    """Triton's changes of a kernel's text, and other functions for some of its names."""

    def __init__(self, names: Container[str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        """`range` becomes `_lockstep_range`."""
        if node.id in self.names:
            node.id = f"_lockstep_{node.id}"
        return node


class _Rewriter(stock.FunctionRewriter):
    def __init__(self, function: Any, **kwargs: Any) -> None:
        super().__init__(function, **kwargs)
        module, own = function.__globals__, function.__code__.co_varnames
        python = {name: value for name, value in _PYTHON.items() if name not in module}
        imported = {name: there for name in function.__code__.co_names if (there := _in_launches(module.get(name)))}
        names = {name: value for name, value in (python | imported).items() if name not in own}
        module.update({f"_lockstep_{name}": value for name, value in names.items()})
        self.ast_transformer = _Transformer(names)


_rewritten: dict[Callable, Callable] = {}


def rewritten(function: Any) -> Callable:
    """The Python function of an `InterpretedFunction`, ready to be called in a launch."""
    if function.fn not in _rewritten:
        _rewritten[function.fn] = _Rewriter(function.fn, **function.kwargs).rewrite_ast()
    return _rewritten[function.fn]


def _static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


def _hint(tensor: Any, values: Any, name: str) -> Any:
    if isinstance(tensor, tl.tensor):
        tensor.handle.set_attr(name, values)
    return tensor


def _block_types(original: Callable) -> Callable:
    """`tl.block_type.__init__`, which checks each shape once: a type is made in many operations. `sizes` is Python's tuple."""
    known: dict[tuple[int, ...], tuple[Any, int, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([each.value if isinstance(each, tl.constexpr) else each for each in shape])
        if sizes not in known:
            original(self, element_ty, list(sizes))
            known[sizes] = self.shape, self.numel, sizes_of_tensor(sizes)
        self.sizes, self.element_ty = sizes, element_ty
        self.shape, self.numel, self.sizes_of_tensor = known[sizes]
        self.name = f"<{sizes}, {element_ty}>"

    return init
