"""Publishes all results as a page that works without internet: those kept in benchmarks/results, and what `asv run` left here.

asv's own page loads ten files from three CDNs and shows nothing without them. They come from the npm registry instead, at the
versions and checksums of package-lock.json beside this file. Call it from the repository's root.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from asv.commands.publish import Publish
from asv.config import Config
from asv.runner import BENCHMARK_RUN_SCRIPT

HERE = Path(__file__).parent
KEPT = Path("benchmarks/results")
BENCHMARKS_VERSION = 2  # of asv's list of benchmarks
ELSEWHERE = re.compile(r'(?P<attribute>src|href)="https://[^"]*/(?P<name>[\w.-]+\.(?:js|css))"(?P<rest>[^>]*)')
PACKAGES = {
    "jquery-3.3.1.min.js": "jquery/dist/jquery.min.js",
    "jquery.flot.min.js": "flot/jquery.flot.js",
    "jquery.flot.time.min.js": "flot/jquery.flot.time.js",
    "jquery.flot.selection.min.js": "flot/jquery.flot.selection.js",
    "jquery.flot.categories.min.js": "flot/jquery.flot.categories.js",
    "jquery.flot.orderBars.js": "flot-orderbars/js/jquery.flot.orderBars.js",
    "stupidtable.min.js": "stupid-table-plugin/stupidtable.min.js",
    "md5.min.js": "blueimp-md5/js/md5.min.js",
    "bootstrap.min.js": "bootstrap/dist/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap/dist/css/bootstrap.min.css",
}


def publish(root: Path) -> Path:
    """Makes the dashboard of the repository at `root`; returns the folder of the page.

    Raises:
        RuntimeError: If there is no npm, the benchmarks cannot be imported, or asv's page loads something unknown.
    """
    config = Config.load(str(root / "asv.conf.json"))
    own, merged, html = (root / config.results_dir, root / ".asv/merged", root / config.html_dir)
    merge([own, root / KEPT], merged, root)
    config.repo, config.results_dir, config.html_dir = str(root), str(merged), str(html)
    config.benchmark_dir = str(root / config.benchmark_dir)
    discover(Path(config.benchmark_dir), merged / "benchmarks.json")
    Publish.run(config, pull=False)
    bring_home(html, packages(root / ".asv/npm"))
    return html


def discover(folder: Path, listed: Path) -> None:
    """Has asv list the benchmarks in a folder, as `asv run` would before it runs them.

    Raises:
        RuntimeError: If they cannot be imported.
    """
    command = [sys.executable, BENCHMARK_RUN_SCRIPT, "discover", str(folder), str(listed)]
    paths = {"ASV_PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}  # which asv would ignore
    run = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"asv finds no benchmarks in {folder}:\n{run.stderr}")
    found = {each["name"]: each for each in json.loads(listed.read_text())}
    listed.write_text(json.dumps(found | {"version": BENCHMARKS_VERSION}))


def merge(sources: list[Path], merged: Path, root: Path) -> None:
    """One folder of all results; of the parameters of an environment only the machine and Python's version are kept.

    asv writes the machine's chip and memory among the parameters too, and `[none]` beside them for every other machine.
    """
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    for path in _json_files(sources):
        result = json.loads(path.read_text())
        if path.name != "machine.json":
            python = result["params"]["python"]
            version = python if re.fullmatch(r"[\d.]+", python) else ".".join(platform.python_version_tuple()[:2])
            result["params"] = {"machine": result["params"]["machine"], "python": version}
            result["date"] = _commit_date(root, result["commit_hash"]) or result["date"]
        folder = merged / path.parent.name
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_text(json.dumps(result))


def packages(folder: Path) -> Path:
    """Installs what package-lock.json names, if it is not there; returns `node_modules`.

    Raises:
        RuntimeError: If there is no npm, or the registry does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, installed = HERE / "package-lock.json", folder / "package-lock.json"
    if not (folder / "node_modules").is_dir() or lock.read_bytes() != installed.read_bytes():
        if shutil.which("npm") is None:
            raise RuntimeError("npm is not installed: the dashboard's scripts come from its registry (apt-get install npm)")
        for path in (HERE / "package.json", lock):
            shutil.copy(path, folder)
        command = ["npm", "ci", "--ignore-scripts", "--prefix", str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            shutil.rmtree(folder / "node_modules", ignore_errors=True)
            raise RuntimeError(f"npm could not install the dashboard's scripts:\n{run.stderr}")
    return folder / "node_modules"


def bring_home(html: Path, modules: Path) -> None:
    """Has the page load its scripts and styles from beside itself.

    Raises:
        RuntimeError: If the page loads something that no package brings.
    """

    def local(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in PACKAGES:
            raise RuntimeError(f"asv's page loads {found[0]}, which no package of {HERE / 'package.json'} brings")
        shutil.copy(modules / PACKAGES[name], html / name)
        rest = re.sub(r'\s(integrity|crossorigin|referrerpolicy)="[^"]*"', "", found["rest"])  # those of the CDN's files
        return f'{found["attribute"]}="{name}"{rest}'

    page = html / "index.html"
    page.write_text(ELSEWHERE.sub(local, page.read_text()))


def _json_files(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(folder.glob("*/*.json"))


def _commit_date(root: Path, commit: str) -> int | None:
    """In milliseconds; None for a commit that is not in the repository."""
    command = ["git", "-C", str(root), "show", "--no-patch", "--format=%at", commit]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if run.returncode else 1000 * int(run.stdout)


if __name__ == "__main__":
    page = publish(Path.cwd())
    print(f"dashboard: {page}/index.html; to look at it: python -m http.server --bind 127.0.0.1 --directory {page}")
