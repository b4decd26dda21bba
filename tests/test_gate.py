"""The gate: worker processes that may die or hang, filters, verdicts, reports, and failures that fail again.

One run in fresh processes (`fresh_run`) shows the whole way; the others judge in this process, to be quick.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from dataclasses import fields
from types import SimpleNamespace

import pytest

from gaugeblock.conformance import cli, exit_status, gate
from gaugeblock.conformance.engine import registry
from gaugeblock.conformance.engine.judging.judge import Violation
from gaugeblock.conformance.engine.judging.verdict import Verdict
from gaugeblock.conformance.engine.processes.workers import Died, run_tasks

ROUTER = "routers.softmax_topk"
KERNELS = """\
import os

from gaugeblock.conformance import implements
from gaugeblock.reference.torch import routers


@implements("routers.softmax_topk", name="right")
def right(router_logits, *, top_k, renormalize):
    return routers.softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements("routers.softmax_topk", name="kills", differentiable=False)
def kills(router_logits, *, top_k, renormalize):
    os._exit(7)


@implements("routers.softmax_topk", name="wrong")
def wrong(router_logits, *, top_k, renormalize):
    weights, ids = right(router_logits, top_k=top_k, renormalize=renormalize)
    return 1.01 * weights, ids


@implements("routers.softmax_topk", name="raises", dtypes=("float16",))
def raises(router_logits, *, top_k, renormalize):
    raise OSError("no such chip" + chr(10) + "and a long story")


@implements("experts.fused_swiglu", name="unfinished")
def unfinished(hidden_states, w13, w2, topk_weights, topk_ids):
    ...
