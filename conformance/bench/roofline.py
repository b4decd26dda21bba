"""The machine's two ceilings, and the time below which no implementation can finish."""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Cost

SECONDS = 1.0  # how long each ceiling is measured


@dataclass(frozen=True)
class Machine:
    """Where a bench runs, and what can be reached there in the best case."""

    name: str
    """Host, chip, threads and version of torch."""
    device: str
    """`"cpu"` or `"cuda"`."""
    dtype: str
    """Of the operands."""
    flops: float
    """Operations a second of a large matrix product."""
    bytes: float
    """Bytes a second of a large copy, read and written."""

    def seconds(self, cost: Cost) -> float:
        """The roofline time: the slower of computing and moving the data, each at its ceiling."""
        return max(cost.flops / self.flops, cost.bytes / self.bytes)


def this_machine(dtypes: tuple[str, ...], ceilings: Path | None = None, *, quick: bool = False) -> Machine:
    """Measures the ceilings of the GPU, or of the CPU where there is no GPU; once in a process.

    The best ever seen is kept in a file, by machine, since other processes can only lower what is measured.

    Args:
        dtypes: To choose from: bfloat16 is preferred on a GPU, float32 on a CPU; else it is the first.
        ceilings: The file; by default `gaugeblock/ceilings.json` in the user's cache folder.
        quick: What is in the file is taken as it is.
    """
    device, dtype = where(dtypes)
    ceilings = ceilings or _cache_file()
    known, name = _read(ceilings), _name(device)
    before = known.get(f"{name}, {dtype}")
    if before and quick:
        return Machine(**before)
    flops, bytes_ = _measure(device, getattr(torch, dtype))
    if before:
        flops, bytes_ = max(flops, before["flops"]), max(bytes_, before["bytes"])
    machine = Machine(name, device, dtype, flops, bytes_)
    with suppress(OSError):  # a folder that cannot be written to: measured again next time
        ceilings.parent.mkdir(parents=True, exist_ok=True)
        ceilings.write_text(json.dumps(known | {f"{name}, {dtype}": asdict(machine)}, indent=1))
    return machine


def where(dtypes: tuple[str, ...]) -> tuple[str, str]:
    """The device of a bench and, of those dtypes, the one: bfloat16 on the GPU if there is one, else float32 on the CPU."""
    device, preferred = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    return device, preferred if preferred in dtypes else dtypes[0]


@cache
def _measure(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Operations and bytes a second."""
    size = 2048 if device == "cpu" else 8192
    left, right, product = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    length = 2**26 if device == "cpu" else 2**28
    source, target = (torch.ones(length, device=device) for _ in range(2))
    matmul = _shortest(lambda: torch.mm(left, right, out=product), device)
    copy = _shortest(lambda: target.copy_(source), device)
    return 2 * size**3 / matmul, 2 * source.nbytes / copy


def _shortest(call: Callable[[], object], device: str) -> float:
    """The shortest of the calls that fit into `SECONDS`, after one that does not count."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    shortest, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def _name(device: str) -> str:
    on_cpu = f"{processor()}, {torch.get_num_threads()} threads"
    chip = torch.cuda.get_device_name() if device == "cuda" else on_cpu
    return f"{platform.node()}, {chip}, torch {torch.__version__}"


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gaugeblock" / "ceilings.json"


def _read(ceilings: Path) -> dict[str, dict[str, Any]]:
    with suppress(OSError, ValueError):  # none yet, or not JSON: it is written anew
        return json.loads(ceilings.read_text())
    return {}
