"""The demo, a short version: both frameworks learn, their curves agree, the pictures are drawn."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_both_frameworks_learn_digits_along_the_same_curve(tmp_path):
    command = [sys.executable, str(ROOT / "demo" / "train_digits.py"), "--steps", "20", "--folder", str(tmp_path / "new")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert run.returncode == 0, run.stdout + run.stderr
    losses = re.findall(r"(PyTorch|JAX): final loss ([\d.]+)", run.stdout)
    assert [name for name, _ in losses] == ["PyTorch", "JAX"]
    assert all(float(loss) < 1.25 for _, loss in losses), "the loss does not fall: it begins at 1.7"
    assert "curves: within the growth of rounding errors" in run.stdout
    for picture in ("digits.png", "loss.png"):
        assert (tmp_path / "new" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_every_sampler_makes_digits_of_one_model(tmp_path):
    """After a fifth of the training, means and deviations of pixels are already those of the digits."""
    command = [sys.executable, str(ROOT / "demo" / "sample_digits.py"), "--steps", "300", "--folder", str(tmp_path / "new")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert run.returncode == 0, run.stdout + run.stderr
    (_, mean, deviation), *found = re.findall(r"^(.+): mean (\S+), deviation ([\d.]+)", run.stdout, re.MULTILINE)
    assert len(found) == 10
    for name, its_mean, its_deviation in found:
        assert abs(float(its_mean) - float(mean)) <= 0.05, name
        assert abs(float(its_deviation) - float(deviation)) <= 0.1, name
    assert (tmp_path / "new" / "samplers.png").read_bytes().startswith(b"\x89PNG")
