"""Pretended CPUs: the switches are heard by the libraries, and what differs between machines is told."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from gaugeblock.conformance import cli, exit_status
from gaugeblock.conformance.selftest import machines
from gaugeblock.conformance.selftest.machines import MACHINES, Machine, Run, differences
from gaugeblock.conformance.selftest.machines_page import render

BY_NAME = {each.name: each for each in MACHINES}
WHAT_TORCH_SAYS = """\
import json, numpy, torch
from gaugeblock.conformance.engine.devices import set_up_process
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
set_up_process()
print(json.dumps({
    "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
    "numpy": [each for each in __cpu_dispatch__ if __cpu_features__[each]],
}))
"""
# What a library's choice of code by the CPU, or by how many rows there are, would show in; `make machines` judges all properties.
OF_BITS = ("batch_invariance", "nan_containment")


def told(machine: Machine) -> dict:
    done = subprocess.run([sys.executable, "-c", WHAT_TORCH_SAYS], env=machine.variables(), capture_output=True, check=True)
    return json.loads(done.stdout)


def test_the_libraries_hear_the_switches():
    assert told(BY_NAME["sse4"]) == {"capability": "DEFAULT", "threads": 1, "numpy": []}
    assert told(BY_NAME["4-threads"])["threads"] == 4


def run_of(name: str, **statuses: str) -> Run:
    identities = {f"a.b/mine/{prop}/float32/cpu": status for prop, status in statuses.items()}
    return Run(Machine(name, "a CPU"), identities, int("fail" in statuses.values()), 1.0)


def test_a_verdict_that_differs_is_named_and_a_warning_is_a_pass():
    runs = [run_of("one", parity="pass", layout="pass"), run_of("two", parity="warning", layout="fail")]
    assert differences(runs) == ["a.b/mine/layout/float32/cpu"]
    page = render(runs, differences(runs))
    assert "1 verdicts depend on the machine" in page and page.count('<th scope="col">two</th>') == 3
    assert "The same verdicts on 1 machines" in render(runs[:1], [])


def test_an_unknown_machine_exits_2(capsys):
    assert cli.main(["machines", "--machine", "cray"]) == exit_status.WRONG_CALL
    assert "no machine 'cray'; known: this" in capsys.readouterr().err


@pytest.mark.parametrize("statuses", [("pass", "pass"), ("pass", "fail")])
def test_the_exit_status_says_whether_all_conform_alike(monkeypatch, tmp_path, statuses):
    found = iter(statuses)
    monkeypatch.setattr(machines, "run_gate_on", lambda machine, folder, arguments: run_of(machine.name, parity=next(found)))
    options = SimpleNamespace(machine=["this", "sse4"], report=tmp_path, arguments=[], variants=False)
    assert machines.run_machines(options) == (exit_status.CONFORM if statuses[0] == statuses[1] else exit_status.FAILS)


@pytest.mark.long
def test_the_properties_of_bits_hold_on_another_cpu(tmp_path):
    arguments = [word for name in OF_BITS for word in ("--property", name)]
    run = machines.run_gate_on(BY_NAME["avx2"], tmp_path, arguments)
    wrong = {identity: status for identity, status in run.statuses.items() if status not in ("pass", "not supported")}
    assert run.exit_status == exit_status.CONFORM and not wrong
