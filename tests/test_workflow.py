"""The workflow of the README, run in a repository of kernels by a runner of our own: what a pull request meets.

The runner does what GitHub's does with the keys that the workflow uses, and refuses all others, so that nothing goes unnoticed.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"  # wherever the workflow stands
FENCED = re.compile(r"^```yaml\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
EXPRESSION = re.compile(r"\$\{\{ (?P<name>[\w.]+) \}\}")
INSTALLING = "pip install"  # needs the network; what it installs is here
FAILS = 1

KERNEL = """\
from gaugeblock.conformance import implements


@implements("objectives.rectified_flow_interpolate", name="{name}", differentiable=False, validates=False)
def interpolate(data, noise, times):
    at = times.view(-1, *[1] * (data.ndim - 1))
    return ({rest} * data + at * noise).to(data.dtype)
"""
RIGHT, WRONG = "(1 - at)", "(1.1 - at)"


@dataclass
class Outcome:
    """What a run of the workflow leaves behind."""

    status: int
    said: str
    summary: str
    artifacts: dict[str, Path]


class Service:
    """A repository at a service that runs its workflow, with what the service keeps between runs."""

    def __init__(self, folder: Path, workflow: dict[Any, Any]) -> None:
        self.folder, self.workflow, self.runs = folder, workflow, 0
        self.origin, self.work, self.cache = folder / "origin.git", folder / "work", folder / "cache"
        self.git("init", "--quiet", "--bare", "--initial-branch=main", str(self.origin), cwd=folder)
        self.git("clone", "--quiet", str(self.origin), str(self.work), cwd=folder)
        self.git("commit", "--quiet", "--allow-empty", "--message", "nothing yet")

    def git(self, *arguments: str, cwd: Path | None = None) -> None:
        name = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        subprocess.run(["git", *name, *arguments], cwd=cwd or self.work, check=True, capture_output=True)

    def push(self, branch: str, files: dict[str, str]) -> None:
        """A commit on main, or on a new branch that starts there."""
        self.git("checkout", "--quiet", "main")
        if branch != "main":
            self.git("checkout", "--quiet", "-b", branch)
        for name, text in files.items():
            (self.work / name).parent.mkdir(exist_ok=True)
            (self.work / name).write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", branch)
        self.git("push", "--quiet", "origin", branch)

    def run(self, branch: str, base: str = "") -> Outcome:
        """The workflow's one job on a branch; `base` is the branch that a pull request goes to."""
        (job,) = self.workflow["jobs"].values()
        self.runs += 1
        place = self.folder / f"run-{self.runs}"
        place.mkdir()
        runner = Runner(self, branch, place)
        variables = {name: runner.evaluated(value) for name, value in job.get("env", {}).items()}
        variables |= {"GITHUB_ACTIONS": "true", "GITHUB_BASE_REF": base, "GITHUB_STEP_SUMMARY": str(place / "summary.md")}
        runner.environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | variables
        for step in job["steps"]:
            runner.take(step)
        runner.end()
        summary = place / "summary.md"
        return Outcome(runner.status, runner.said, summary.read_text() if summary.exists() else "", runner.artifacts)