"""


# ---------------------------------------------------------------------------------------------------- workers


def evaluate(*expressions, **limits):
    """Results of Python expressions, each a task of one group, in the order in which they come."""
    return evaluate_groups({"group": expressions}, **limits)


def evaluate_groups(groups, *, workers=1, seconds=60.0):
    # `eval` is a function of a task that a new process finds without importing this file, and so torch
    return list(run_tasks(groups, registry.import_path, ("builtins:eval",), workers=workers, seconds=seconds))


def test_every_task_is_run_and_answered_with_its_result():
    found = evaluate_groups({"a": ["1 + 1", "2 + 2"], "b": ["3 + 3"], "empty": []}, workers=2)
    assert sorted(found) == [("1 + 1", 2), ("2 + 2", 4), ("3 + 3", 6)]


def test_a_worker_finishes_a_group_before_it_takes_the_next():
    one, two = ("__import__('os').getpid() + 0 * " + each for each in "12")
    found = evaluate_groups({"first": [two, two], "second": [one]})
    assert [task for task, _ in found] == [two, two, one]
    assert len({result for _, result in found}) == 1 and found[0][1] != os.getpid()


FATAL = {"__import__('os')._exit(7)": 7, "__import__('os').abort()": -6, "1 / 0": 1}


@pytest.mark.parametrize(("fatal", "exit_code"), FATAL.items())
def test_a_task_that_ends_its_process_costs_its_own_answer_only(fatal, exit_code, capfd):
    first, died, last = evaluate("1 + 1", fatal, "2 + 2")
    assert first == ("1 + 1", 2) and last == ("2 + 2", 4)
    assert died[0] == fatal and isinstance(died[1], Died)
    assert (died[1].late, died[1].exit_code) == (False, exit_code)


def test_a_task_that_hangs_is_killed_when_its_time_is_up():
    start = time.monotonic()
    (_, late), last = evaluate("__import__('time').sleep(600)", "2 + 2", seconds=10)
    assert late.late and late.seconds >= 10 and last == ("2 + 2", 4)
    assert time.monotonic() - start < 300


def test_a_process_that_dies_between_tasks_costs_the_next_answer_at_most():
    dies_later = "__import__('threading').Timer(0.1, __import__('os')._exit, [3]).start()"
    tasks = {"group": [dies_later, "1 + 1", "2 + 2"]}
    found = {}
    for task, result in run_tasks(tasks, registry.import_path, ("builtins:eval",), workers=1, seconds=60):
        found[task] = result
        while task == dies_later and multiprocessing.active_children():
            time.sleep(0.05)  # the worker shall be dead before it gets the next task
    assert found[dies_later] is None and isinstance(found["1 + 1"], Died) and found["2 + 2"] == 4


def test_workers_end_with_the_run():
    (_, pid), *_ = evaluate("__import__('os').getpid()")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# ----------------------------------------------------------------------------------- a run in fresh processes


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HYPOTHESIS_STORAGE_DIRECTORY", str(tmp_path / "hypothesis"))
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def fresh_run(tmp_path_factory):
    """`gaugeblock check` of a file outside the repository: its exit status, output and report."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "kernels.py").write_text(KERNELS)
    command = [
        sys.executable,
        "-m",
        "gaugeblock.conformance.cli",
        "check",
        "kernels.py",
        "--report",
        "report",
    ]
    done = subprocess.run(
        [*command, "--property", "parity", "--contract", "routers.*", "--workers", "1"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160"},
        timeout=170,
    )
    report = json.loads((folder / "report" / "gaugeblock.json").read_text())
    verdicts = {each["implementation"]: each for each in report["verdicts"]}
    return SimpleNamespace(folder=folder, done=done, report=report, verdicts=verdicts)


def test_what_a_file_elsewhere_registers_is_judged(fresh_run):
    statuses = {name: each["status"] for name, each in fresh_run.verdicts.items()}
    assert statuses == {"right": "pass", "wrong": "fail", "raises": "fail", "kills": "crash"}
    assert fresh_run.done.returncode == exit_status.FAILS


def test_reasons_are_one_line_and_no_traceback_is_shown(fresh_run):
    reasons = {name: each["reason"] for name, each in fresh_run.verdicts.items()}
    assert reasons["right"] == "" and reasons["raises"] == "raised OSError: no such chip"
    assert reasons["kills"] == "the process died (exit status 7)"
    assert reasons["wrong"].startswith("topk_weights: ")
    output = fresh_run.done.stdout + fresh_run.done.stderr
    assert "Traceback" not in output and all(reason in output for reason in reasons.values())


def test_the_report_has_the_documented_fields(fresh_run):
    assert {*fresh_run.report} == {"format", "gaugeblock", "profile", "environment", "verdicts"}
    assert (fresh_run.report["format"], fresh_run.report["profile"]) == (1, "quick")
    for each in fresh_run.report["verdicts"]:
        assert {*each} == {field.name for field in fields(Verdict)}
        assert json.loads(json.dumps(Verdict.from_json(each).to_json())) == each
    right, wrong = fresh_run.verdicts["right"], fresh_run.verdicts["wrong"]
    assert right["cases"] == len(right["fingerprints"]) > 0 and right["failure"] is None
    assert {*right["statistics"]} == {"topk_weights"}
    assert {*wrong["failure"]} == {"message", "diagnosis", "details", "cases", "script", "output"}


def test_nothing_but_the_report_is_left_in_the_folder(fresh_run):
    assert {each.name for each in fresh_run.folder.iterdir()} <= {"kernels.py", "report", "__pycache__"}


def test_a_failure_is_shrunk(fresh_run):
    (case,) = fresh_run.verdicts["wrong"]["failure"]["cases"]
    assert (case["num_tokens"], case["num_experts"], case["top_k"]) == (1, 1, 1)


def failure_of(fresh_run, suffix):
    (found,) = (fresh_run.folder / "report" / "failures").glob(f"*wrong*{suffix}")
    return found


def test_a_failure_fails_again(fresh_run, environment, capsys):
    assert cli.main(["reproduce", str(failure_of(fresh_run, ".json"))]) == exit_status.FAILS
    assert f"fails again: {fresh_run.verdicts['wrong']['reason']}" in capsys.readouterr().out


def test_the_script_of_a_failure_fails_again(fresh_run, environment):
    with pytest.raises(Violation, match="topk_weights: "):
        runpy.run_path(str(failure_of(fresh_run, ".py")))


def test_a_mended_candidate_holds(fresh_run, environment, capsys, tmp_path):
    failure = json.loads(failure_of(fresh_run, ".json").read_text())
    (tmp_path / "kernels.py").write_text(KERNELS.replace("1.01 * ", ""))
    (tmp_path / "failure.json").write_text(json.dumps({**failure, "source": str(tmp_path / "kernels.py")}))
    assert cli.main(["reproduce", str(tmp_path / "failure.json")]) == exit_status.CONFORM
    assert "holds now" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"device": "cuda", "dtype": None},
        {"implementation": "gone"},
        {"property": "perfection"},
        {"cases": [{}]},
    ],
    ids=str,
)
def test_a_failure_file_that_cannot_be_run_exits_2(fresh_run, environment, capsys, tmp_path, change):
    failure = json.loads(failure_of(fresh_run, ".json").read_text()) | change
    (tmp_path / "failure.json").write_text(json.dumps({key: each for key, each in failure.items() if each is not None}))
    assert cli.main(["reproduce", str(tmp_path / "failure.json")]) == exit_status.WRONG_CALL
    assert capsys.readouterr().err.startswith("gaugeblock: ")


