"""Hostile candidates: each ends in a verdict that says what happened, nothing of it outlives the run, and the run goes on."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from gaugeblock.conformance.engine.processes import seats
from gaugeblock.conformance.exit_status import FAILS
from gaugeblock.conformance.selftest.hostile import table
from gaugeblock.conformance.selftest.hostile.table import FOLDER, HOSTILE, UNLOADABLE

SELFTEST_ALONE = set(
    "engine-imitated files-searched runner-patched cached-by-pointer input-aliased huge-beyond-counting huge-indeed sparse "
    "memory-gone sys-exit killed endless-error endless-loop signals-ignored works-in-a-child both-answer prints-and-is-right "
    "output-closed seed-set threads-set end-prepared folder-and-path-changed garbage-sent much-announced deep-answer "
    "results-of-no-type results-only-claimed findings-of-no-type engine-searched input-mutated few-children-left".split()
)  # a process for each takes two seconds: these differ little from others here, and `gaugeblock selftest` judges all


def left_behind(folder: str) -> list[str]:
    """Processes that were begun with that folder for temporary files, as forks of theirs were, and the daemon, which was not."""
    found = []
    for each in psutil.process_iter():
        try:
            words, mark = " ".join(each.cmdline()), each.environ().get("TMPDIR")
        except psutil.Error:
            continue
        if "# daemon-left" in words or mark == folder:
            found.append(words)
    return found


@pytest.fixture(scope="module")
def loaded():
    """Every implementation that can be judged, by file and name; the processes of candidates end with the module."""
    harmless = dict.fromkeys(each.file for each in HOSTILE if not each.file.startswith("loading/"))
    patching = dict.fromkeys(each.file for each in HOSTILE if each.file.startswith("loading/"))
    yield table.load(harmless) | {key: row for file in patching for key, row in table.load([file]).items()}
    seats.stop_all()


@pytest.mark.parametrize("row", [each for each in HOSTILE if each.name not in SELFTEST_ALONE], ids=lambda row: row.name)
def test_a_hostile_candidate_ends_in_a_verdict_that_says_what_it_did(loaded, row):
    with table.impatience(call_seconds=3):
        assert table.judge(row, loaded[row.file, row.name]).wrong == ""


@pytest.mark.parametrize("row", UNLOADABLE, ids=lambda row: row.file)
def test_a_file_that_cannot_be_loaded_is_told_in_one_line(row):
    with table.impatience(load_seconds=5):
        assert table.try_to_load(row).wrong == ""


def test_every_function_of_the_hostile_files_has_a_row(loaded):
    assert {name for _, name in loaded} == {each.name for each in HOSTILE} and len(HOSTILE) == len({*HOSTILE})
    assert {each.name for each in HOSTILE} > SELFTEST_ALONE and len(HOSTILE) - len(SELFTEST_ALONE) >= 24


def test_the_run_goes_on_and_nothing_outlives_it(tmp_path):
    names = ("daemon-left", "child-answers", "few-children-left", "works-in-a-child")
    chosen = [word for name in names for word in ("--implementation", name)]
    command = [sys.executable, "-m", "gaugeblock.conformance.cli", "check", str(FOLDER / "processes.py"), *chosen]
    command += ["--property", "parity", "--report", str(tmp_path), "--workers", "1"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    assert done.returncode == FAILS, done.stdout + done.stderr
    verdicts = {each["implementation"]: each for each in json.loads((tmp_path / "gaugeblock.json").read_text())["verdicts"]}
    rows = {each.name: each for each in HOSTILE if each.name in names}
    assert {name: each["status"] for name, each in verdicts.items()} == {name: each.status for name, each in rows.items()}
    assert all(rows[name].says in each["reason"] for name, each in verdicts.items())
    assert left_behind(str(tmp_path)) == []
    assert [each.name for each in tmp_path.glob("gaugeblock-*")] == []  # folders of candidates' processes


def test_nothing_outlives_a_judge_that_is_killed(tmp_path):
    code = (
        "from gaugeblock.conformance.engine.processes.handle import Process; p = Process('cpu', None); p.await_ready();"
        "print(p.link.peer, p.process.pid, p.folder.name, flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    judge = subprocess.Popen([sys.executable, "-c", code], **pipes, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert judge.stdout is not None
    *numbers, folder = judge.stdout.readline().split()
    candidate, keeper = map(int, numbers)
    assert psutil.Process(candidate).ppid() == keeper and os.path.isdir(folder)
    judge.kill()
    judge.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(candidate) or psutil.pid_exists(keeper) or os.path.exists(folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)
