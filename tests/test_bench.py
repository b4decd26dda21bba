"""The bench: a row for every competitor, wrong results flagged, nothing measured never green."""

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import pytest

from gaugeblock.conformance import cli
from gaugeblock.conformance.bench import command
from gaugeblock.conformance.bench.command import exit_status, render, select
from gaugeblock.conformance.bench.competitors import Competitor, JaxCall, competitors
from gaugeblock.conformance.bench.problem import FULL, QUICK, Problem, Results, Unavailable, make_problem, scaled
from gaugeblock.conformance.bench.roofline import Machine, this_machine
from gaugeblock.conformance.bench.rows import Effort, Row, bench, count_calls
from gaugeblock.conformance.engine.budget.oracle import GRADIENT
from gaugeblock.conformance.engine.contract import Contract, Cost, Workload
from gaugeblock.conformance.engine.frameworks import call_torch
from gaugeblock.conformance.engine.registry import RegistrationError, contracts, find_contract
from gaugeblock.conformance.peers.competitors import OUTSIDERS, PeerModel

MACHINE = Machine("a machine", "cpu", "float32", flops=1e11, bytes=1e10)
BRIEF = Effort(QUICK, seconds=0.01)
ROUTER = find_contract("routers.softmax_topk")
WORKLOAD = "qwen3-30b-a3b/decode-64"
ROOT = Path(__file__).parents[1]


def options_of(*arguments: str) -> argparse.Namespace:
    return cli.parser().parse_args(["bench", *arguments])


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


# ------------------------------------------------------------------------------------------------------ hopeless, and in time


def sleeping(seconds: float, problem: Problem):
    def call() -> Results:
        time.sleep(seconds)
        calls[problem.machine.name] += 1
        return call_torch(problem.contract, problem.contract.reference, problem.call)

    return call


calls: Counter[str] = Counter()


@pytest.fixture
def counted_calls() -> Iterator[Counter[str]]:
    """How often a sleeping competitor was called."""
    calls.clear()
    yield calls


def test_the_hopeless_are_timed_once_and_say_so(counted_calls):
    slow = Competitor("slow", partial(sleeping, 1.1))
    fast, hopeless = bench_router(slow, RIGHT)
    assert (fast.implementation, fast.reason) == ("right", "")
    assert hopeless.samples == (1, 0) and hopeless.median > 1.1 and hopeless.roofline > fast.roofline
    assert hopeless.reason.startswith("hopeless: ") and hopeless.reason.endswith(" times as long as right, so timed once")
    assert calls.total() == 2  # the first may have compiled what it called


def test_a_slow_first_call_alone_is_not_hopeless():
    def prepare(problem: Problem):
        call = as_it_is(problem)
        waits = [1.1]

        def first_slowly() -> Results:
            time.sleep(waits.pop() if waits else 0)
            return call()

        return first_slowly

    for row in bench_router(Competitor("compiles", prepare), RIGHT):
        assert row.reason == "" and row.median < 0.1


def test_a_program_that_does_many_times_the_work_comes_last_or_is_not_called(monkeypatch):
    contract = find_contract("experts.fused_swiglu")
    parameters = contract.landmarks[1] | {"num_tokens": 64, "num_experts": 32, "hidden_size": 128, "intermediate_size": 128}
    workload = Workload("many experts", parameters, "jax.lax.ragged_dot multiplies with all of them on a CPU")
    twin = next(each for each in competitors(contract) if each.name == "reference-jax")
    machine = replace(MACHINE, bytes=1e12)
    order = []
    called = JaxCall.__call__
    monkeypatch.setattr(JaxCall, "__call__", lambda self: order.append("twin") or called(self))

    def prepare(problem: Problem):
        call = as_it_is(problem)
        return lambda: order.append("right") or call()

    def bench_both(*, thrifty: bool) -> dict[str, Row]:
        effort = replace(BRIEF, thrifty=thrifty)
        found = bench(contract, workload, "forward", [twin, Competitor("right", prepare)], machine, effort)
        return {row.implementation: row for row in found}

    left_out = bench_both(thrifty=True)["reference-jax"]
    assert "twin" not in order
    assert left_out.status == "absent" and "operations take 32 times the roofline time" in left_out.reason
    rows = bench_both(thrifty=False)
    assert {row.status for row in rows.values()} == {"measured"}
    assert order.index("twin") == order.count("right")


def test_every_row_says_what_became_of_it_when_the_time_is_up():
    def ends_in(seconds: float) -> list[Row]:
        effort = replace(BRIEF, until=time.monotonic() + seconds)
        return bench(ROUTER, tiny(ROUTER), "forward", [Competitor("slow", partial(sleeping, 0.3)), RIGHT], MACHINE, effort)

    late = ends_in(0)
    assert [(row.status, row.reason) for row in late] == [("late", "not measured: the time was up")] * 2
    assert exit_status(late) == command.NOTHING_MEASURED
    slow, right = ends_in(0.2)
    assert slow.samples == (1, 0) and slow.median > 0.3 and slow.reason == "the time was up: its first call"
    assert right.status == "late"
    counted = count_calls(ROUTER, "forward", [RIGHT], MACHINE, until=0.0)
    assert [(row.status, row.counters) for row in counted] == [("late", None)]


