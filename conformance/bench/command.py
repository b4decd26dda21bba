"""The command `gaugeblock bench`: a table for each workload and direction, fastest first."""

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatch

from tabulate import tabulate

from gaugeblock.conformance.bench import decoding
from gaugeblock.conformance.bench.competitors import Competitor, competitors
from gaugeblock.conformance.bench.history import DECODED
from gaugeblock.conformance.bench.problem import FULL, QUICK, Direction, directions
from gaugeblock.conformance.bench.roofline import this_machine
from gaugeblock.conformance.bench.rows import CounterRow, Effort, Row, bench, count_calls
from gaugeblock.conformance.bench.timing import keep_freed_memory
from gaugeblock.conformance.engine.contract import Contract, Workload
from gaugeblock.conformance.engine.devices import interpret_without_gpu
from gaugeblock.conformance.engine.registry import contracts, find_contract, load_candidates, load_entry_points
from gaugeblock.conformance.engine.suggestion import suggest
from gaugeblock.conformance.peers.competitors import OUTSIDERS

MEASURED, WRONG_RESULTS, NOTHING_MEASURED = 0, 1, 3
DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "both": ("forward", "backward"),
}
TITLES = {"forward": "forward", "backward": "forward + backward"}
HEADERS = ("implementation", "× roofline", "ms", "best ms", "TFLOP/s", "GB/s", "peak MB", "deviation", "samples", "")
COLUMNS = ("left", *["right"] * 8, "left")
COUNTER_HEADERS = (
    "implementation",
    "MB allocated",
    "peak MB",
    "saved MB",
    "operations",
    "kernels",
    "collectives",
    "B sent/example",
    "",
)
COUNTER_COLUMNS = ("left", *["right"] * 7, "left")


def main(options: argparse.Namespace) -> int:
    """Prints the tables that the options ask for.

    Returns:
        0; 1 if a competitor's results are wrong; 3 if nothing was measured.

    Raises:
        ValueError: If a contract, workload or candidate is unknown or wrong.
    """
    interpret_without_gpu()  # before any candidate imports triton
    load_entry_points()
    own = {each.contract for source in options.candidates for each in load_candidates(source)}
    if options.seconds is not None and (options.against or options.asv):
        raise ValueError("--seconds bounds the tables; it cannot be had with --against or --asv, which measure all or nothing")
    if options.history is not None and not options.asv:
        raise ValueError("--history N must come with --asv DIR, where the results are kept")
    if options.against:
        from gaugeblock.conformance.bench.against import main as against

        return against(options)
    if options.asv:
        from gaugeblock.conformance.bench.asv_results import main as write_asv_results

        return write_asv_results(options)

    until = math.inf if options.seconds is None else time.monotonic() + options.seconds
    effort = Effort(QUICK, 0.3) if options.quick else Effort(FULL, 3.0)
    selected = list(select(options.contract or sorted(own), options.workload))
    machines = {contract.name: this_machine(contract.dtypes, quick=options.quick) for contract, _ in selected}
    for machine in set(machines.values()):
        print(machine.name)
        print(f"ceilings: {machine.flops / 1e9:.0f} GFLOP/s ({machine.dtype}), {machine.bytes / 1e9:.1f} GB/s")
    if keep_freed_memory():
        print("malloc keeps freed memory: page faults of fresh memory are not timed")

    rows: list[Row] = []
    decoded: list[decoding.DecodingRow] = []
    counted: dict[tuple[str, Direction], list[CounterRow]] = {}
    asked = [(each, workload, direction) for each, workload in selected for direction in DIRECTIONS[options.direction]]
    for number, (contract, workload, direction) in enumerate(asked):
        competing, machine = list(chosen(contract, options.implementation)), machines[contract.name]
        if direction not in directions(contract) or not competing:
            continue
        effort = replace(effort, until=share(until, len(asked) - number))
        table = bench(contract, workload, direction, competing, machine, effort)
        print(f"\n{contract.name}, {workload.name} ({table[0].scale}), {TITLES[direction]}")
        print(render(table))
        if told := beside_peers(contract, table):
            print(told)
        rows += table
        if contract.name == DECODED and direction == "forward":
            told_by_passes = decoding.decode(contract, workload, competing, machine, effort)
            print(f"\n{contract.name}, {workload.name}, decoding: {decoding.BLOCKS} blocks after the past")
            print(decoding.render(told_by_passes))
            decoded += told_by_passes
        if options.counters and (contract.name, direction) not in counted:
            counted[contract.name, direction] = count_calls(contract, direction, competing, machine, until)
            print(f"\n{contract.name}, first landmark, {TITLES[direction]}")
            print(render_counters(counted[contract.name, direction]))
    if options.json:
        document = {
            "machines": [asdict(each) for each in set(machines.values())],
            "rows": [asdict(row) for row in rows],
            "decoding": [asdict(row) for row in decoded],
            "counters": [row.to_json() for table in counted.values() for row in table],
        }
        options.json.write_text(json.dumps(document, indent=1))
    return exit_status([*rows, *decoded], (row for table in counted.values() for row in table))


