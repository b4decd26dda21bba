"""The demo's trainings, a short version: both frameworks learn, their curves agree, the pictures are drawn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.timeout(400)  # Stable Diffusion: 88 s alone, 50 of them to compile, and on two busy cores twice that
@pytest.mark.parametrize(
    ("script", "begins_at", "falls_below", "pictures"),
    [
        ("train_digits.py", 1.7, 1.25, ("digits.png", "loss.png")),
        ("train_stable.py", 0.9, 0.75, ("stable.png", "stable_loss.png")),
        ("train_moe_lm.py", 4.6, 4.3, ("moe_lm_loss.png", "moe_lm_load.png")),
        ("train_cycle.py", 4.6, 4.2, ("cycle_loss.png",)),
    ],
)
def test_both_frameworks_learn_along_the_same_curve(script, begins_at, falls_below, pictures, tmp_path):
    command = [sys.executable, str(ROOT / "demo" / script), "--steps", "20", "--folder", str(tmp_path / "new")]
    # As a user runs it: with the flags by which tests' JAX compiles quickly, the steps of a UNet take four times as long.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380)
    assert run.returncode == 0, run.stdout + run.stderr
    losses = re.findall(r"(PyTorch|JAX): final loss ([\d.]+)", run.stdout)
    assert [name for name, _ in losses] == ["PyTorch", "JAX"]
    assert all(float(loss) < falls_below for _, loss in losses), f"the loss does not fall: it begins at {begins_at}"
    assert "curves: within the growth of rounding errors" in run.stdout
    for picture in pictures:
        assert (tmp_path / "new" / picture).read_bytes().startswith(b"\x89PNG")
