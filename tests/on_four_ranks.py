"""Four processes that tests run functions in, and what they compare there."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

RANKS = 4
NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, TOP_K = 8, 12, 20, 3
TOKENS = {2: [0, 9], 4: [5, 0, 1, 3]}  # of each rank: uneven, some none
LONGEST_SUM = 9 * TOP_K * INTERMEDIATE_SIZE  # of all products here

Ranks = Callable[..., list[Any]]


def join(rank: int, address: str) -> None:
    torch.set_num_threads(1)
    # a rank that waits in vain fails before the test does
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))


def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A fixture: runs a function in every process, and returns what each returned or raised."""
    address = f"file://{tmp_path_factory.mktemp('ranks') / 'store'}"
    context = multiprocessing.get_context("spawn")
    processes = [ProcessPoolExecutor(1, mp_context=context, initializer=join, initargs=(rank, address)) for rank in range(RANKS)]

    def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        futures = [process.submit(function, *arguments) for process in processes]
        return [future.exception(timeout=150) or future.result() for future in futures]

    yield run
    for process in processes:
        process.shutdown()


def mesh_of(ranks: int) -> DeviceMesh:
    """This process's mesh of so many ranks; the other processes have theirs, and do the same."""
    return init_device_mesh("cpu", (RANKS // ranks, ranks), mesh_dim_names=("replicas", "ranks"))["ranks"]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_equal_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Differ by no more than two orders of adding up the longest sum may, each n units (Higham's gamma_n)."""
    largest = max(expected.abs().flatten().tolist(), default=0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=LONGEST_SUM * torch.finfo(expected.dtype).eps * largest)


def out_and_gradients(function: Callable, floats: list[torch.Tensor], cotangent: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in floats]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]
