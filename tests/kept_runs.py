"""`gaugeblock check` judged in the tests' own process, so that a run takes a second: what tests of kept verdicts share."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from gaugeblock.conformance import cli, gate
from gaugeblock.conformance.commands import check
from gaugeblock.conformance.engine import registry
from gaugeblock.conformance.engine.processes import seats

VELOCITY = "objectives.rectified_flow_velocity"
KERNEL = """\
from gaugeblock.conformance import implements
{imports}

@implements("objectives.rectified_flow_velocity", name="{name}", differentiable=False, validates=False)
def {name}(data, noise, *, velocity):
    return (noise - data if velocity == "noise - data" else data - noise){more}
"""


def kernel(name: str, imports: str = "", more: str = "") -> str:
    """A file that registers a right implementation, or one that `more` makes wrong."""
    return KERNEL.format(name=name, imports=imports, more=more)


@dataclass
class Runs:
    """Runs of the gate on candidates of one folder, each as in a process of its own."""

    folder: Path
    judged: set[tuple[str, str]] = field(default_factory=set)  # implementation and property, in the last run
    verdicts: dict[tuple[str, str], dict] = field(default_factory=dict)
    report: dict = field(default_factory=dict)

    def write(self, **files: str) -> None:
        """Writes modules of the folder, by their names."""
        self.folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (self.folder / f"{name}.py").write_text(text)

    def check(self, *arguments: str, report: str = "report", properties: tuple[str, ...] = ("parity", "determinism")) -> int:
        """One run; returns the exit status."""
        registry._registered.clear()
        seats.stop_all()
        self.judged.clear()
        folder = self.folder.parent / report
        chosen = [each for name in properties for each in ("--property", name)]
        status = cli.main(["check", str(self.folder), *chosen, "--report", str(folder), *arguments])
        self.report = json.loads((folder / "gaugeblock.json").read_text())
        self.verdicts = {(each["implementation"], each["property"]): each for each in self.report["verdicts"]}
        return status

    @property
    def kept(self) -> set[tuple[str, str]]:
        """What the last run did not judge again."""
        return {key for key, each in self.verdicts.items() if each["kept"]}

    def run_tasks(self, groups, prepare, arguments, **limits):
        """In the place of worker processes."""
        judge = prepare(*arguments)
        for task in [each for tasks in groups.values() for each in tasks]:
            verdict = judge(task)
            self.judged.add((verdict.implementation, verdict.property))
            yield task, verdict


def begin(monkeypatch, folder: Path) -> Runs:
    """Runs that start from nothing, and keep verdicts beside `folder`."""
    runs = Runs(folder / "kernels")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GAUGEBLOCK_KEPT", str(folder / "kept"))
    monkeypatch.setenv("HYPOTHESIS_STORAGE_DIRECTORY", str(folder / "hypothesis"))
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(gate, "run_tasks", runs.run_tasks)
    monkeypatch.setattr(gate, "get_ready", lambda module: None)
    monkeypatch.setattr(check, "run", gate.run_gate)
    return runs
