"""The bench: a row for every competitor, wrong results flagged, nothing measured never green."""

import argparse
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import pytest

from gaugeblock.conformance import cli
from gaugeblock.conformance.bench import against, command
from gaugeblock.conformance.bench.against import chance, is_slower
from gaugeblock.conformance.bench.command import exit_status, render, select
from gaugeblock.conformance.bench.competitors import Competitor, competitors
from gaugeblock.conformance.bench.problem import FULL, QUICK, Problem, Results, Unavailable, make_problem, scaled
from gaugeblock.conformance.bench.roofline import Machine, this_machine
from gaugeblock.conformance.bench.rows import Effort, Row, bench, count_calls
from gaugeblock.conformance.engine.contract import Contract, Cost, Workload
from gaugeblock.conformance.engine.frameworks import call_torch
from gaugeblock.conformance.engine.registry import RegistrationError, find_contract

MACHINE = Machine("a machine", "cpu", "float32", flops=1e11, bytes=1e10)
BRIEF = Effort(QUICK, seconds=0.01)
ROUTER = find_contract("routers.softmax_topk")
WORKLOAD = "qwen3-30b-a3b/decode-64"
ROOT = Path(__file__).parents[1]


def options_of(*arguments: str) -> argparse.Namespace:
    return cli._parser().parse_args(["bench", *arguments])


def tiny(contract: Contract) -> Workload:
    return Workload("tiny", contract.landmarks[1], "a landmark of sizes that grouped_mm takes: multiples of 16 bytes")


def bench_router(*competing: Competitor) -> list[Row]:
    return bench(ROUTER, tiny(ROUTER), "forward", competing, MACHINE, BRIEF)


def scaled_results(factor: float, problem: Problem):
    def call() -> Results:
        results = call_torch(problem.contract, problem.contract.reference, problem.call)
        return {key: (factor * each).to(each.dtype) for key, each in results.items()}

    return call


def not_installed(problem: Problem):
    raise ModuleNotFoundError("No module named 'absent'")


def as_it_is(problem: Problem):
    return partial(call_torch, problem.contract, problem.contract.reference, problem.call)


def too_large(problem: Problem):
    raise Unavailable("copies 51 GiB of weights, 6 GiB allowed")


RIGHT_AS_IT_IS = Competitor("as it is", as_it_is)
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
    assert {row.status for row in table} <= {"measured", "absent"}
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
    assert rows[0].roofline == pytest.approx(rows[0].median / MACHINE.seconds(ROUTER.cost(tiny(ROUTER).parameters, itemsize=4)))


def test_roofline_time_is_that_of_the_slower_ceiling():
    assert MACHINE.seconds(Cost(flops=2e11, bytes=1e9)) == 2.0
    assert MACHINE.seconds(Cost(flops=1e9, bytes=3e10)) == 3.0


def test_ceilings_are_kept_and_only_rise(tmp_path, monkeypatch):
    monkeypatch.setattr("gaugeblock.conformance.bench.roofline.SECONDS", 0.05)
    cache = tmp_path / "cache" / "ceilings.json"
    machine = this_machine(("float32",), cache)
    assert machine.flops > 1e8 and machine.bytes > 1e8
    known = json.loads(cache.read_text())
    (key,) = known
    cache.write_text(json.dumps({key: known[key] | {"flops": 1e20}}))
    assert this_machine(("float32",), cache).flops == 1e20
    assert this_machine(("float16", "float32"), cache, quick=True).dtype == "float32"


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
    monkeypatch.setattr(command, "this_machine", lambda dtypes, quick: MACHINE)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)  # it would last as long as the process
    monkeypatch.setattr(command, "competitors", lambda contract: [RIGHT])
    options = options_of("--contract", ROUTER.name, "--workload", WORKLOAD, "--direction", "forward", "--quick", "--counters")
    options.json = tmp_path / "bench.json"
    assert command.main(options) == command.MEASURED
    assert f"{WORKLOAD} (full size), forward" in capsys.readouterr().out
    document = json.loads(options.json.read_text())
    (row,), (counted,) = document["rows"], document["counters"]
    assert row["implementation"] == "right" and row["roofline"] > 0 and row["peak_bytes"] > 0
    assert counted["bytes_allocated"] >= counted["peak_bytes"] > 0 and counted["operations"] > 0


