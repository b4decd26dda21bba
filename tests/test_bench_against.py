"""The gate against an earlier revision, and pytest-benchmark's comparison: a user's repository before and after a change."""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gaugeblock.conformance import cli
from gaugeblock.conformance.bench import against
from gaugeblock.conformance.bench.against import chance, is_slower

ROUTER, WORKLOAD = "routers.softmax_topk", "qwen3-30b-a3b/decode-64"
ROOT = Path(__file__).parents[1]

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


def options_of(*arguments: str) -> argparse.Namespace:
    return cli.parser().parse_args(["bench", *arguments])


def gate(*arguments: str) -> int:
    return against.main(
        options_of("kernels.py", "--against", "HEAD", "--workload", WORKLOAD, "--direction", "forward", *arguments)
    )


@pytest.mark.timeout(300)
def test_a_planted_delay_and_a_planted_copy_are_found_and_equal_code_is_not(repository, capsys, monkeypatch):
    # one round, and a difference that no busy machine makes: how fine the comparison is the tests below show without a clock
    for name, value in {"ROUNDS": 1, "CHANCE": 1.0, "SHORTEST": 5e-3}.items():
        monkeypatch.setattr(against, name, value)
    (repository / "kernels.py").write_text(KERNELS.format(delay="time.sleep(0.03)", copy=".clone()"))
    assert gate("--contract", ROUTER, *OWN) == against.WORSE
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if line.endswith("WORSE")]
    assert {name for line in lines for name in line if name in ("steady", "slower", "greedy")} == {"slower", "greedy"}, printed
    assert all("time" in line for line in lines if "slower" in line), printed
    assert {"bytes_allocated", "operations"} <= {word for line in lines if "greedy" in line for word in line}, printed


TOY_COMMAND = """
import json, pathlib, sys
arguments = dict(zip(sys.argv, sys.argv[1:]))
with pathlib.Path({log!r}).open("a") as log:
    print(pathlib.Path.cwd().name, "--counters" in sys.argv, file=log)
if arguments["--contract"] == "routers.nothing":
    sys.exit("gaugeblock: unknown contract")
row = dict(contract="c", workload="w", direction="forward", implementation="i", status="measured", median=1.0)
pathlib.Path(arguments["--json"]).write_text(json.dumps(dict(rows=[row] * ({median} is not None), counters=[])))
"""


def toy(folder: Path, monkeypatch: pytest.MonkeyPatch, **written: object) -> Path:
    """A command in place of ours, which measures nothing but writes what it is told to; where it logs."""
    log = folder / "log"
    (folder / "gaugeblock/conformance").mkdir(parents=True)
    (folder / "gaugeblock/conformance/cli.py").write_text(TOY_COMMAND.format(log=str(log), **written))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return log


def test_the_gate_measures_both_trees_in_turn_and_counts_in_the_first_round(repository, tmp_path_factory, monkeypatch):
    log = toy(tmp_path_factory.mktemp("toy"), monkeypatch, median=1.0)
    assert gate("--contract", ROUTER) == against.UNCHANGED
    assert log.read_text().split() == ["revision", "True", repository.name, "True"] + [
        "revision",
        "False",
        repository.name,
        "False",
    ] * (against.ROUNDS - 1)


def test_the_gate_says_when_there_was_nothing_to_compare(repository, tmp_path_factory, monkeypatch, capsys):
    toy(tmp_path_factory.mktemp("toy"), monkeypatch, median=None)
    assert gate("--contract", ROUTER) == against.NOTHING_COMPARED
    assert "nothing was measured both at HEAD and here" in capsys.readouterr().out
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
    assert "2 passed" in first and f"'{ROUTER}/{WORKLOAD}/forward': 2 tests" in first
    second = run("--benchmark-compare")
    assert "4 tests" in second and "(0001_before)" in second