# --------------------------------------------------------------------------------------- runs in this process


@pytest.fixture
def check(environment, monkeypatch, tmp_path):
    """`gaugeblock check my_kernels.py ARGUMENTS`: the exit status, and what was judged."""

    def in_this_process(groups, prepare, arguments, **limits):
        registry._registered.clear()  # as in a new process
        judge = prepare(*arguments)
        for tasks in groups.values():
            yield from ((task, judge(task)) for task in tasks)

    monkeypatch.setattr(gate, "run_tasks", in_this_process)
    kernels = tmp_path / "my_kernels.py"
    kernels.write_text(KERNELS)

    def run(*arguments):
        registry._registered.clear()
        status = cli.main(["check", str(kernels), *arguments, "--report", str(tmp_path / "report")])
        verdicts = json.loads((tmp_path / "report" / "gaugeblock.json").read_text())["verdicts"]
        return status, {"/".join((each["implementation"], each["dtype"], each["property"])) for each in verdicts}

    return run


def test_only_the_properties_asked_for_are_judged(check):
    arguments = ("--implementation", "right", "--property", "determinism", "--property", "parity")
    assert check(*arguments) == (exit_status.CONFORM, {"right/float32/parity", "right/float32/determinism"})


def test_all_properties_are_judged_unless_some_are_asked_for(check, monkeypatch):
    every = gate.properties()
    monkeypatch.setattr(gate, "properties", lambda: {name: every[name] for name in ("parity", "rejections")})
    assert check("--implementation", "right") == (
        exit_status.CONFORM,
        {"right/float32/parity", "right/float32/rejections"},
    )


def test_contracts_and_implementations_are_globs(check):
    assert check("--contract", "exp*", "--property", "parity") == (exit_status.FAILS, {"unfinished/float32/parity"})
    _, judged = check("--implementation", "*r*gh*", "--implementation", "wr?ng", "--property", "rejections")
    assert judged == {"right/float32/rejections", "wrong/float32/rejections"}


def test_a_dtype_filter_leaves_the_others_out(check):
    assert check("--dtype", "float16", "--property", "parity") == (exit_status.FAILS, {"raises/float16/parity"})


def test_only_properties_that_do_not_apply_is_nothing_tested(check):
    assert check("--implementation", "kills", "--property", "gradients")[0] == exit_status.NOTHING_TESTED


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--property", "determinsm"), "determinism"),
        (("--contract", "router.softmax_topk"), ROUTER),
        (("--waivers", "missing.toml"), "missing.toml"),
    ],
    ids=str,
)
def test_a_name_that_does_not_exist_exits_2(environment, tmp_path, capsys, arguments, reason):
    (tmp_path / "my_kernels.py").write_text(KERNELS)
    assert cli.main(["check", str(tmp_path / "my_kernels.py"), *arguments]) == exit_status.WRONG_CALL
    error = capsys.readouterr().err
    assert error.startswith("gaugeblock: ") and error.count("\n") == 1 and reason in error


def verdict(status, cases=1):
    whose = {"contract": ROUTER, "implementation": "mine", "kind": "user", "dtype": "float32", "device": "cpu"}
    return Verdict(**whose, property="parity", status=status, cases=cases)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["pass", "warning", "waived", "not supported"], exit_status.CONFORM),
        (["pass", "fail"], exit_status.FAILS),
        (["pass", "crash"], exit_status.FAILS),
        (["pass", "timeout"], exit_status.FAILS),
    ],
)
def test_the_exit_status_says_whether_all_conform(statuses, expected):
    assert gate.exit_status([verdict(status) for status in statuses]) == expected


def test_nothing_tested_is_never_green():
    assert gate.exit_status([]) == exit_status.NOTHING_TESTED
    assert gate.exit_status([verdict("not supported", cases=0)]) == exit_status.NOTHING_TESTED


# ----------------------------------------------------------------------------------------------------- pytest


def test_pytest_judges_a_candidate_in_a_repository_of_its_own(tmp_path):
    (tmp_path / "my_kernels.py").write_text(KERNELS)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = -ra --strict-markers --strict-config\ntestpaths = mine\nfilterwarnings = error\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--pyargs",
        "gaugeblock.conformance",
        "--candidate",
        "my_kernels.py",
    ]
    done = subprocess.run(
        [*command, "-k", "parity and not kills and not unfinished", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "2 failed, 1 passed" in done.stdout.splitlines()[-1]
    assert "routers.softmax_topk: wrong fails parity in float32 on cpu" in done.stdout
    assert "reproduce(" in done.stdout
