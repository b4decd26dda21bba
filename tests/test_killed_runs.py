"""A run that is killed at any moment goes on from the last step that was saved, as if nobody had killed it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(framework, tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "killed_runs.py"), framework, str(tmp_path), str(KILLS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert run.returncode == 0, run.stdout + run.stderr
    told = re.search(r"(\d+) of 20 killed while they wrote; (\d+) steps", run.stdout)
    assert told and int(told[1]) > 0 and int(told[2]) > 2, (
        run.stdout
    )  # else nothing was interrupted, or only before the first step
