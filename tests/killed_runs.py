"""Training runs that are killed at drawn moments and taken up again, by a process that imports once and forks the ranks of each.

    python killed_runs.py torch|jax FOLDER KILLS

Prints how many runs were killed while they wrote, and how many steps were made. Exits with 0 if no step that was saved was lost,
and the last run, which nobody kills, ends as one that was never interrupted.
"""

import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gaugeblock.reference import saved_runs

RANKS = 2  # of the run in torch
BEFORE = 3  # steps of a run that is measured: within its time the others are killed
AFTER = 2  # steps of the last run

Rank = Callable[[Path, int, float, int], None]
"""One rank of a run: of its folder, the rank, the step to end with, and a file to write to once it begins with its steps."""


def run_torch(folder: Path, rank: int, end: float, begins: int) -> None:
    store = folder.parent / f"{folder.name}-{os.getppid()}-{os.environ['ATTEMPT']}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    sharded = ShardedTrainer(state_of(), config=CONFIG, mesh=init_device_mesh("cpu", (RANKS,)))
    if last := saved_runs.last_saved(folder):
        sharded.run.load(last)
    os.write(begins, b"1")
    while int(sharded.run.updates) < end:
        sharded.step(*(each.tensor_split(RANKS)[rank] for each in batch_of_step(int(sharded.run.updates))))
        sharded.run.save(folder)
    training.save_state(sharded.state(), folder / f"whole-{rank}.safetensors")


def run_jax(folder: Path, rank: int, end: float, begins: int) -> None:
    state = {"model.a": jnp.arange(100_000.0), "step": jnp.array(0)}
    if last := saved_runs.last_saved(folder):
        state = jax_runs.load(last, state, config=CONFIG)
    os.write(begins, b"1")
    while int(state["step"]) < end:
        state = {"model.a": 0.5 * state["model.a"] + state["step"], "step": state["step"] + 1}
        jax_runs.save(state, folder, config=CONFIG)
    jax_training.save_state(state, folder / f"whole-{rank}.safetensors")


def start(run: Rank, folder: Path, ranks: int, end: float) -> list[int]:
    """Fork the ranks of a run, and return once all begin with their steps."""
    begins, told = os.pipe()
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                run(folder, rank, end, told)
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        processes.append(process)
    os.close(told)
    for _ in range(ranks):
        assert select.select([begins], [], [], 60)[0] and os.read(begins, 1), "a rank has not begun"
    os.close(begins)
    return processes


def main(run: Rank, ranks: int, folder: Path, kills: int) -> None:
    drawn, killed, whole, measured = random.Random(0), folder / "killed", folder / "whole", folder / "measured"
    for each in (killed, whole, measured):
        each.mkdir()
    os.environ["ATTEMPT"] = "first"
    processes, began = start(run, measured, ranks, BEFORE), time.perf_counter()
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * ranks
    longest, while_writing = time.perf_counter() - began, 0
    for attempt in range(kills):
        os.environ["ATTEMPT"] = str(attempt)
        last = max(saved_runs.saved_steps(killed), default=0)
        processes = start(run, killed, ranks, float("inf"))
        time.sleep(drawn.uniform(0, longest))
        for process in drawn.sample(processes, ranks):
            os.kill(process, signal.SIGKILL)
        for process in processes:
            assert os.waitpid(process, 0)[1] == signal.SIGKILL, "a rank ended by itself"
        assert max(saved_runs.saved_steps(killed), default=0) >= last, "what was saved is lost"
        while_writing += any(killed.glob(".step_*"))
    end = max(saved_runs.saved_steps(killed), default=0) + AFTER
    os.environ["ATTEMPT"] = "last"
    for each in (killed, whole):
        assert [os.waitpid(process, 0)[1] for process in start(run, each, ranks, end)] == [0] * ranks
    assert not any(killed.glob(".step_*")), "what was begun is still there"
    for rank in range(ranks):
        assert (killed / f"whole-{rank}.safetensors").read_bytes() == (whole / f"whole-{rank}.safetensors").read_bytes()
    print(f"{while_writing} of {kills} killed while they wrote; {end} steps")


if __name__ == "__main__":
    from spoilt_runs import CONFIG

    framework, place, number = sys.argv[1:]
    if framework == "torch":
        import torch.distributed as dist
        from spoilt_runs import batch_of_step, state_of
        from torch.distributed.device_mesh import init_device_mesh

        from gaugeblock.optimized.distributed.train_image_diffusion import ShardedTrainer
        from gaugeblock.reference.torch import training

        main(run_torch, RANKS, Path(place), int(number))
    else:
        import jax.numpy as jnp

        from gaugeblock.optimized.jax import saved_runs as jax_runs
        from gaugeblock.reference.jax import training as jax_training

        main(run_jax, 1, Path(place), int(number))
