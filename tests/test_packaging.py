"""The wheel and the sdist hold the whole tree, and what a user installs starts as fast as the checkout."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
REALMS = ("reference", "optimized", "conformance")
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info")


class Distribution(NamedTuple):
    """A wheel, the sdist it was built from, and the bin/ of a virtual environment that holds the wheel."""

    wheel: Path
    sdist: Path
    bin: Path

    def run(self, code: str) -> str:
        # -I: neither the current folder nor PYTHONPATH may lend the checkout's modules.
        command = [self.bin / "python", "-I", "-c", code]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """Builds from a copy, so that nothing left in the checkout by an earlier build can find its way in."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in (*REALMS, "gaugeblock"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=NOT_SHIPPED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")

    # `build` makes the sdist and then, from it, the wheel. Without isolation it downloads nothing.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    subprocess.run(build, check=True)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")

    environment = folder / "venv"
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    # This environment lends the dependencies; its own .pth files, and so the editable gaugeblock, go unread.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return Distribution(wheel, sdist, environment / "bin")


def shipped_files() -> set[str]:
    """Every file of gaugeblock/ and of the realms behind its links, as a path from where it is installed."""
    folders = [ROOT / realm for realm in REALMS]
    files = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    own = {f"gaugeblock/{path.name}" for path in (ROOT / "gaugeblock").iterdir() if path.is_file()}
    return own | {f"gaugeblock/{path.relative_to(ROOT)}" for path in files if path.is_file()}


def modules() -> list[str]:
    files = [file for file in shipped_files() if file.endswith(".py")]
    return sorted(file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files)


def test_every_folder_with_modules_is_a_package():
    folders = {(ROOT / file).parent for file in shipped_files() if file.endswith(".py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_wheel_holds_every_file_of_the_tree(distribution: Distribution):
    with zipfile.ZipFile(distribution.wheel) as wheel:
        packaged = {name for name in wheel.namelist() if not name.startswith("gaugeblock-")}
    assert packaged == shipped_files()


def test_sdist_holds_real_files_and_no_links(distribution: Distribution):
    with tarfile.open(distribution.sdist) as sdist:
        members = sdist.getmembers()
    assert [member.name for member in members if not (member.isfile() or member.isdir())] == []
    assert shipped_files() <= {member.name.partition("/")[2] for member in members}


def test_every_module_is_found_in_the_installed_wheel(distribution: Distribution):
    code = f"from importlib.util import find_spec\nfor name in {modules()}: print(find_spec(name).origin)"
    origins = distribution.run(code).split()
    assert [origin for origin in origins if not Path(origin).is_relative_to(distribution.bin.parent)] == []


def test_command_line_starts_without_a_framework(distribution: Distribution):
    imported = distribution.run("import sys, gaugeblock.conformance.cli; print(*sys.modules)").split()
    assert {"torch", "jax", "triton", "hypothesis"} & set(imported) == set()


def test_help_appears_at_once(distribution: Distribution):
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([distribution.bin / "gaugeblock", "--help"], check=True, stdout=subprocess.PIPE)
        return time.perf_counter() - start

    # What runs beside this test can only slow it down: 0.06 s alone, a median of 0.37 s on a loaded machine.
    assert min(seconds() for _ in range(5)) <= 0.3


def test_pytest_plugin_is_announced(distribution: Distribution):
    find = "from importlib.metadata import entry_points as find\n"
    code = find + "print(*[point.value for point in find(group='pytest11', name='gaugeblock.conformance.plugin')])"
    assert distribution.run(code).split() == ["gaugeblock.conformance.plugin"]
