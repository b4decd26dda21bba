"""What exists: contracts, who fulfils them, and what a contract demands."""

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text
from tabulate import tabulate

from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime
from gaugeblock.conformance.engine.factors import ORDINARY
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.bad_calls import bad_calls
from gaugeblock.conformance.engine.inputs.coverage import Demand, array, measure, space
from gaugeblock.conformance.engine.registry import builtin_implementations, contracts, implementations
from gaugeblock.conformance.report.tables import print_columns, print_entries, print_line, print_paragraph
from gaugeblock.conformance.report.view import printable

if TYPE_CHECKING:
    from gaugeblock.conformance.engine.trial import Property

KINDS = ("triton", "distributed", "jax", "compiled", "user")
MARKED = re.compile(r"(?<=<!-- catalogue:begin -->\n).*?(?=<!-- catalogue:end -->)", re.DOTALL)
NONE = "–"


def list_json(properties: Sequence[str]) -> list[dict[str, Any]]:
    """One object for each contract.

    Args:
        properties: The names of all properties; a contract lists those that it does not exclude.
    """
    return [
        {
            "contract": row.name,
            "references": [each.framework for each in implementations(row.name) if each.kind == "reference"],
            "implementations": [
                {"name": each.name, "framework": each.framework, "kind": each.kind}
                for each in implementations(row.name)
                if each.kind != "reference"
            ],
            "properties": [name for name in properties if name not in row.without],
            "workloads": [each.name for each in row.workloads],
        }
        for row in contracts().values()
    ]


def catalogue_rows(rows_of: Callable[[Contract], Sequence[Implementation]]) -> list[list[str]]:
    """A row for each contract: its name, the frameworks of its references, and names of implementations by kind."""
    rows = []
    for contract in contracts().values():
        found = rows_of(contract)
        references: list[str] = [each.framework for each in found if each.kind == "reference"]
        by_kind = [[each.name for each in found if each.kind == kind] for kind in KINDS]
        rows.append([contract.name, *(", ".join(names) or NONE for names in [references, *by_kind])])
    return rows


def print_catalogue(console: Console) -> None:
    """Prints contracts × kinds of implementations, registered ones among them; a dash is what is missing."""
    columns = [*zip(*catalogue_rows(lambda contract: implementations(contract.name)), strict=True)]
    titles = ["contract", "references", *KINDS]
    if set(columns[-1]) == {NONE}:  # nobody's: those that are missing are ours to write
        titles, columns = titles[:-1], columns[:-1]
    names = [Text(printable(name), "bold") for name in columns[0]]
    cells = [_in_lines(column, title) for column, title in zip(columns[1:], titles[1:], strict=True)]
    print_columns(console, [Text(each, "dim") for each in titles], [*zip(names, *cells, strict=True)])


def _in_lines(column: Sequence[str], title: str) -> list[Text]:
    """Cells of several names in as many lines as a column as wide as the longest name demands."""
    names = [name for cell in column for name in cell.split(", ")]
    width = max(len("torch, jax"), len(title), 1 + max(map(len, names)))
    filled = [textwrap.fill(printable(cell), width, break_long_words=False, break_on_hyphens=False) for cell in column]
    return [Text(cell, "dim" if cell == NONE else "") for cell in filled]


def markdown_table() -> str:
    """The built-in catalogue as a table for the README."""
    rows = [[f"`{row[0]}`", *row[1:-1]] for row in catalogue_rows(builtin_implementations)]
    return tabulate(rows, ["contract", "references", *KINDS[:-1]], tablefmt="github")


def update_readme(text: str) -> str:
    """The README's text with the table between its markers made anew.

    Raises:
        ValueError: If the markers `<!-- catalogue:begin -->` and `<!-- catalogue:end -->` are missing.
    """
    if not MARKED.search(text):
        raise ValueError("no lines <!-- catalogue:begin --> and <!-- catalogue:end -->")
    return MARKED.sub(lambda _: f"\n{markdown_table()}\n\n", text, count=1)


def readme_is_current(path: Path) -> bool:
    """Whether the table in the README is the one that `update_readme` would write there."""
    text = path.read_text(encoding="utf-8")
    return text == update_readme(text)


def explain(contract: Contract, properties: Sequence["Property"], console: Console) -> None:
    """Prints what a contract demands, in the order in which someone who writes an implementation asks."""
    print_line(console, Text(contract.signature, "bold"))
    print_paragraph(console, "", contract.summary)
    console.print()
    _section("formula", [contract.formula], console)
    _section("source", [contract.source], console)
    _table("inputs", [_row_of(each) for each in contract.inputs], console)
    _table("outputs", [_row_of(each) for each in contract.outputs], console)
    _section("how outputs are judged", _how_judged(contract), console)
    _section("sizes and options", _sizes(contract), console)
    _table("what a kernel may treat in different ways, and cases cover", _classes(contract), console)
    _table(
        "kinds of values",
        [[each.name, _judged(each), _first_line(each.make)] for each in contract.regimes],
        console,
    )
    applying = [
        [each.name, _applies_to(each), each.statement, _due(contract, each)]
        for each in properties
        if each.name not in contract.without
    ]
    _table("properties", applying, console)
    _table("properties that do not apply", [[name, reason] for name, reason in contract.without.items()], console)
    _table(
        "must be rejected with ValueError or TypeError",
        [[each.name, f"naming {' or '.join(each.names)}"] for each in bad_calls(contract, contract.landmarks[0])],
        console,
    )
    workloads = [[each.name, _parameters(each.parameters), each.source] for each in contract.workloads]
    _table("workloads", workloads, console)
    _table("how tensors may lie over ranks, what is not split being whole on each", _shardings(contract), console)
    claimed = [
        [each.name, each.kind, each.framework, ", ".join(each.dtypes), ", ".join(each.devices), each.rounding]
        for each in implementations(contract.name)
    ]
    _table("implementations", claimed, console)


