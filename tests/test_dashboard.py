"""The dashboard: what is asked of the contracts is kept by commit, and the page plots it without internet."""

import argparse
import functools
import http.server
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gaugeblock.conformance import cli
from gaugeblock.conformance.bench import ask, asv_results, history
from gaugeblock.conformance.engine.registry import contracts

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks/results"
BENCHMARK = "objectives.Determinism.track_bit_patterns"  # what is really measured here: small functions, few of them
POINTS = 3  # that the history has at least
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
  const series = plot.getData().map(each => (each.data || []).filter(point => point[1] !== null)).filter(each => each.length);
  const longest = series.reduce((one, other) => other.length > one.length ? other : one);  // others began later
  const at = plot.pointOffset({x: longest[0][0], y: longest[0][1]});
  const pixels = plot.getCanvas().getContext("2d").getImageData(at.left - 5, at.top - 5, 11, 11).data;
  let coloured = 0;
  for (let i = 0; i < pixels.length; i += 4) {
    const channels = [pixels[i], pixels[i + 1], pixels[i + 2]];
    coloured += pixels[i + 3] > 0 && Math.max(...channels) - Math.min(...channels) > 40;
  }
  const answer = {points: longest.map(each => each[1]), series: series.length, coloured: coloured};
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


def options_of(*arguments: str) -> argparse.Namespace:
    return cli.parser().parse_args(["bench", *arguments])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository's commits, with the benchmarks and results of the working tree."""
    root = tmp_path_factory.mktemp("repository")
    git(root, "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), ".")
    shutil.copy(ROOT / "asv.conf.json", root)
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def measured(repository: Path) -> Path:
    """HEAD's determinism of a few functions, really measured; and of a machine called `gpu` a number that nobody measured."""
    commit = git(repository, "rev-parse", "HEAD")
    results = repository / "measured"
    options = options_of("--asv", str(results), "--commit", commit, "--contract", "objectives.x", "--question", "Determinism")
    assert asv_results.main(options) == asv_results.MEASURED
    (path,) = results.glob("*/*-existing*.json")
    rows = json.loads(path.read_text())["results"]
    asv_results.write(repository / "benchmarks/results", "gpu", commit, rows)
    return path


@pytest.fixture(scope="module")
def page(repository: Path, measured: Path) -> Path:
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


def test_every_family_has_its_benchmarks():
    families = {row.family for row in contracts().values()}
    assert {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")} == families == set(history.families())


def test_every_contract_has_a_workload_for_a_cpu():
    none = [each.name for group in history.families().values() for each in group if not history.for_cpu(each, "float32")]
    assert not none, f"no workload of {none} is small enough for a CPU: name one two-cores/..."


@pytest.mark.timeout(600)
def test_asv_lists_what_is_measured_and_tells_set_ups_apart(page: Path):
    found = json.loads((page / "index.json").read_text())["benchmarks"]
    expected = {
        f"{name}.track_{metric}": ([[repr(value) for value in values] for values in asked.params], asked.version, unit)
        for name, asked in history.benchmarks()
        for metric, unit in asked.metrics.items()
    }
    assert {name: (each["params"], each["version"], each["unit"]) for name, each in found.items()} == expected
    set_ups = {each["setup_cache_key"] for each in found.values()}
    assert len(set_ups) == len(list(history.benchmarks())) == len(history.families()) * (len(history.QUESTIONS) - 1) + 1


@pytest.mark.timeout(600)
def test_the_same_call_gave_the_same_bits_in_every_implementation_and_dtype(measured: Path):
    assert measured.parent.name == asv_results.kind()
    values, params, *_ = json.loads(measured.read_text())["results"][BENCHMARK]
    assert len(values) == math.prod(map(len, params))
    assert {value for value in values if value is not None} == {1.0} and values.count(1.0) >= 6


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["experts.Counters.track_operations", "layers.Accuracy.track_rms", "dit.Accuracy.track_bias"])
def test_the_history_has_points_of_several_commits(page: Path, name: str):
    (path,) = page.glob(f"graphs/branch-HEAD/machine-cpu-*/python-*/{name}.json")
    points = json.loads(path.read_text())
    assert len({revision for revision, _ in points}) >= POINTS
    assert all(any(value is not None for value in values) for _, values in points)


@pytest.mark.timeout(600)
def test_what_is_kept_is_small_and_of_this_repository(repository: Path):
    kept = [path for path in KEPT.glob("*/*.json") if path.name != "machine.json"]
    assert kept
    for path in kept:
        assert path.stat().st_size < 1_500 * len(contracts())  # about ten bytes for each number
        git(repository, "cat-file", "-e", json.loads(path.read_text())["commit_hash"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("machine", "name", "points"),
    [("gpu", BENCHMARK, 1), (next(KEPT.glob("cpu-*"), KEPT).name, "experts.Counters.track_operations", POINTS)],
)
def test_the_page_plots_every_point_without_internet(
    page: Path, server: Any, machine: str, name: str, points: int, tmp_path: Path
):
    (page / "probe.html").write_text(PROBE % f"{name}?machine={machine}")
    address = f"http://127.0.0.1:{server.server_port}/probe.html"
    command = [browser(), *OFFLINE, f"--user-data-dir={tmp_path}", "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    answer = json.loads(shown.stdout.partition('<pre id="answer">')[2].partition("</pre>")[0] or "{}")
    assert answer, f"nothing was plotted; the page asked for {server.asked}"
    assert answer["series"] >= 1 and answer["coloured"] > 5
    assert len(answer["points"]) >= points and all(each > 0 for each in answer["points"])
    assert not [path for path, status in server.asked if "error.html" in path or (status == "404" and "favicon" not in path)]


@pytest.mark.timeout(600)
def test_the_page_names_nothing_outside_of_itself(page: Path):
    text = (page / "index.html").read_text()
    assert 'src="https:' not in text and '<link rel="stylesheet" href="https:' not in text and "integrity=" not in text


@pytest.mark.timeout(600)
def test_the_machines_differ_in_nothing_but_their_names(page: Path):
    params = json.loads((page / "index.json").read_text())["params"]
    assert params.keys() == {"machine", "python", "branch"} and {"gpu", *(each.name for each in KEPT.iterdir())} == set(
        params["machine"]
    )


def test_a_script_that_no_package_brings_is_an_error(tmp_path: Path):
    (tmp_path / "index.html").write_text('<script src="https://cdn.example/new-library.min.js" integrity="x"></script>')
    with pytest.raises(RuntimeError, match=r"new-library\.min\.js"):
        load_publish().bring_home(tmp_path, tmp_path)


def test_a_missing_npm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is not installed"):
        load_publish().packages(tmp_path / "npm")


def test_a_wrong_call_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def main(*arguments: str) -> int:
        return asv_results.main(options_of("--asv", str(tmp_path), *arguments))

    with pytest.raises(ValueError, match="--commit must be a full hash"):
        main("--commit", "574af97")
    with pytest.raises(ValueError, match="--question must be one of Cost, Counters"):
        main("--question", "Costs")
    with pytest.raises(ValueError, match="unknown family 'expert'"):
        main("--contract", "expert.x", "--commit", "0" * 40)
    with pytest.raises(ValueError, match="--history must be a number of commits"):
        main("--history", "0")
    with pytest.raises(ValueError, match="--history: Cost and Decoding are timed"):
        main("--history", "1", "--question", "Cost")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--commit HASH"):
        main()


def test_nothing_measured_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asv_results, "asked", lambda *_: ({}, 0))
    assert asv_results.main(options_of("--asv", str(tmp_path), "--commit", "0" * 40)) == asv_results.NOTHING_MEASURED


def answer_or_die(family: str, questions: list[str]) -> tuple[dict, int]:
    if family == "dit":
        os._exit(1)
    return {f"{family}.Counters": [questions]}, 0


def test_a_family_whose_process_dies_has_failed_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(ask, "answer", answer_or_die)
    asked = [word for family in ("experts", "dit", "routers") for word in ("--family", family)]
    ask.main([str(tmp_path / "answers"), "--question", "Counters", *asked])
    assert "dit: the process that measures has died" in capsys.readouterr().out
    assert json.loads((tmp_path / "answers").read_text()) == {
        "rows": {"experts.Counters": [["Counters"]], "routers.Counters": [["Counters"]]},
        "failures": 1,
    }


def test_what_was_measured_before_at_a_commit_stays(tmp_path: Path):
    asv_results.write(tmp_path, "m", "0" * 40, {"a": [1], "b": [2]})
    path = asv_results.write(tmp_path, "m", "0" * 40, {"b": [3]})
    assert json.loads(path.read_text())["results"] == {"a": [1], "b": [3]}


# ------------------------------------------------------------------------------------------------------------ earlier commits

OLD_HISTORY = """
class Counters:
    metrics = {{"operations": "operations"}}
    params = [["one", "two"]]
    version = "1"

    def setup_cache(self):
        return {{("one",): {{"operations": {number}}}, ("two",): "failed there"}}


def benchmarks():
    yield "objectives.Counters", Counters
"""
OLD_COUNTERS = "from contextlib import nullcontext as watch"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A repository whose commits have benchmarks of their own, the first none, and the third no change of an operation."""
    root = tmp_path / "old"
    (root / "gaugeblock").mkdir(parents=True)
    (root / "gaugeblock/__init__.py").touch()
    (root / "gaugeblock/conformance").symlink_to("../conformance")
    (root / "optimized").mkdir()
    git(root, "init", "--quiet")
    commits = {}
    for name, number in (("before", None), ("first", 7), ("words", 8), ("last", 9)):
        if number is not None:
            bench = root / "conformance/bench"
            bench.mkdir(parents=True, exist_ok=True)
            (bench / "history.py").write_text(OLD_HISTORY.format(number=number))
            (bench / "counters.py").write_text(OLD_COUNTERS)
        if name != "words":
            (root / "optimized" / "kernel.py").write_text(f"NUMBER = {number}")
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--message", name)
        commits[name] = git(root, "rev-parse", "HEAD")
    monkeypatch.chdir(root)
    return commits


def test_earlier_commits_are_measured_by_their_own_code_once_each(old: dict[str, str], tmp_path: Path, capfd: Any):
    options = options_of("--asv", str(tmp_path / "results"), "--history", "5", "--contract", "objectives.x")
    assert asv_results.main(options) == asv_results.MEASURED
    found = {}
    for path in (tmp_path / "results" / asv_results.kind()).glob("*-existing*.json"):
        document = json.loads(path.read_text())
        found[document["commit_hash"]] = document["results"]["objectives.Counters.track_operations"][0]
    assert found == {old["first"]: [7, None], old["last"]: [9, None]}
    said = capfd.readouterr().out
    assert "has no benchmarks" in said and "two: failed there" in said
    assert asv_results.main(options) == asv_results.MEASURED
    assert capfd.readouterr().out.count("is there already") == 2


def test_answers_that_failed_are_counted_and_told(old: dict[str, str]):
    rows, failures = asv_results.asked(["Counters", "Determinism"], ["objectives"], 1, Path.cwd())
    assert failures == 1 and rows.keys() == {"objectives.Counters.track_operations"}
    assert asv_results.count(rows) == 1
    Path("conformance/bench/history.py").write_text("raise SystemError")
    with pytest.raises(ValueError, match="could not be asked"):
        asv_results.asked(["Counters"], ["objectives"], 1, Path.cwd())