# ------------------------------------------------------------------------------------------------------------ counters


def counters_of(*names: str, contract: Contract = ROUTER, direction: str = "forward") -> list[dict]:
    competing = [each for each in competitors(contract) if each.name in names]
    rows = [row.to_json() for row in count_calls(contract, direction, competing, MACHINE)]
    assert [row["status"] for row in rows] == ["measured"] * len(names), rows
    return rows


def test_counters_are_the_same_every_time():
    names = ("reference", "reference-jax", "triton")
    assert counters_of(*names, direction="backward") == counters_of(*names, direction="backward")


def test_an_extra_copy_is_counted():
    def copying(problem: Problem):
        def route(router_logits, **options):
            return problem.contract.reference(router_logits.clone(), **options)

        return partial(call_torch, problem.contract, route, problem.call)

    plain, copied = count_calls(ROUTER, "forward", [RIGHT_AS_IT_IS, Competitor("copying", copying)], MACHINE)
    copy = 4 * ROUTER.landmarks[0]["num_tokens"] * ROUTER.landmarks[0]["num_experts"]
    assert copied.counters.bytes_allocated == plain.counters.bytes_allocated + copy
    assert copied.counters.operations > plain.counters.operations


def test_launches_of_interpreted_kernels_are_counted():
    (forward,), (both,) = counters_of("triton"), counters_of("triton", direction="backward")
    assert forward["kernels"] >= 1 and both["kernels"] > forward["kernels"]


def test_choices_in_another_order_do_not_deviate():
    problem = make_problem(ROUTER, ROUTER.landmarks[0], "forward", MACHINE)
    expected = problem.expected()
    assert problem.deviation({key: each.flip(-1) for key, each in expected.items()}, expected) == 0
    assert problem.deviation({key: each[:, :-1] for key, each in expected.items()}, expected) == float("inf")


# ------------------------------------------------------------------------------------------------- the gate against a revision

