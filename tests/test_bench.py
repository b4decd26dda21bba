"""The bench: a row for every competitor, wrong results flagged, nothing measured never green."""

import argparse
import json
from functools import partial

import pytest

from gaugeblock.conformance.bench import command
from gaugeblock.conformance.bench.command import Effort, Row, bench, exit_status, render, select
from gaugeblock.conformance.bench.competitors import Competitor, competitors
from gaugeblock.conformance.bench.problem import FULL, QUICK, Problem, Results, Unavailable, scaled
from gaugeblock.conformance.bench.roofline import Machine, this_machine
from gaugeblock.conformance.contract import Contract, Cost, Workload
from gaugeblock.conformance.frameworks import call_torch
from gaugeblock.conformance.registry import RegistrationError, find_contract

MACHINE = Machine("a machine", "cpu", "float32", flops=1e11, bytes=1e10)
BRIEF = Effort(QUICK, seconds=0.01)
ROUTER = find_contract("routers.softmax_topk")


def tiny(contract: Contract) -> Workload:
    return Workload(
        "tiny", contract.landmarks[1], "a landmark of sizes that grouped_mm takes: multiples of 16 bytes"
    )


def bench_router(*competing: Competitor) -> list[Row]:
    return bench(ROUTER, tiny(ROUTER), "forward", competing, MACHINE, BRIEF)


def scaled_results(factor: float, problem: Problem):
    def call() -> Results:
        results = call_torch(problem.contract, problem.contract.reference, problem.call)
        return {key: (factor * each).to(each.dtype) for key, each in results.items()}

    return call


def not_installed(problem: Problem):
    raise ModuleNotFoundError("No module named 'absent'")


def too_large(problem: Problem):
    raise Unavailable("copies 51 GiB of weights, 6 GiB allowed")


RIGHT = Competitor("right", partial(scaled_results, 1.0))
WRONG = Competitor("wrong", partial(scaled_results, 1.01))


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("routers.softmax_topk", "forward"),
        ("routers.grouped_sigmoid_topk", "backward"),
        ("experts.fused_swiglu", "backward"),
    ],
)
def test_every_competitor_is_measured_or_tells_why_not(name, direction):
    contract = find_contract(name)
    competing = competitors(contract)
    table = bench(contract, tiny(contract), direction, competing, MACHINE, BRIEF)
    assert sorted(row.implementation for row in table) == sorted(each.name for each in competing)
    assert {row.implementation for row in table if row.reason} <= {"triton", "transformers, identity gate"}
    assert all(row.roofline or row.reason for row in table)
    assert exit_status(table) == command.MEASURED


def test_wrong_results_are_flagged_and_not_timed():
    right, wrong = bench_router(WRONG, RIGHT)
    assert (right.implementation, wrong.implementation) == ("right", "wrong")
    assert wrong.roofline is None and wrong.reason.startswith("WRONG")
    assert exit_status([right, wrong]) == command.WRONG_RESULTS


def test_a_competitor_that_cannot_run_has_a_one_line_reason():
    table = bench_router(Competitor("absent", not_installed), Competitor("large", too_large), RIGHT)
    lines = render(table).splitlines()
    assert lines[2].startswith("right")
    assert "not installed: No module named 'absent'" in render(table) and "51 GiB" in render(table)
    assert len(lines) == 2 + len(table)


def test_nothing_measured_is_no_success():
    assert exit_status([]) == command.NOTHING_MEASURED
    assert exit_status(bench_router(Competitor("absent", not_installed))) == command.NOTHING_MEASURED


def test_the_table_is_sorted_by_distance_from_the_roofline():
    rows = bench_router(RIGHT, Competitor("again", RIGHT.prepare))
    assert [row.roofline for row in rows] == sorted(row.roofline for row in rows)
    assert rows[0].roofline == pytest.approx(
        rows[0].median / MACHINE.seconds(ROUTER.cost(tiny(ROUTER).parameters, itemsize=4))
    )


def test_roofline_time_is_that_of_the_slower_ceiling():
    assert MACHINE.seconds(Cost(flops=2e11, bytes=1e9)) == 2.0
    assert MACHINE.seconds(Cost(flops=1e9, bytes=3e10)) == 3.0


def test_ceilings_are_kept_and_only_rise(tmp_path, monkeypatch):
    monkeypatch.setattr("gaugeblock.conformance.bench.roofline.SECONDS", 0.05)
    cache = tmp_path / "cache" / "ceilings.json"
    machine = this_machine(cache)
    assert machine.flops > 1e8 and machine.bytes > 1e8
    known = json.loads(cache.read_text())
    (key,) = known
    cache.write_text(json.dumps({key: known[key] | {"flops": 1e20}}))
    assert this_machine(cache).flops == 1e20


def test_workloads_are_scaled_by_a_named_factor():
    contract = find_contract("experts.fused_swiglu")
    workload = next(each for each in contract.workloads if each.name == "mixtral-8x7b/prefill-4096")
    parameters, scale = scaled(contract, workload, FULL, "float32")
    assert scale == "num_tokens 1/8, widths 1/4"
    assert parameters["hidden_size"] == 1024 and parameters["num_experts"] == 8
    assert contract.cost(parameters, 4).flops <= FULL.flops


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="mixtral-8x7b/decode-64"):
        list(select([], ["mixtral-8x7b/decode"]))
    with pytest.raises(RegistrationError, match=r"routers\.softmax_topk"):
        list(select(["routers.softmax"], []))


def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "this_machine", lambda: MACHINE)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)  # it would last as long as the process
    monkeypatch.setattr(command, "competitors", lambda contract: [RIGHT])
    options = argparse.Namespace(
        contract=[ROUTER.name],
        workload=["qwen3-30b-a3b/decode-64"],
        direction="forward",
        quick=True,
        json=tmp_path / "bench.json",
    )
    assert command.main(options) == command.MEASURED
    assert "qwen3-30b-a3b/decode-64 (full size), forward" in capsys.readouterr().out
    (row,) = json.loads(options.json.read_text())["rows"]
    assert row["implementation"] == "right" and row["roofline"] > 0
