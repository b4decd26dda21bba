"""Which sizes and options a candidate takes, where it takes not all: an expression of their names, told with its claims.

What a candidate says is never run: the expression is read, and only names, numbers, comparisons, `+ - // %`, and `and or not` are
known. None of these can take long.
"""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.suggestion import suggest
from gaugeblock.conformance.engine.vocabulary import Parameters

LONGEST = 200  # characters
ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
COMPARISONS: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip


@cache
def narrowed(contract: Contract, only: str) -> Contract:
    """The contract with such sizes and options alone: its landmarks and whatever else is drawn."""
    draw, build = contract.parameters, contract.build

    def built(**values: Any) -> Parameters | None:
        assert build is not None  # asked for where there is one
        made = build(**values)
        return made if made is not None and holds(only, made) else None

    return replace(
        contract,
        landmarks=tuple(each for each in contract.landmarks if holds(only, each)),
        parameters=draw and (lambda: draw().filter(lambda drawn: holds(only, drawn))),
        build=build and built,
    )


def holds(only: str, parameters: Parameters) -> bool:
    """Whether the expression is true; one that has no value there is not."""
    try:
        return bool(_value(_parsed(only), parameters))
    except (ArithmeticError, TypeError):
        return False


def wrong_with(only: Any, contract: Contract) -> str:
    """What is wrong with the expression, or an empty string."""
    if not isinstance(only, str) or len(only) > LONGEST:
        return f"expected text of at most {LONGEST} characters"
    if not only:
        return ""
    try:
        body = _parsed(only)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 'expected an expression such as "hidden_size % 8 == 0 and top_k <= 8"'
    for wrong in _unknown(body, contract.landmarks[0]):
        return wrong
    return "" if any(holds(only, each) for each in contract.landmarks) else "none of the contract's landmarks is such"


@cache
def _parsed(only: str) -> ast.expr:
    return ast.parse(only, mode="eval").body


def _unknown(node: ast.expr, known: Parameters) -> Iterator[str]:
    """What is not known in an expression, each in a sentence."""
    match node:
        case ast.Name(id=name):
            if name not in known:
                yield f"unknown name {name!r}{suggest(name, known)}"
        case ast.Constant(value=int() | float()):
            pass
        case ast.BoolOp(values=values):
            for each in values:
                yield from _unknown(each, known)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield from _unknown(operand, known)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            yield from (*_unknown(left, known), *_unknown(right, known))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            sides = (each for each in (left, right) if not (isinstance(each, ast.Constant) and isinstance(each.value, str)))
            for each in sides:
                yield from _unknown(each, known)
        case _:
            yield f"{ast.unparse(node)!r} is more than names, numbers, one comparison each, + - // %, and, or, not"


def _value(node: ast.expr, parameters: Parameters) -> Any:
    match node:
        case ast.Name(id=name):
            return parameters[name]
        case ast.Constant(value=value):
            return value
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(each, parameters) for each in values)
        case ast.BoolOp(values=values):
            return any(_value(each, parameters) for each in values)
        case ast.UnaryOp(operand=operand):
            return not _value(operand, parameters)
        case ast.BinOp(left=left, op=op, right=right):
            return ARITHMETIC[type(op)](_value(left, parameters), _value(right, parameters))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return COMPARISONS[type(op)](_value(left, parameters), _value(right, parameters))
    raise TypeError(ast.dump(node))  # `wrong_with` has been asked before
