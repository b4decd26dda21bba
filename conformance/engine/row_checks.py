"""What can be wrong with a contract's row: checked where it is written, told by the row's name and the field's.

Each check yields what is wrong in the words `field: expected ..., got ...`; the first is raised.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gaugeblock.conformance.engine.property_names import property_names
from gaugeblock.conformance.engine.shardings import Blocks, EvenMultiple
from gaugeblock.conformance.engine.suggestion import suggest
from gaugeblock.conformance.engine.vocabulary import DTYPES

if TYPE_CHECKING:
    from gaugeblock.conformance.engine.contract import Contract, Input

FIXED_DTYPES = ("bool", "uint8", "int8", "int32", "int64", "float64", "float8_e4m3fn", *DTYPES)


class ContractError(Exception):
    """A contract or its reference is wrong, whoever is on trial."""


def check_row(row: "Contract") -> None:
    """Every check of a contract.

    Raises:
        ContractError: With the row's name, the field, what was expected and what stands there.
    """
    for check in (names, landmarks, shapes, dimensions, shardings, choice, steps, values, classes, rejections, exceptions):
        for wrong in check(row):
            raise ContractError(f"{row.name}: {wrong}")


def names(row: "Contract") -> Iterator[str]:
    """What must be unique, and the name's form."""
    family, _, operation = row.name.partition(".")
    if not (family.isidentifier() and operation.isidentifier()):
        yield f"name: expected family.operation, got {row.name!r}"
    groups: dict[str, list[str]] = {
        "inputs and options": [*(each.name for each in row.inputs), *row.options],
        "outputs": [each.name for each in row.outputs],
        "implementations": [each.name for each in row.implementations],
    }
    named = ("regimes", "traits", "factors", "rejections", "workloads")
    groups |= {name: [each.name for each in getattr(row, name)] for name in named}
    for field, members in groups.items():
        twice = [each for each in members if members.count(each) > 1]
        if twice:
            yield f"{field}: {twice[0]!r} stands there twice"
    for field in ("inputs", "outputs", "landmarks", "regimes"):
        if not getattr(row, field):
            yield f"{field}: expected one at least, got none"


def landmarks(row: "Contract") -> Iterator[str]:
    """All name the same sizes and options."""
    known = set(row.landmarks[0])
    points = {f"landmarks[{number}]": each for number, each in enumerate(row.landmarks)}
    points |= {f"workloads[{each.name!r}]": each.parameters for each in row.workloads}
    for place, point in points.items():
        lacking, more = known - set(point), set(point) - known
        if lacking:
            yield f"{place}: lacks {sorted(lacking)[0]!r}, which landmarks[0] has"
        if more:
            yield f"{place}: has {sorted(more)[0]!r}, which landmarks[0] lacks"


def shapes(row: "Contract") -> Iterator[str]:
    """Every dimension of every tensor is a size, of a dict's as well; every dtype exists."""
    known = row.landmarks[0]
    for field, specs in (("inputs", row.inputs), ("outputs", row.outputs)):
        for spec in specs:
            members = {f"{spec.name}/{leaf}": each for leaf, each in spec.leaves(known).items()} if spec.leaves else {}
            for name, each in {spec.name: spec, **members}.items():
                yield from _tensor(f"{field}[{name!r}]", each, known)


def _tensor(place: str, spec: "Input", known: Mapping[str, Any]) -> Iterator[str]:
    for dimension in (*spec.shape, *([spec.indexes] if spec.indexes else [])):
        if isinstance(dimension, str) and dimension not in known:
            yield f"{place}: unknown dimension {dimension!r}{suggest(dimension, known)}"
    if spec.dtype not in ("tested", *FIXED_DTYPES):
        yield f"{place}: unknown dtype {spec.dtype!r}{suggest(spec.dtype, ('tested', *FIXED_DTYPES))}"


def _tensors(row: "Contract") -> Iterator["Input"]:
    """Inputs and outputs, and of dicts what is in them."""
    for spec in (*row.inputs, *row.outputs):
        yield from (spec.leaves(row.landmarks[0]).values() if spec.leaves else [spec])


def dimensions(row: "Contract") -> Iterator[str]:
    """What is said of a dimension is said of one that there is; options are parameters."""
    shaped = {each for spec in _tensors(row) for each in spec.shape if isinstance(each, str)}
    split = [(f"shardings[{name!r}]", each) for name, sharding in row.shardings.items() for each in sharding]
    for field, dimension in (("batch", row.batch), *split):
        if dimension not in shaped:
            yield f"{field}: no input or output has the dimension {dimension!r}{suggest(dimension, shaped)}"
    needed = [("options", each) for each in row.options if row.configure is None]
    needed += [("microbatches", row.microbatches)] if row.microbatches else []
    for field, name in needed:
        if name not in row.landmarks[0]:
            yield f"{field}: landmarks lack {name!r}{suggest(name, row.landmarks[0])}"


