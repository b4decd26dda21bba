"""The nursery of candidates' processes: how they end is told, and nothing that came from one outlives it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from gaugeblock.conformance.engine.processes import nursery
from gaugeblock.conformance.engine.processes.handle import Lost, Process
from gaugeblock.conformance.engine.processes.messages import Describe

CANDIDATE = """\
import os, signal, subprocess, sys, time
from gaugeblock.conformance import implements

{what}

@implements("routers.softmax_topk", name="mine")
def route(router_logits, *, top_k, renormalize):
    ...
"""


def describing(tmp_path, what: str) -> Process:
    """A process that is asked what a file registers which does `what` first."""
    (tmp_path / "candidate.py").write_text(CANDIDATE.format(what=what))
    return Process("cpu", None)


def told(tmp_path, what: str) -> dict:
    process = describing(tmp_path, what)
    try:
        return process.describe(Describe((str(tmp_path / "candidate.py"),)))
    finally:
        process.stop()


def test_a_fork_is_ready_in_a_fraction_of_what_an_import_takes():
    Process("cpu", None).await_ready()  # the nursery itself has to start
    start = time.monotonic()
    process = Process("cpu", None)
    process.await_ready()
    process.stop()
    assert time.monotonic() - start < 1.0


def test_it_has_its_own_session_folder_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMETHING", "else")
    what = (
        f"open({str(tmp_path / 'seen')!r}, 'w').write("
        "' '.join([str(os.getsid(0) == os.getpid()), os.environ['SOMETHING'], os.environ['TMPDIR'], os.getcwd()]))"
    )
    assert "rows" in told(tmp_path, what)
    own, something, temporary, folder = (tmp_path / "seen").read_text().split()
    assert own == "True" and something == "else" and folder == os.getcwd()
    assert os.path.basename(temporary).startswith("gaugeblock-") and not os.path.exists(temporary)


@pytest.mark.parametrize(
    ("what", "message"),
    [("os._exit(3)", "exit status 3"), ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"), ("os._exit(0)", "exit status 0")],
)
def test_how_a_process_ended_is_told(tmp_path, what, message):
    with pytest.raises(Lost, match=message):
        told(tmp_path, what)


@pytest.mark.parametrize("start_new_session", [False, True], ids=["child", "daemon"])
def test_what_a_candidate_starts_ends_with_it(tmp_path, start_new_session):
    orphan = f"subprocess.Popen(['sleep', '987'], start_new_session={start_new_session})"
    middle = f"subprocess.run([sys.executable, '-c', \"import subprocess; {orphan}\"])"  # its parent is gone, and so is its name
    assert "rows" in told(tmp_path, middle)
    deadline = time.monotonic() + 10
    while any(each.info["cmdline"] == ["sleep", "987"] for each in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "it outlives the candidate's process"
        time.sleep(0.05)


def test_a_nursery_that_is_gone_takes_its_children_along():
    child = Process("cpu", None)
    child.await_ready()
    assert child.process is not None
    parent = psutil.Process(child.process.pid).parent()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    soon = time.monotonic() + 5  # its keeper looks now and then whether the nursery is there
    with pytest.raises(Lost, match="died"):
        while time.monotonic() < soon:
            child.describe(Describe(()))
    nursery._known.clear()  # the next one starts another


def test_forked_from_the_judges_server_it_imports_nothing_and_ends_with_whoever_started_it():
    code = (
        "from gaugeblock.conformance.engine.processes import handle, workers;"
        "workers.get_ready('gaugeblock.conformance.engine.processes.perform');"
        "p = handle.Process('cpu', None); p.await_ready(); print(p.process.pid, flush=True); input()"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    keeper = psutil.Process(int(starter.stdout.readline()))
    own = keeper.parent()
    server = own.parent()
    assert server.ppid() == starter.pid and "forkserver" in " ".join(own.cmdline())  # a fork has its parent's command
    starter.kill()
    starter.wait()
    _, alive = psutil.wait_procs([keeper, own, server], timeout=20)
    assert not alive