def test_tables_share_what_time_is_left():
    now = time.monotonic()
    assert command.share(now + 10, 4) == pytest.approx(now + 2.5, abs=0.1)
    assert command.share(math.inf, 4) == math.inf


@pytest.mark.parametrize("arguments", [("--against", "HEAD"), ("--asv", "results")])
def test_a_bound_on_what_measures_all_or_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match="--seconds bounds the tables"):
        command.main(options_of("--seconds", "1", *arguments))


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


def test_scaling_ends_where_no_width_can_be_smaller():
    contract = replace(ROUTER, moved=lambda parameters, itemsize: 1e12)
    with pytest.raises(Unavailable, match="at least"):
        scaled(contract, Workload("huge", {**ROUTER.landmarks[0], "hidden_size": 6, "batch_size": 9}, "nowhere"), FULL, "float32")


def test_what_does_not_fit_is_told_of_every_competitor():
    contract = replace(ROUTER, rigid=True, flops=lambda parameters: 1e15 * parameters["num_tokens"])
    (row,) = bench(contract, tiny(contract), "forward", [RIGHT], MACHINE, BRIEF)
    assert row.status == "absent" and row.reason.startswith("needs 1e+15 operations")


@pytest.mark.parametrize("contract", [each for each in contracts().values() if each.rigid], ids=lambda each: each.name)
def test_a_model_keeps_its_widths_and_has_a_workload_for_a_cpu(contract):
    workloads = [each for each in contract.workloads if each.name.startswith("two-cores/")]
    assert workloads
    for each in workloads:
        assert scaled(contract, each, FULL, "float32") == (each.parameters, "full size")


def test_every_model_of_a_library_is_there():
    for outsiders in OUTSIDERS.values():
        for each in outsiders.values():
            if isinstance(each, PeerModel):
                text = Path(find_spec(f"gaugeblock.conformance.peers.{each.module}").origin).read_text()
                assert f"\nclass {each.peer}:" in text


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="mixtral-8x7b/prefill-4096"):
        list(select([], ["mixtral-8x7b/prefill-409"]))
    with pytest.raises(RegistrationError, match=r"routers\.softmax_topk"):
        list(select(["routers.softmax_top"], []))


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


@pytest.mark.parametrize(("others", "deviates"), [(1, False), (10, True)])
def test_choices_of_a_few_examples_may_be_others(others, deviates):
    """They are, where scores tie; what is computed for the other examples is compared."""
    problem = make_problem(ROUTER, ROUTER.landmarks[0] | {"num_tokens": 100}, "forward", MACHINE)
    expected = problem.expected()
    found = {key: each.clone() for key, each in expected.items()}
    found["topk_ids"][:others] = (found["topk_ids"][:others] + 1) % ROUTER.landmarks[0]["num_experts"]
    found["topk_weights"][:others] *= 2
    assert (problem.deviation(found, expected) > 0) == deviates
    found["topk_weights"][-1] *= 2
    assert problem.deviation(found, expected) > 0


@pytest.mark.parametrize(("others", "deviates"), [(1, False), (10, True)])
def test_choices_of_a_few_examples_may_have_another_order(others, deviates):
    """Gradients of these differ, since cotangents belong to places; those of the other examples are compared."""
    problem = make_problem(ROUTER, ROUTER.landmarks[0] | {"num_tokens": 100}, "backward", MACHINE)
    expected = problem.expected()
    found = {key: each.clone() for key, each in expected.items()}
    for key in ("topk_ids", "topk_weights"):
        found[key][:others] = found[key][:others].flip(-1)
    found[f"{GRADIENT}router_logits"][:others] *= 2
    assert (problem.deviation(found, expected) > 0) == deviates
    found[f"{GRADIENT}router_logits"][-1] *= 2
    assert problem.deviation(found, expected) > 0


def test_the_fastest_of_ours_stands_beside_the_fastest_peer():
    contract = find_contract("experts.fused_swiglu")
    medians = {"torch-grouped": 3.0, "reference": 4.0, "transformers eager": 4.0, "torch grouped_mm": 5.0, "triton": None}
    rows = [Row(contract.name, "tiny", "full size", "forward", name, median=median) for name, median in medians.items()]
    assert "0.75 (torch-grouped, transformers eager)" in command.beside_peers(contract, rows)
    assert command.beside_peers(contract, rows[:2]) == command.beside_peers(ROUTER, rows) == ""


def test_workloads_are_chosen_by_a_glob():
    chosen = [workload.name for _, workload in select(["experts.fused_swiglu"], ["*/small-decode-*"])]
    assert len(chosen) == 12 and "olmoe-1b-7b/small-decode-64" in chosen
