"""`gaugeblock machines`: the gate on pretended CPUs, whose verdicts must be the same.

The libraries under torch, numpy and JAX choose their code by the CPU they find; each has a switch that lets it find an older one.
A pretended CPU turns all of these switches together, so that the gate runs there as it would on a machine that is not at hand.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gaugeblock.conformance.engine.judging.verdict import Status
from gaugeblock.conformance.exit_status import CONFORM, FAILS, NOTHING_TESTED, WRONG_CALL
from gaugeblock.conformance.report.view import MARKS, WORST_FIRST, short_dtype
from gaugeblock.conformance.selftest.machines_page import render


@dataclass(frozen=True)
class Machine:
    """A pretended CPU."""

    name: str
    summary: str
    """What it stands for."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The switches that make the libraries take the CPU for it."""
    numpy_baseline: bool = False
    """numpy uses no more than what its build demands; which features those are is asked of numpy."""

    def variables(self) -> dict[str, str]:
        """The environment of a process there."""
        variables = {"OMP_NUM_THREADS": "1", **self.environment}
        if "XLA_FLAGS" in variables:
            variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {variables['XLA_FLAGS']}".strip()
        if self.numpy_baseline:
            variables["NPY_DISABLE_CPU_FEATURES"] = " ".join(_numpy_features())
        return os.environ | variables


MACHINES = (
    Machine("this", "this machine as it is"),
    Machine("haswell-blas", "OpenBLAS for a CPU without AVX-512", {"OPENBLAS_CORETYPE": "Haswell"}),
    Machine(
        "avx2", "a CPU without AVX-512, such as AMD's Zen 3",
        {
            "OPENBLAS_CORETYPE": "Zen", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2", "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        },
        numpy_baseline=True,
    ),
    Machine(
        "sse4", "a CPU with SSE4.2 alone",
        {
            "OPENBLAS_CORETYPE": "Nehalem", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "ONEDNN_MAX_CPU_ISA": "SSE41", "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
        },
        numpy_baseline=True,
    ),
    # passive: threads that wait for others by counting take the cores from these
    Machine("2-threads", "two threads in each process", {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}),
    Machine("4-threads", "four threads in each process", {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"}),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What came of the gate on one machine: each verdict's status by its identity, and its exit status."""

    machine: Machine
    statuses: Mapping[str, Status]
    exit_status: int
    seconds: float
    alarms: tuple[str, ...] | None = None
    """Right variants that were rejected there; None if none was judged."""
    judged: int = 0
    """How many times one was judged."""

    @property
    def conforms(self) -> bool:
        """Whether all is as it should be."""
        return not self.exit_status and not self.alarms


def run_machines(options: argparse.Namespace) -> int:
    """Runs the gate on each machine, one after the other, and compares; the exit status is 0 if all conform, and alike.

    Raises:
        ValueError: If a machine is unknown.
    """
    console = Console(highlight=False)
    machines = _chosen(options.machine)
    folder: Path = options.report
    runs = []
    for machine in machines:
        console.print(f"{machine.name}: {machine.summary}", style="bold")
        runs.append(run_gate_on(machine, folder / machine.name, options.arguments))
        console.print(f"  exit status {runs[-1].exit_status} after {runs[-1].seconds:.0f} s, report in {folder / machine.name}")
        if runs[-1].exit_status in (WRONG_CALL, NOTHING_TESTED):
            return runs[-1].exit_status
        if options.variants:
            runs[-1] = judge_variants_on(runs[-1], folder / machine.name)
            console.print(f"  right variants rejected: {len(runs[-1].alarms or ())} of {runs[-1].judged:,} judgements")
    different = differences(runs)
    (folder / "index.html").write_text(render(runs, different), encoding="utf-8")
    print_runs(runs, different, console)
    console.print(f"page: {folder / 'index.html'}")
    return CONFORM if not different and all(each.conforms for each in runs) else FAILS


def run_gate_on(machine: Machine, folder: Path, arguments: Sequence[str]) -> Run:
    """`gaugeblock check` in a process that takes its CPU for another."""
    start = time.monotonic()
    command = [sys.executable, "-m", "gaugeblock.conformance.cli", "check", "--report", str(folder), *arguments]
    done = subprocess.run(command, env=machine.variables(), stdout=subprocess.DEVNULL)
    written = folder / "gaugeblock.json"
    verdicts = json.loads(written.read_text())["verdicts"] if done.returncode in (CONFORM, FAILS) else []
    keys = ("contract", "implementation", "property", "dtype", "device")
    statuses: dict[str, Status] = {"/".join(each[key] for key in keys): each["status"] for each in verdicts}
    return Run(machine, statuses, done.returncode, time.monotonic() - start)


def judge_variants_on(run: Run, folder: Path) -> Run:
    """`gaugeblock selftest --rate variants` on the same machine.

    Raises:
        RuntimeError: If it does not come to an end.
    """
    written = folder / "variants.json"
    command = [sys.executable, "-m", "gaugeblock.conformance.cli", "selftest", "--rate", "variants", "--json", str(written)]
    done = subprocess.run(command, env=run.machine.variables(), stdout=subprocess.DEVNULL)
    if done.returncode not in (CONFORM, FAILS):
        raise RuntimeError(f"right variants could not be judged on {run.machine.name}: exit status {done.returncode}")
    told = json.loads(written.read_text())
    return replace(run, alarms=tuple(told["alarms"]), judged=told["judged"])


def differences(runs: Sequence[Run]) -> list[str]:
    """Verdicts that are not the same on all machines; a warning passes."""
    identities = dict.fromkeys(identity for each in runs for identity in each.statuses)
    return [
        identity
        for identity in identities
        if len({"pass" if (status := each.statuses.get(identity)) == "warning" else status for each in runs}) > 1
    ]


def print_runs(runs: Sequence[Run], different: Sequence[str], console: Console) -> None:
    """A column for each machine: how many verdicts of each status, then each verdict that differs."""
    table = Table("verdicts", *(each.machine.name for each in runs))
    for status in WORST_FIRST:
        counts = [sum(found == status for found in each.statuses.values()) for each in runs]
        if any(counts):
            table.add_row(f"{MARKS[status]} {status}", *map(str, counts))
    if any(each.judged for each in runs):
        shares = [f"{len(each.alarms or ())} of {each.judged:,}" for each in runs]
        table.add_row("right variants rejected", *shares, style="bold red" if any(each.alarms for each in runs) else "")
    for identity in different:
        contract, implementation, prop, dtype, device = identity.split("/")
        found = [each.statuses.get(identity) for each in runs]
        label = f"{contract} {implementation} {prop} {short_dtype(dtype)} {device}"
        table.add_row(label, *(MARKS[status] if status else "" for status in found), style="bold red")
    console.print(table)
    console.print("the same verdicts on all" if not different else f"{len(different)} verdicts differ")


def _chosen(names: Sequence[str]) -> list[Machine]:
    known = {each.name: each for each in MACHINES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no machine {unknown[0]!r}; known: {', '.join(known)}")
    return [known[name] for name in names] if names else list(MACHINES)


def _numpy_features() -> list[str]:
    """What numpy would use of this CPU beyond its baseline; to switch off what it has not is an error."""
    # numpy has no public name for it
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__  # type: ignore[import-not-found]

    return [each for each in __cpu_dispatch__ if __cpu_features__.get(each)]
