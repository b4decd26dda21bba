"""Between the flat keys of the engine and a call: `{"state/w": b}` and `function(state={"w": b})`.

An argument is a tensor or a flat dict of tensors (a state dict). The engine keeps arguments and results as flat dicts
keyed by `"hidden_states"` or `"state/blocks.0.weight"`; `nest` and `flatten` are the two ways across, `apply` makes a call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gaugeblock.conformance.engine.contract import Contract


def argument_of(key: str) -> str:
    """The argument that a flat key belongs to: `"state/blocks.0.weight"` to `"state"`."""
    return key.partition("/")[0]


def nest(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys to arguments: `{"x": a, "state/w": b}` to `{"x": a, "state": {"w": b}}`."""
    arguments: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name, nested, leaf = key.partition("/")
        if nested:
            arguments.setdefault(name, {})[leaf] = tensor
        else:
            arguments[name] = tensor
    return arguments


class ResultCount(TypeError):
    """A function returned more or fewer results than its contract has, or not the same ones in each step."""


def flatten(result: Any, names: Sequence[str]) -> dict[str, Any]:
    """What a function returned to flat keys: a value, or a tuple or list of them, in the order of `names`.

    A value may be a dict or a dataclass of tensors.

    Raises:
        ResultCount: If the number of results is not that of `names`.
    """
    values = tuple(result) if isinstance(result, tuple | list) else (result,)
    if len(values) != len(names):
        raise ResultCount(f"returned {len(values)} values, expected {len(names)}: ({', '.join(names)})")
    flat: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if is_dataclass(value):
            value = {each.name: getattr(value, each.name) for each in fields(value)}
        if isinstance(value, Mapping):
            flat |= {f"{name}/{leaf}": tensor for leaf, tensor in value.items()}
        else:
            flat[name] = value
    return flat


def apply(
    contract: "Contract",
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    stack: Callable[[list[Any]], Any],
) -> dict[str, Any]:
    """Calls a function as the contract's signature says, inputs by position and options by keyword; once for each step.

    Args:
        inputs: Flat inputs.
        stack: Puts the arrays of all steps along a new leading dimension.

    Returns:
        Flat outputs.

    Raises:
        ResultCount: If the number of results is not that of the contract's outputs, or a step lacks what another has.
    """
    names = [spec.name for spec in contract.outputs]
    given = nest(inputs)
    if contract.recurrence is None:
        return flatten(function(*(given[spec.name] for spec in contract.inputs), **options), names)
    stepped = [spec.name for spec in contract.inputs if spec.shape[:1] == (contract.recurrence.steps,)]
    results = []
    for step in range(len(given[stepped[0]])):
        now = given | {name: given[name][step] for name in stepped}
        results.append(flatten(function(*(now[spec.name] for spec in contract.inputs), **options), names))
        returned = nest(results[-1])
        due = {*results[0], *contract.recurrence.carried.values()}
        if other := due - {*results[-1], *returned} or {*results[-1]} - due:
            raise ResultCount(f"step {step} {'lacks' if other <= due else 'has'} {min(other)}, other than the first")
        given |= {name: returned[output] for name, output in contract.recurrence.carried.items()}
    last, carried = results[-1], contract.recurrence.carried.values()
    return {key: last[key] if argument_of(key) in carried else stack([each[key] for each in results]) for key in last}
