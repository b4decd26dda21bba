"""Corner faults, made at random: a right kernel that is 1 % off (by 1, of whole numbers alone) where a case lies in one class, or
in one pair of classes.

A kernel sees the case by its inputs and options alone: sizes from shapes, options by name, a trait by what that would change.
What it cannot see (of how many steps a call is one) makes no corner.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from itertools import combinations
from random import Random
from typing import Any

import torch

from gaugeblock.conformance.engine.calls import flatten, nest
from gaugeblock.conformance.engine.contract import Contract, Input
from gaugeblock.conformance.engine.exploration import PROFILES, examine
from gaugeblock.conformance.engine.factors import ORDINARY, Trait
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import make_inputs, options
from gaugeblock.conformance.engine.inputs.coverage import array, space
from gaugeblock.conformance.engine.judging.verdict import FAILED
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.conformance.selftest.fault import process_kept

OFF = 0.01
Classes = tuple[tuple[str, str], ...]  # names of factors, and a class of each


@dataclass(frozen=True)
class Corner:
    """Where a kernel is wrong."""

    contract: str
    classes: Classes

    def __str__(self) -> str:
        return f"{self.contract}: " + " and ".join(f"{name} {each}" for name, each in self.classes)


@dataclass(frozen=True)
class Caught:
    """What came of a corner fault: whether parity failed, and after how many cases."""

    corner: Corner
    caught: bool
    cases: int


class WrongInACorner:
    """A right kernel whose results are 1 % off in one corner, and 0.01 where they are 0; by 1 where all are whole numbers."""

    def __init__(self, contract: Contract, right: Callable[..., Any], classes: Classes) -> None:
        self.contract, self.right, self.classes = contract, right, classes

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        results = self.right(*arguments, **options)
        seen = seen_classes(self.contract, arguments, options)
        if any(seen.get(name) != each for name, each in self.classes):
            return results
        if not isinstance(results, tuple):
            return _off(results)
        whole = all(isinstance(each, torch.Tensor) and not each.is_floating_point() for each in results)
        return tuple(each + 1 if whole else _off(each) for each in results)


def _off(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.where(value == 0, OFF, value * (1 + OFF)).to(value.dtype) if value.is_floating_point() else value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _off(each) for name, each in vars(value).items()})
    return {name: _off(each) for name, each in value.items()}


def seen_classes(contract: Contract, arguments: Sequence[Any], given: Mapping[str, Any]) -> dict[str, str]:
    """The classes that a call shows, by factor."""
    inputs = flatten(tuple(arguments), [spec.name for spec in contract.inputs])
    parameters = _sizes(contract, inputs) | _options(given)
    found: dict[str, str] = {}
    for factor in contract.factors:
        try:
            found[factor.name] = factor.class_of(parameters)
        except KeyError:
            continue
    for name in dict.fromkeys(trait.factor for trait in contract.traits):
        traits = [trait for trait in contract.traits if trait.factor == name]
        there = [trait.name for trait in traits if trait.fits(parameters) and _has(trait, inputs)]
        found[name] = there[0] if there else ORDINARY
    return found


def _sizes(contract: Contract, inputs: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    steps = contract.recurrence.steps if contract.recurrence else None
    for key, spec in _specs(contract).items():
        names = [name for name in spec.shape if name != steps]  # a call is one step
        shape = inputs[key].shape[-len(names) :] if key in inputs and names else ()
        found |= {name: size for name, size in zip(names, shape, strict=False) if isinstance(name, str)}
    return found


def _specs(contract: Contract) -> dict[str, Input]:
    """Every tensor whose dimensions are named without knowing their sizes."""
    specs: dict[str, Input] = {}
    for spec in contract.inputs:
        try:
            leaves = spec.leaves({}) if spec.leaves else {}
        except KeyError:
            continue
        specs |= {f"{spec.name}/{name}": leaf for name, leaf in leaves.items()} if spec.leaves else {spec.name: spec}
    return specs


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments, and the fields of those that are configurations."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        found |= _options(value) if isinstance(value, Mapping) else {name: value}
    return found


def _has(trait: Trait, inputs: Mapping[str, Any]) -> bool:
    if any(str(inputs[key].dtype) != f"torch.{dtype}" for key, dtype in trait.dtypes.items()):
        return False
    if trait.change is None:
        return True
    wide = {key: each.detach().double() if each.is_floating_point() else each for key, each in inputs.items()}
    return all(torch.equal(each.to(inputs[key].dtype), inputs[key]) for key, each in trait.change(wide).items())


def corners(contract: Contract, strength: int) -> list[Classes]:
    """Every class, or pair of classes, that some case lies in and a call shows."""
    names = space(contract).names
    found: dict[Classes, None] = {}
    anyhow = replace(contract, chooses_inside=False)  # what a case shows does not depend on the choices in it
    for case in array(contract, 2):
        given = nest(make_inputs(anyhow, case, "float32"))
        seen = seen_classes(contract, [given[spec.name] for spec in contract.inputs], options(contract, case))
        numbered = [
            (name, each) for name, each in zip(names, space(contract).classes(case), strict=True) if seen.get(name) == each
        ]
        found |= dict.fromkeys(combinations(numbered, strength))
    return list(found)


def drawn_corners(right: Mapping[str, Any], count: int, seed: int) -> Iterator[Corner]:
    """So many corners, half of them of one class and half of a pair, evenly over the contracts."""
    random = Random(seed)
    every = {(name, strength): corners(find_contract(name), strength) for name in right for strength in (1, 2)}
    turns = list(every)
    for turn in range(count):
        name, strength = turns[turn % len(turns)]
        yield Corner(name, random.choice(every[name, strength]))


def judge_corner(corner: Corner, right: Mapping[str, Callable[[], Callable[..., Any]]]) -> Caught:
    """Puts a corner fault through parity, as a candidate in `quick`."""
    contract = find_contract(corner.contract)
    candidate = WrongInACorner(contract, right[corner.contract](), corner.classes)
    subject = Subject(Implementation(contract.name, "corner", candidate), "float32", "cpu")
    with process_kept():
        verdict = examine(subject, properties()["parity"], replace(PROFILES["quick"], shrink_seconds=0))
    return Caught(corner, verdict.status in FAILED, verdict.cases)