class Runner:
    """One run of a job."""

    def __init__(self, service: Service, branch: str, place: Path) -> None:
        self.service, self.branch, self.workspace = service, branch, place / "workspace"
        self.environment: dict[str, str] = {}
        self.status, self.said = 0, ""
        self.artifacts: dict[str, Path] = {}
        self.cached: Path | None = None

    def take(self, step: dict[str, Any]) -> None:
        """One step, unless one before it failed."""
        assert step.keys() <= {"name", "uses", "with", "run", "if"}, f"a key that the runner does not know: {step}"
        assert step.get("if", "always()") == "always()"
        if self.status and "if" not in step:
            return
        if "uses" in step:
            name, _, version = step["uses"].partition("@")
            assert re.fullmatch(r"v\d+", version)
            getattr(self, name.rpartition("/")[2].replace("-", "_"))(**step.get("with", {}))
        elif not step["run"].startswith(INSTALLING):
            command = ["bash", "-e", "-c", self.evaluated(step["run"])]
            run = subprocess.run(command, cwd=self.workspace, env=self.environment, capture_output=True, text=True, check=False)
            self.status, self.said = run.returncode, self.said + run.stdout + run.stderr

    def evaluated(self, text: str) -> str:
        known = {"github.workspace": str(self.workspace), "github.run_id": str(self.service.runs)}
        return EXPRESSION.sub(lambda found: known[found["name"]], text)

    def checkout(self, **options: Any) -> None:
        depth = options.pop("fetch-depth", 1)
        assert not options
        shallow = [f"--depth={depth}"] if depth else []
        url = self.service.origin.as_uri()
        self.service.git("clone", "--quiet", *shallow, "--branch", self.branch, url, str(self.workspace), cwd=self.service.folder)

    def setup_python(self, **options: Any) -> None:
        major, minor = map(int, options["python-version"].split("."))
        assert (major, minor) >= (3, 11)

    def cache(self, *, path: str, key: str, **options: str) -> None:
        assert self.evaluated(key).startswith(options["restore-keys"])
        self.cached = self.workspace / path
        if self.service.cache.exists():
            shutil.copytree(self.service.cache, self.cached)

    def upload_artifact(self, *, name: str, path: str) -> None:
        self.artifacts[name] = self.workspace / path
        assert self.artifacts[name].is_dir()

    def end(self) -> None:
        """What is cached is saved where all went well."""
        if self.cached and not self.status:
            shutil.rmtree(self.service.cache, ignore_errors=True)
            shutil.copytree(self.cached, self.service.cache)


def workflow_of(markdown: str) -> dict[Any, Any]:
    (text,) = (found["text"] for found in FENCED.finditer(markdown) if "gaugeblock check" in found["text"])
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A repository with two kernels on main, which the workflow has judged."""
    service = Service(tmp_path_factory.mktemp("service"), workflow_of(README.read_text()))
    kernels = {f"kernels/{name}.py": KERNEL.format(name=name, rest=RIGHT) for name in ("first", "second")}
    service.push("main", kernels | {"README.md": "Two kernels"})
    return service


@pytest.fixture(scope="module")
def main(service: Service) -> Outcome:
    return service.run("main")


def failures(outcome: Outcome) -> int:
    suites = ElementTree.parse(outcome.artifacts["report"] / "junit.xml")
    return sum(1 for _ in suites.iter("failure"))


def test_the_workflow_runs_for_pull_requests_and_on_main(service: Service):
    assert service.workflow[True] == {"push": {"branches": ["main"]}, "pull_request": None}  # YAML reads `on` as true


def test_main_is_judged_as_a_whole_and_its_verdicts_are_kept(main: Outcome, service: Service):
    assert main.status == 0, main.said
    assert "first" in main.summary and "second" in main.summary and failures(main) == 0
    assert any(service.cache.rglob("*")), "no verdict is kept"


def test_a_broken_kernel_fails_the_pull_request_and_only_that_is_judged(main: Outcome, service: Service):
    service.push("breaks", {"kernels/second.py": KERNEL.format(name="second", rest=WRONG)})
    outcome = service.run("breaks", base="main")
    assert outcome.status == FAILS, outcome.said
    assert "second" in outcome.summary and "first" not in outcome.summary
    assert "::error" in outcome.said and failures(outcome) > 0
    assert list((outcome.artifacts["report"] / "failures").glob("*second*.py"))


def test_a_pull_request_that_touches_no_kernel_passes_at_once(main: Outcome, service: Service):
    service.push("words", {"README.md": "Two kernels, both of them right"})
    outcome = service.run("words", base="main")
    assert outcome.status == 0, outcome.said
    assert "0 cases" in outcome.said or "nothing" in outcome.said.lower()


def test_a_second_run_on_main_judges_nothing_again(main: Outcome, service: Service):
    again = service.run("main")
    assert again.status == 0 and "°" in again.said, again.said


def test_a_key_that_the_runner_does_not_know_is_refused(service: Service, tmp_path: Path):
    with pytest.raises(AssertionError, match="does not know"):
        Runner(service, "main", tmp_path).take({"run": "true", "continue-on-error": True})