KERNELS = """
import time
import torch
from gaugeblock.conformance import implements

def route(router_logits, top_k, renormalize):
    topk_weights, topk_ids = torch.softmax(router_logits.float(), -1).topk(top_k)
    return (topk_weights / topk_weights.sum(-1, keepdim=True) if renormalize else topk_weights), topk_ids

@implements("routers.softmax_topk", name="steady")
def steady(router_logits, *, top_k, renormalize):
    return route(router_logits, top_k, renormalize)

@implements("routers.softmax_topk", name="slower")
def slower(router_logits, *, top_k, renormalize):
    {delay}
    return route(router_logits, top_k, renormalize)

@implements("routers.softmax_topk", name="greedy")
def greedy(router_logits, *, top_k, renormalize):
    return route(router_logits{copy}, top_k, renormalize)
"""
OWN = [text for name in ("steady", "slower", "greedy") for text in ("--implementation", name)]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A user's repository with one commit, its kernels in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "kernels.py").write_text(KERNELS.format(delay="pass", copy=""))
    for command_line in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "kernels"]):
        subprocess.run(["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *command_line], check=True)
    return tmp_path


def gate(*arguments: str) -> int:
    return against.main(
        options_of("kernels.py", "--against", "HEAD", "--workload", WORKLOAD, "--direction", "forward", *arguments)
    )


@pytest.mark.timeout(900)
def test_a_planted_delay_and_a_planted_copy_are_found_and_equal_code_is_not(repository, capsys):
    (repository / "kernels.py").write_text(KERNELS.format(delay="time.sleep(0.03)", copy=".clone()"))
    assert gate("--contract", ROUTER.name, *OWN) == against.WORSE
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if line.endswith("WORSE")]
    assert {name for line in lines for name in line if name in ("steady", "slower", "greedy")} == {"slower", "greedy"}, printed
    assert all("time" in line for line in lines if "slower" in line), printed
    assert {"bytes_allocated", "operations"} <= {word for line in lines if "greedy" in line for word in line}, printed


@pytest.mark.timeout(600)
def test_the_gate_says_when_there_was_nothing_to_compare(repository, monkeypatch, capsys):
    monkeypatch.setattr(against, "ROUNDS", 1)
    assert gate("--contract", ROUTER.name, "--implementation", "nobody") == against.NOTHING_COMPARED
    with pytest.raises(ValueError, match="unknown contract"):
        gate("--contract", "routers.nothing")
    with pytest.raises(ValueError, match="no-such-branch"):
        against.lay_out("no-such-branch", repository)


def test_a_new_failure_is_worse():
    row = {"contract": "c", "workload": "w", "direction": "forward", "implementation": "i", "reason": "WRONG"}
    before, after = against.Measured(), against.Measured()
    before.add({"rows": [row | {"status": "measured", "median": 1.0}], "counters": []})
    after.add({"rows": [row | {"status": "wrong", "median": None}], "counters": []})
    (change,) = against.compare(before, after)
    assert change.worse and "WRONG" in against.render([change])


def test_times_must_be_longer_by_ratio_and_difference_and_rank():
    steady = [1e-3, 1.01e-3, 0.99e-3, 1.02e-3, 0.98e-3]
    assert is_slower(steady, [1.3 * each for each in steady])
    assert not is_slower(steady, [1.05 * each for each in steady])  # the ratio
    assert not is_slower([1e-2 * each for each in steady], [1.5e-2 * each for each in steady])  # 5 us
    assert not is_slower(steady, [1.3e-3, 1.3e-3, 1.3e-3, 0.9e-3, 0.9e-3])  # the rank
    noisy = [1e-3, 2e-3, 0.5e-3, 1.5e-3, 0.7e-3]
    assert not is_slower(noisy, [1.2 * each for each in noisy])  # the revision's own spread


def test_the_rank_test_is_exact():
    assert chance([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(1 / 252)
    assert chance([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) < against.CHANCE < chance([1, 2, 3, 4, 6], [5, 7, 8, 9, 10])
    assert chance([1, 1, 1], [1, 1, 1]) == 1


def test_equal_times_are_hardly_ever_flagged_twice():
    generator = random.Random(0)

    def flagged() -> bool:
        before, after = ([generator.lognormvariate(-7, 0.1) for _ in range(against.ROUNDS)] for _ in range(2))
        return is_slower(before, after)

    assert sum(flagged() for _ in range(1000)) <= 10
    assert not any(flagged() and flagged() for _ in range(1000))


# ------------------------------------------------------------------------------------------------------- pytest-benchmark


@pytest.mark.timeout(300)
def test_pytest_benchmark_compares_a_kernel_with_the_others_before_and_after(repository):
    def run(*arguments: str) -> str:
        command_line = [sys.executable, "-m", "pytest", "-p", "gaugeblock.conformance.plugin", "-p", "no:cacheprovider"]
        chosen = ["--candidate", "kernels.py", "-k", f"{WORKLOAD}/forward and (steady or reference and not jax)"]
        least = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.01", "--override-ini=addopts="]
        everything = [*command_line, "--pyargs", "gaugeblock.conformance.bench.speed", *chosen, *least, *arguments]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        return subprocess.run(everything, capture_output=True, text=True, check=True, env=alone).stdout

    first = run("--benchmark-save=before")
    assert "2 passed" in first and f"'{ROUTER.name}/{WORKLOAD}/forward': 2 tests" in first
    second = run("--benchmark-compare")
    assert "4 tests" in second and "(0001_before)" in second
