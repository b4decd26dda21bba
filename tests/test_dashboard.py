"""The dashboard: asv runs every benchmark that the contracts give, and the page plots the results without internet."""

import argparse
import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gaugeblock.conformance.bench import asv_results, history
from gaugeblock.conformance.engine.registry import contracts

ROOT = Path(__file__).parents[1]
SUBJECT, QUESTION = "objectives", "Counters"  # what is really run here: small functions, few of them
BENCHMARK = f"{SUBJECT}.{QUESTION}.track_operations"
BROWSERS = ("chromium", "google-chrome")
# No connection of the browser's own: the machine that tests may have no network, and the page must need none.
OFFLINE = (
    *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split(),
    *"--disable-component-update --disable-sync --virtual-time-budget=20000".split(),
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)

# Looks into the dashboard's frame: what the plot holds, and the coloured pixels of the canvas around its first point.
PROBE = """<!doctype html><pre id="answer"></pre>
<iframe id="page" width="1200" height="900" src="index.html#%s"></iframe>
<script>
setInterval(() => {
  const page = document.getElementById("page").contentWindow;
  const plot = page.$ && page.$("#main-graph").data("plot");
  if (!plot) return;
  const series = plot.getData().filter(each => each.data && each.data.length);
  const at = plot.pointOffset({x: series[0].data[0][0], y: series[0].data[0][1]});
  const pixels = plot.getCanvas().getContext("2d").getImageData(at.left - 5, at.top - 5, 11, 11).data;
  let coloured = 0;
  for (let i = 0; i < pixels.length; i += 4) {
    const channels = [pixels[i], pixels[i + 1], pixels[i + 2]];
    coloured += pixels[i + 3] > 0 && Math.max(...channels) - Math.min(...channels) > 40;
  }
  const answer = {points: series[0].data.map(each => each[1]), series: series.length, coloured: coloured};
  document.getElementById("answer").textContent = JSON.stringify(answer);
}, 100);
</script>"""


def load_publish() -> Any:
    """The script `benchmarks/dashboard/publish.py`, which is no package's module."""
    spec = importlib.util.spec_from_file_location("publish", ROOT / "benchmarks/dashboard/publish.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of three commits, with this project's benchmarks."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / "asv.conf.json", root)
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    git(root, "init", "--quiet")
    for number in range(3):
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--allow-empty", "--message", f"commit {number}")
    return root