def shardings(row: "Contract") -> Iterator[str]:
    """A tensor is split along one dimension, blocks follow what is split evenly, and implementations name what there is."""
    for name, sharding in row.shardings.items():
        for spec in _tensors(row):
            split = [each for each in spec.spread if each in sharding]
            if len(split) > 1:
                yield f"shardings[{name!r}]: expected one dimension of {spec.name} to be split, got {split}"
        for dimension, share in sharding.items():
            if isinstance(share, Blocks) and (found := sharding.get(share.of)) != "even":
                yield f"shardings[{name!r}][{dimension!r}]: expected {share.of!r} to be split evenly, got {found!r}"
            if isinstance(share, EvenMultiple) and share.of not in row.landmarks[0]:
                yield f"shardings[{name!r}][{dimension!r}]: landmarks lack {share.of!r}{suggest(share.of, row.landmarks[0])}"
    for each in row.implementations:
        if (each.world_sizes or each.sharding) and (each.sharding or not row.shardings) and each.sharding not in row.shardings:
            yield f"implementations[{each.name!r}]: no sharding {each.sharding!r}{suggest(each.sharding, row.shardings)}"


def choice(row: "Contract") -> Iterator[str]:
    """What is chosen is an output; how many is a parameter."""
    if row.selection is None:
        return
    outputs = [each.name for each in row.outputs]
    if row.selection.output not in outputs:
        yield f"selection: no output {row.selection.output!r}{suggest(row.selection.output, outputs)}"
    for count in (row.selection.count, row.selection.group_count):
        if isinstance(count, str) and count not in row.landmarks[0]:
            yield f"selection: landmarks lack {count!r}{suggest(count, row.landmarks[0])}"


def steps(row: "Contract") -> Iterator[str]:
    """What is carried from step to step is an output that becomes an input."""
    if row.recurrence is None:
        return
    if row.recurrence.steps not in row.landmarks[0]:
        yield f"recurrence: landmarks lack {row.recurrence.steps!r}"
    for name, output in row.recurrence.carried.items():
        for what, members, each in (("input", row.inputs, name), ("output", row.outputs, output)):
            if each not in [spec.name for spec in members]:
                yield f"recurrence: no {what} {each!r}{suggest(each, [spec.name for spec in members])}"


def values(row: "Contract") -> Iterator[str]:
    """Numbers and dtypes that can be."""
    if not row.cases > 0:
        yield f"cases: expected a positive number, got {row.cases!r}"
    for dtype in row.dtypes:
        if dtype not in DTYPES:
            yield f"dtypes: unknown dtype {dtype!r}{suggest(dtype, DTYPES)}"
    arguments = [each.name for each in row.inputs]
    for trait in row.traits:
        for argument in trait.dtypes:
            if argument.partition("/")[0] not in arguments:
                yield f"traits[{trait.name!r}]: no input {argument!r}{suggest(argument, arguments)}"


def classes(row: "Contract") -> Iterator[str]:
    """Every factor can be read from every landmark."""
    for factor, (number, point) in itertools.product(row.factors, enumerate(row.landmarks)):
        try:
            factor.class_of(point)
        except Exception as error:
            yield f"factors[{factor.name!r}]: cannot be read from landmarks[{number}]: {type(error).__name__}: {error}"
    valued = any(each.values for each in row.factors)
    if valued and row.build is None:
        yield "build: expected a function that makes parameters of the factors' values, got None"
    if not valued and row.parameters is None:
        yield "parameters: expected a strategy, or factors with values, got None"


def rejections(row: "Contract") -> Iterator[str]:
    """What a bad call's error must name is something that the caller gave, or something inside of it."""
    for rejection in row.rejections:
        if not all(rejection.names):
            yield f"rejections[{rejection.name!r}]: expected what the error must name, got {rejection.argument!r}"


def exceptions(row: "Contract") -> Iterator[str]:
    """Properties that do not apply are properties."""
    for name, reason in row.without.items():
        if name not in property_names():
            yield f"without: no property {name!r}{suggest(name, property_names())}"
        if not reason.strip():
            yield f"without[{name!r}]: expected the reason, got {reason!r}"
