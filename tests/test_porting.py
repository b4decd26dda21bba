"""PORTING.md, followed on a device that pretends; what is missing or wrong on it is told apart from what conforms."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_readme import ROOT, follow, read_steps
from torch.utils.cpp_extension import include_paths, library_paths

from gaugeblock.conformance.commands.options import device
from gaugeblock.conformance.engine.devices import unknown_device
from gaugeblock.conformance.engine.registry import RegistrationError, implements

SOURCE = Path(__file__).parent / "pretended_device.cpp"
BACKEND = """
import types
from pathlib import Path

import torch


def register():
    torch.ops.load_library(str(Path(__file__).with_name("libpretended.so")))
    torch.utils.rename_privateuse1_backend("pretended")
    module = types.ModuleType("torch.pretended")
    module.is_available, module.device_count, module.current_device = lambda: True, lambda: 1, lambda: 0
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    torch._register_device_module("pretended", module)
"""


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """A folder in which `import torch` finds the backend, as a vendor's installed package would be found."""
    folder = tmp_path_factory.mktemp("backend")
    paths = [f"-I{each}" for each in include_paths()] + [f"-L{each}" for each in library_paths()]
    linked = ["-ltorch", "-ltorch_cpu", "-lc10"]
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    command = [compiler, "-O0", "-std=c++20", "-fPIC", "-shared", str(SOURCE), "-o", str(folder / "libpretended.so")]
    subprocess.run([*command, *paths, *linked], check=True)
    (folder / "pretended_device.py").write_text(BACKEND)
    told = folder / "pretended_device-0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: pretended-device\nVersion: 0\n")
    (told / "entry_points.txt").write_text("[torch.backends]\npretended = pretended_device:register\n")
    return folder


@pytest.fixture
def on_it(backend, tmp_path, monkeypatch):
    """An empty folder, and commands that find the backend."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(backend), prepend=os.pathsep)
    monkeypatch.setenv("CHIP", "pretended")
    return tmp_path


def gaugeblock(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["gaugeblock", *arguments], capture_output=True, text=True, timeout=170, check=False)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_guide_can_be_followed(on_it):
    for step in read_steps("PORTING.md", (ROOT / "PORTING.md").read_text()):
        follow(step, lambda step: exec(step.text, {}))
    report = json.loads((on_it / "report" / "gaugeblock.json").read_text())
    assert {each["device"] for each in report["verdicts"]} == {"pretended"}
    assert all(each["status"] in ("pass", "not supported") and not each["kept"] for each in report["verdicts"])
    assert report["environment"]["gpus"] == [{"name": "pretended"}]


WRONG = """
import torch
from gaugeblock.conformance import implements

@implements("norms.rms_norm", name="mychip", devices=("cpu", "pretended"), rounding="eager", validates=False)
def rms_norm(hidden_states, weight, *, eps):
    scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + eps)
    return hidden_states * scale * (weight if hidden_states.is_cpu else weight[:1])
"""


@pytest.mark.long
def test_what_is_wrong_on_the_device_alone_fails_there_alone(on_it):
    (on_it / "my_chip.py").write_text(WRONG)
    run = gaugeblock("check", "my_chip.py", "--property", "parity", "--report", "report")
    assert run.returncode == 1, run.stdout + run.stderr
    verdicts = json.loads((on_it / "report" / "gaugeblock.json").read_text())["verdicts"]
    assert {each["device"]: each["status"] for each in verdicts} == {"cpu": "pass", "pretended": "fail"}
    missing = gaugeblock("check", "--device", "pretended", "--implementation", "reference", "--contract", "unet.unet",
                         "--property", "determinism")  # fmt: skip
    assert missing.returncode == 1 and "convolution_overrideable not implemented" in missing.stdout, missing.stdout


def test_a_device_that_torch_does_not_know_is_refused():
    assert not unknown_device("cpu") and not unknown_device("xpu") and device("cuda") == "cuda"
    assert "'pretender' is no device type of torch" in unknown_device("pretender") and "'cuda:0'" in unknown_device("cuda:0")
    for wrong in ("pretender", ("cpu", "cuda:0"), ()):
        with pytest.raises(RegistrationError, match=r"norms.rms_norm \(mychip\): devices must be of torch's"):
            implements("norms.rms_norm", name="mychip", devices=wrong)(torch.nn.functional.rms_norm)
    command = [sys.executable, "-m", "gaugeblock.conformance.cli", "check", "--device", "pretender"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2 and "--device: 'pretender' is no device type of torch" in run.stderr, run.stderr