@pytest.fixture(scope="module")
def asv_run(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """asv's own results of one benchmark at HEAD, on a machine called `here`."""
    home = tmp_path_factory.mktemp("home")  # asv keeps machines there
    environment = os.environ | {"HOME": str(home), "ASV_PYTHONPATH": str(ROOT)}
    machine = {"machine": "here", "arch": "a", "cpu": "b", "num_cpu": "2", "os": "c", "ram": "d"}
    (home / ".asv-machine.json").write_text(json.dumps({"here": machine, "version": 1}))
    command = [sys.executable, "-m", "asv", "run", "--environment", f"existing:{sys.executable}", "--set-commit-hash", "HEAD"]
    command += ["--machine", "here", "--launch-method", "forkserver", "--bench", BENCHMARK, "--show-stderr"]
    run = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    discover = [*command[:3], "run", "--bench", "just-discover", *command[4:10], "--launch-method", "forkserver"]
    subprocess.run(discover, cwd=repository, env=environment, capture_output=True, check=True)
    return repository / ".asv/results"


@pytest.fixture(scope="module")
def lent(repository: Path) -> str:
    """Results written without asv, of a machine called `gpu`, for the commit before HEAD; that commit."""
    commit = git(repository, "rev-parse", "HEAD~1")
    options = argparse.Namespace(
        asv=repository / "benchmarks/results", machine="gpu", commit=commit, contract=[f"{SUBJECT}.rectified_flow_loss"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "QUESTIONS", (history.Counters,))
        assert asv_results.main(options) == asv_results.MEASURED
    return commit


@pytest.fixture(scope="module")
def page(repository: Path, asv_run: Path, lent: str) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("NOT TESTED: the dashboard, for its scripts come by npm: apt-get install npm")
    command = [sys.executable, "benchmarks/dashboard/publish.py"]  # asv forks there, which a process with JAX must not
    subprocess.run(command, cwd=repository, check=True)
    return repository / ".asv/html"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the page and notes what was asked for."""

    def log_message(self, format: str, *args: Any) -> None:
        self.server.asked.append((self.path, args[1] if len(args) > 1 else ""))  # type: ignore[attr-defined]


@pytest.fixture
def server(page: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=page)) as served:
        served.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:  # `make test` installs one where it can
        pytest.skip(f"NOT TESTED: the dashboard in a browser, for there is none of {BROWSERS}: apt-get install chromium")
    return found


def test_every_subject_has_its_benchmarks():
    families = {row.family for row in contracts().values()}
    assert {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")} == families == set(history.subjects())


def test_every_contract_has_a_workload_for_a_cpu():
    none = [each.name for group in history.subjects().values() for each in group if not history.for_cpu(each, "float32")]
    assert not none, f"no workload of {none} is small enough for a CPU: name one two-cores/..."


@pytest.mark.timeout(600)
def test_asv_finds_what_the_machine_without_asv_measures(asv_run: Path):
    found = json.loads((asv_run / "benchmarks.json").read_text())
    expected = {
        f"{name}.track_{metric}": ([[repr(value) for value in values] for values in asked.params], asked.version, unit)
        for name, asked in history.benchmarks()
        for metric, unit in asked.metrics.items()
    }
    assert {
        name: (each["params"], each["version"], each["unit"]) for name, each in found.items() if name != "version"
    } == expected


@pytest.mark.timeout(600)
def test_asv_keeps_numbers_of_several_implementations(asv_run: Path):
    (path,) = (asv_run / "here").glob("*-existing*.json")
    values, params, *_ = json.loads(path.read_text())["results"][BENCHMARK]
    assert len(values) == len(params[0]) * len(params[1]) * len(params[2])
    assert sum(value is not None and value == value for value in values) >= 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", ["here", "gpu"])
def test_the_page_plots_a_point_of_every_machine_without_internet(page: Path, server: Any, machine: str, tmp_path: Path):
    (page / "probe.html").write_text(PROBE % f"{BENCHMARK}?machine={machine}")
    address = f"http://127.0.0.1:{server.server_port}/probe.html"
    command = [browser(), *OFFLINE, f"--user-data-dir={tmp_path}", "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    answer = json.loads(shown.stdout.partition('<pre id="answer">')[2].partition("</pre>")[0] or "{}")
    assert answer, f"nothing was plotted; the page asked for {server.asked}"
    assert answer["series"] >= 1 and answer["points"][0] > 0 and answer["coloured"] > 5
    assert not [path for path, status in server.asked if "error.html" in path or (status == "404" and "favicon" not in path)]


@pytest.mark.timeout(600)
def test_the_page_names_nothing_outside_of_itself(page: Path):
    text = (page / "index.html").read_text()
    assert 'src="https:' not in text and '<link rel="stylesheet" href="https:' not in text and "integrity=" not in text


@pytest.mark.timeout(600)
def test_the_machines_differ_in_nothing_but_their_names(page: Path):
    params = json.loads((page / "index.json").read_text())["params"]
    assert params.keys() == {"machine", "python", "branch"} and params["machine"] == ["gpu", "here"]


def test_a_script_that_no_package_brings_is_an_error(tmp_path: Path):
    (tmp_path / "index.html").write_text('<script src="https://cdn.example/new-library.min.js" integrity="x"></script>')
    with pytest.raises(RuntimeError, match=r"new-library\.min\.js"):
        load_publish().bring_home(tmp_path, tmp_path)


def test_a_missing_npm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is not installed"):
        load_publish().packages(tmp_path / "npm")


def test_results_of_an_unknown_commit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = argparse.Namespace(asv=tmp_path, machine="gpu", commit="574af97", contract=[])
    with pytest.raises(ValueError, match="--commit must be a full hash"):
        asv_results.main(options)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--commit HASH"):
        asv_results.head()


def test_nothing_measured_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Nothing(history.Counters):
        subject = SUBJECT

        def setup_cache(self) -> history.Answers:
            return {}

    monkeypatch.setattr(history, "benchmarks", lambda: [(f"{SUBJECT}.Nothing", Nothing)])
    options = argparse.Namespace(asv=tmp_path, machine="gpu", commit="0" * 40, contract=[])
    assert asv_results.main(options) == asv_results.NOTHING_MEASURED