def _shardings(contract: Contract) -> list[list[str]]:
    shares = {"even": "split evenly", "uneven": "split, evenly or not"}
    return [
        [name, ", ".join(f"{dimension}: {shares.get(str(share), share)}" for dimension, share in sharding.items())]
        for name, sharding in contract.shardings.items()
    ]


def _section(title: str, lines: Sequence[str], console: Console) -> None:
    console.print(Text(title, "bold"))
    for line in lines:
        text = line.lstrip()
        print_paragraph(console, " " * (2 + len(line) - len(text)), printable(text))
    console.print()


def _table(title: str, rows: Sequence[Sequence[str]], console: Console) -> None:
    if not rows:
        return
    console.print(Text(title, "bold"))
    print_entries(console, rows)
    console.print()


def _row_of(spec: Input | Output) -> list[str]:
    dtype = "dtype under test" if spec.dtype == "tested" else spec.dtype
    remarks = [
        *(["differentiable"] if spec.differentiable else []),
        *([f"indexes {spec.indexes}"] if spec.indexes else []),
    ]
    shape = "a dict of tensors" if spec.leaves else f"[{', '.join(map(str, spec.shape))}]"
    return [spec.name, shape, dtype, ", ".join(remarks)]


def _how_judged(contract: Contract) -> list[str]:
    def regimes(judged: str) -> str:
        return ", ".join(each.name for each in contract.regimes if each.judged == judged) or "none"

    chosen = [spec for spec in contract.outputs if spec.indexes]
    values = [spec.name for spec in contract.outputs if not spec.indexes]
    flowing = contract.gradients
    smooth = ", ".join(each.name for each in contract.regimes if each.differentiable)
    one_by_one = contract.selection is not None and contract.selection.one_by_one
    order = "chosen one after the other" if one_by_one else "sorted by descending score"
    lines = [
        f"{spec.name}: distinct, in range of {spec.indexes}, {order}, and such that the float64 scores "
        "and their error allow the choice; the other outputs are judged at this choice."
        for spec in chosen
    ]
    if values:
        lines += [
            f"{', '.join(values)}: against the reference run in float64, in units of the error budget, which is the spread of "
            "that reference under rounding noise.",
            f"  max, rms and bias in: {regimes('budget')}; max alone in: {regimes('worst element')}; "
            f"bit for bit in: {regimes('exact')}.",
        ]
    if flowing:
        lines.append(f"gradients of {', '.join(flowing)}: the same, through a random cotangent, in: {smooth}.")
    return lines


def _sizes(contract: Contract) -> list[str]:
    drawn = inspect.getdoc(contract.parameters) or ""
    return [
        *([drawn] if drawn else []),
        "always visited:",
        *(f"  {_parameters(each)}" for each in contract.landmarks),
    ]


def _classes(contract: Contract) -> list[list[str]]:
    """A row for each factor: its name and its classes."""
    traits = dict.fromkeys(trait.factor for trait in contract.traits)
    named = [[ORDINARY, *(trait.name for trait in contract.traits if trait.factor == factor)] for factor in traits]
    places = range(len(contract.factors))
    classes = [dict.fromkeys(space(contract).classes(case)[place] for case in array(contract, 2)) for place in places]
    rows = [
        (factor.name, dict.fromkeys((*map(factor.classify, factor.values), *seen)))
        for factor, seen in zip(contract.factors, classes, strict=True)
    ]
    return [[name, "; ".join(each)] for name, each in (*rows, *zip(traits, named, strict=True))]


def _due(contract: Contract, prop: "Property") -> str:
    """What a candidate's cases visit."""
    demand = Demand(prop.covers, layouts=prop.layouts)
    coverage = measure(contract, (), demand, sparing=False)
    return "" if coverage is None else f"visits {coverage.due} {coverage.of}"


def _parameters(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def _judged(regime: Regime) -> str:
    how = {"budget": "max, rms, bias", "worst element": "max", "exact": "bit for bit"}[regime.judged]
    return how if regime.differentiable else f"{how}; no gradients"


def _applies_to(prop: "Property") -> str:
    limits = [
        *(f"if {claim}" for claim in prop.needs),
        *([f"only {', '.join(prop.frameworks)}"] if len(prop.frameworks) == 1 else []),
        *([f"only kind {', '.join(prop.kinds)}"] if prop.kinds else []),
        *([f"only on {', '.join(prop.devices)}"] if len(prop.devices) == 1 else []),
    ]
    return "; ".join(limits)


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
