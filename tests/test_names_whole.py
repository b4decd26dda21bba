"""No table cuts a name off or breaks it, however narrow the terminal, and where there is none."""

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from gaugeblock.conformance import cli
from gaugeblock.conformance.bench import command as bench
from gaugeblock.conformance.bench.rows import Row
from gaugeblock.conformance.engine.judging.verdict import Verdict
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import contracts, implementations
from gaugeblock.conformance.report import compare, tables, terminal
from gaugeblock.conformance.selftest import command as selftest
from gaugeblock.conformance.selftest import machines
from tests.synthetic_report import contract_names, verdicts

WIDTHS = (60, 80, 200)
LONG = "a_kernel_of_a_vendor_who_likes_names_that_are_wide_and_tell_it_all_v2"


def printed(width: int, show: Callable[[Console], object]) -> str:
    """What is written to a file by a program whose terminal would have that width."""
    file = io.StringIO()
    show(Console(file=file, width=width, highlight=False))
    return file.getvalue()


def missing(text: str, names: Iterable[str]) -> list[str]:
    """Names that do not stand there in one piece; an ellipsis counts as one."""
    return [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)] + ["…"] * ("…" in text)


def too_long(text: str, width: int) -> list[str]:
    """Lines that the terminal would break, though they hold more than one word."""
    return [line for line in text.splitlines() if len(line) > width and len(line.split()) > 1]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_catalogue(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    found = [each.name for name in contracts() for each in implementations(name) if each.kind != "reference"]
    assert missing(text, [*contracts(), *found]) == [] and too_long(text, width) == []
    blocks = text.split("\n\n")
    assert all(missing(block, contracts()) == [] for block in blocks), "each block names the contracts"
    assert (len(blocks) == 1) == (width == 200)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("contract", ["routers.softmax_topk", "dit.dit", "layers.gated_residual_layer_norm_modulate"])
def test_what_a_contract_demands(width, contract, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["explain", contract]) == 0
    text, row = capsys.readouterr().out, contracts()[contract]
    named = [*row.inputs, *row.outputs, *row.regimes, *row.workloads, *implementations(contract)]
    assert missing(text, [*(each.name for each in named), *(name for name in properties() if name not in row.without)]) == []
    assert too_long(text.partition("\n")[2], width) == [], "all but the signature, which is to be copied"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("number", [2, 9])
def test_overview_and_matrices(width, verbose, number):
    found = [each for each in verdicts(number) if each.property in ("parity", "permutation_equivariance", "races")]
    found += [replace(each, implementation=LONG) for each in found if each.implementation == "mychip"]
    text = printed(width, lambda console: terminal.print_matrix(found, console, verbose=verbose))
    implementations = {each.implementation for each in found} - ({LONG} if width == 60 else set())  # too long for a line
    assert missing(text, [*contract_names(number), *implementations]) == []
    assert LONG in text
    table = text.partition("✓ pass")[0]
    assert [line for line in too_long(table, width) if LONG not in line] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_two_runs_compared(width):
    before = verdicts(3, broken=0)
    drift = [
        replace(each, statistics={name: replace(one, max=3.0) for name, one in each.statistics.items()}) for each in before[:9]
    ]
    after = [replace(each, status="fail", reason="worse", fingerprints={"Case(...)": "b"}) for each in drift]
    runs = [{"verdicts": [each.to_json() for each in run]} for run in (before, after)]
    found = compare.compare(*runs)
    text = printed(width, lambda console: compare.print_comparison(found, console))
    names = {each.identity for each in [*found.newly_failing, *found.disappeared[: compare.SHOWN]]}
    assert found.drifts and missing(text, names | {each.identity for each in found.drifts[: compare.SHOWN]}) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_machines_side_by_side(width):
    def run(machine: machines.Machine, status: str) -> machines.Run:
        return machines.Run(machine, {"routers.softmax_topk/mychip/parity/float32/cpu": status}, 0, 1.0, judged=1234)  # type: ignore[dict-item]

    runs = [run(each, "pass" if each.name != "sse4" else "fail") for each in machines.MACHINES]
    text = printed(width, lambda console: machines.print_runs(runs, machines.differences(runs), console))
    assert missing(text, [*(each.name for each in machines.MACHINES), "routers.softmax_topk", "mychip"]) == []
    assert too_long(text.partition("\n\nrouters")[0], width) == []
    assert "pass on this, haswell-blas" in text and "fail on sse4" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_rates_of_the_suite(width):
    plain = ("torch.testing.assert_close", "allclose(atol=rtol=1e-2)")
    counts = {"faults": 9, "killed": 9, "median_examples": 1, "most_examples": 7, "plain": dict.fromkeys(plain, 5)}
    names = ("drops_the_last_row_of_a_tile", *properties())
    rates = {
        "kill": counts | {"by_kind": dict.fromkeys(names, counts), "by_property": {"parity": counts}, "survivors": []},
        "false_alarms": {"judged": 10, "alarms": [], "at_most_with_95_percent": None, "plain": dict.fromkeys(plain, 3)},
        "vacuity": {"judged": 10, "passed": [], "coincidences": 1},
        "corners": {"planted": {"classes": 2}, "caught": {"classes": 2}, "survivors": []},
        "shrinking": {"known_minima": 1, "at_the_minimum": 1, "within_twice": 1},
        "reproduction": {"scripts": 1, "fail_again": 1, "do_not": []},
        "hostile": {"candidates": 1, "as_expected": 1, "not": []},
        "seconds": 1.0,
    }
    text = printed(width, lambda console: selftest.print_rates(rates, [SimpleNamespace(kind="a")], console))
    assert missing(text, [*names, *plain, "gaugeblock"]) == []


def test_rows_of_a_benchmark_begin_with_whole_names():
    row = Row("routers.softmax_topk", "qwen3-30b-a3b/decode-64", "", "forward", LONG, roofline=1.5, reason="measured by " + LONG)
    assert bench.render([row]).splitlines()[2].startswith(f"{LONG} ") and f"by {LONG}" in bench.render([row])


def test_columns_that_do_not_fit_are_told_in_parts():
    rows = [["routers.softmax_topk", "a\nbb", "1"], ["x", "c", "22"]]
    assert printed(
        80, lambda console: tables.print_columns(console, ["contract", "name", "n"], rows, right=[2])
    ).splitlines() == [
        "contract               name    n",
        "routers.softmax_topk   a       1",
        "                       bb",
        "x                      c      22",
    ]
    assert printed(28, lambda console: tables.print_columns(console, ["contract", "name", "n"], rows)).splitlines() == [
        "contract               name", "routers.softmax_topk   a", "                       bb", "x                      c", "",
        "contract               n", "routers.softmax_topk   1", "x                      22",
    ]  # fmt: skip
    assert printed(20, lambda console: tables.print_columns(console, ["contract", "name", "n"], rows)).splitlines() == [
        "contract", "  name   n", "routers.softmax_topk", "  a      1", "  bb", "x", "  c      22",
    ]  # fmt: skip


def test_control_characters_stay_out_of_tables():
    text = printed(80, lambda console: tables.print_columns(console, ["a", "b"], [["x\x1b[31m", "\x07"]]))
    assert "\x1b" not in text and "\x07" not in text and r"x\x1b[31m" in text


def test_many_contracts_get_a_line_each_and_matrices_only_where_something_is_wrong():
    found = verdicts(20, broken=0.05)
    text = printed(200, lambda console: terminal.print_matrix(found, console))
    lines = text.splitlines()
    assert all(sum(name in line.split() for line in lines[:22]) == 1 for name in contract_names(20))
    quiet = [name for name in contract_names(20) if all(each.status in ("pass", "not supported") for each in of(found, name))]
    shown = [name for name in contract_names(20) if any(line == name or line.startswith(f"{name}  1 of") for line in lines)]
    assert sorted([*quiet, *shown]) == sorted(contract_names(20)) and quiet and shown
    assert f"... and {len(quiet)} more matrices" in text
    whole = printed(200, lambda console: terminal.print_matrix(found, console, verbose=True)).splitlines()
    assert all(any(line == name or line.startswith(f"{name}  1 of") for line in whole) for name in contract_names(20))
    few = printed(200, lambda console: terminal.print_matrix(of(found, quiet[0]), console)).splitlines()
    assert any(line == quiet[0] or line.startswith(f"{quiet[0]}  1 of") for line in few), "one contract is shown whole"


def of(found: list[Verdict], contract: str) -> list[Verdict]:
    return [each for each in found if each.contract == contract]


def test_what_applied_to_nothing_and_what_was_kept_are_said_quietly():
    found = [each for each in verdicts(2) if each.implementation == "mychip"]
    for each in found:
        vars(each)["kept"] = {"date": "2026-11-20", "commit": "abc1234"}
    text = printed(80, lambda console: terminal.print_matrix(found, console))
    assert "applied to nothing here: masked_lanes, path_witness, program_order, races\n" in text
    assert "° not judged again: all kept of 2026-11-20, commit abc1234\n" in text