def select(contract_names: Sequence[str], workload_names: Sequence[str]) -> Iterator[tuple[Contract, Workload]]:
    """The workloads asked for, by names or globs; none asks for all.

    Raises:
        ValueError: If a name fits none; the nearest is suggested.
    """
    named = [find_contract(name) for name in contract_names] or list(contracts().values())
    known = {workload.name for contract in named for workload in contract.workloads}
    for name in workload_names:
        if not any(fnmatch(each, name) for each in known):
            raise ValueError(f"unknown workload {name!r}{suggest(name, sorted(known))}")
    for contract in named:
        for workload in contract.workloads:
            if not workload_names or any(fnmatch(workload.name, name) for name in workload_names):
                yield contract, workload


def share(until: float, tables: int) -> float:
    """The end of the time of the first of several tables, which share what is left."""
    now = time.monotonic()
    return now + (until - now) / tables


def chosen(contract: Contract, patterns: Sequence[str]) -> Iterator[Competitor]:
    """The contract's competitors whose names fit a pattern; no pattern keeps all."""
    return (each for each in competitors(contract) if not patterns or any(fnmatch(each.name, name) for name in patterns))


def exit_status(rows: Iterable[Row | decoding.DecodingRow], counted: Iterable[CounterRow] = ()) -> int:
    """0 if all that was measured was right."""
    statuses = {row.status for row in rows}
    if "wrong" in statuses:
        return WRONG_RESULTS
    return MEASURED if "measured" in statuses | {row.status for row in counted} else NOTHING_MEASURED


def beside_peers(contract: Contract, rows: Sequence[Row]) -> str:
    """The time of the fastest of ours over that of the fastest public library; nothing where one of the two has none."""
    times = {row.implementation: row.median for row in rows if row.median is not None}  # fastest first
    peers = [name for name in times if name in OUTSIDERS.get(contract.name, ())]
    ours = [name for name in times if name not in peers]
    if not peers or not ours:
        return ""
    return f"the fastest of ours over the fastest peer: {times[ours[0]] / times[peers[0]]:.2f} ({ours[0]}, {peers[0]})"


def render(rows: Iterable[Row]) -> str:
    """The table as text; what did not take part stands below, with the reason."""
    return tabulate([_cells(row) for row in rows], headers=HEADERS, disable_numparse=True, colalign=COLUMNS)


def render_counters(rows: Iterable[CounterRow]) -> str:
    """The counters as text."""
    table = [[row.implementation, *_counts(row), row.reason] for row in rows]
    return tabulate(table, headers=COUNTER_HEADERS, disable_numparse=True, colalign=COUNTER_COLUMNS)


def _cells(row: Row) -> list[str]:
    taken, quiet = row.samples
    numbers = [
        _number(row.roofline, 1, ".2f"),
        _number(row.median, 1e3, ".3g"),
        _number(row.best, 1e3, ".3g"),
        _number(row.flops_per_second, 1e-12, ".3f"),
        _number(row.bytes_per_second, 1e-9, ".1f"),
        _number(row.peak_bytes, 1e-6, ".1f"),
        _number(row.deviation, 1, ".0e"),
        "" if not taken else str(taken) if taken == quiet else f"{taken}, {quiet} quiet",
    ]
    return [row.implementation, *numbers, row.reason]


def _counts(row: CounterRow) -> list[str]:
    if row.counters is None:
        return [""] * 7
    return [
        _number(row.counters.bytes_allocated, 1e-6, ".3f"),
        _number(row.counters.peak_bytes, 1e-6, ".3f"),
        _number(row.counters.saved_bytes, 1e-6, ".3f"),
        _number(row.counters.operations, 1, "d"),
        _number(row.counters.kernels, 1, "d"),
        _number(row.counters.collectives, 1, "d"),
        _number(row.counters.sent_bytes, 1, ".0f"),
    ]


def _number(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value * unit, form)
