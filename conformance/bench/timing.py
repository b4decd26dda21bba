"""Times of several calls, taken in turn, with the samples left out during which other processes were busy."""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

SHORTEST_SAMPLE = 0.1  # seconds: /proc/stat counts in hundredths
QUIET_SAMPLES = 15
QUIET = 0.1  # of the cores' time, taken by other processes
PATIENCE = 3
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt


@dataclass(frozen=True)
class Sample:
    """Some calls in a row."""

    elapsed: float
    """Seconds of all of them."""
    calls: int
    """How many."""
    others: float
    """The share of the cores' time that other processes took meanwhile."""

    @property
    def is_quiet(self) -> bool:
        """Whether other processes hardly disturbed it."""
        return self.others < QUIET


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    """Of the quiet samples, or of all if none was quiet."""
    best: float
    """The shortest sample."""
    samples: int
    """How many were taken."""
    quiet: int
    """How many other processes hardly disturbed."""


def measure(calls: Mapping[str, Callable[[], object]], device: str, seconds: float, until: float = math.inf) -> dict[str, Timing]:
    """Times each call, all of them in turn, so that a slow minute of the machine falls on all alike.

    Args:
        calls: What to time, warmed up; each returns when its work is done, or has queued it on the GPU.
        device: On `"cuda"` the GPU's own clock times each call, with a cold cache.
        seconds: For each call; `PATIENCE` times as long while none of its samples is quiet.
        until: The end of the time, as `time.monotonic` counts.

    Returns:
        Those of which there is a sample.
    """
    if device == "cuda":
        return {name: _on_gpu(call, seconds) for name, call in calls.items() if time.monotonic() < until}
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    while pending := [name for name in calls if time.monotonic() < until and not _is_enough(samples[name], seconds)]:
        for name in pending:
            if time.monotonic() < until:
                samples[name].append(_sample(calls[name]))
    return {name: _summary(each) for name, each in samples.items() if each}


def keep_freed_memory() -> bool:
    """Has malloc keep what is freed, as jemalloc would, so that no call is timed with fresh memory.

    The page faults of fresh memory took 0.2 to 1.1 ms a megabyte on one machine within an hour, for gradients
    of 200 MB 10 to 40 % of the time, and say nothing of an operation.

    Returns:
        Whether malloc complies; only glibc's does.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1
    return False


def _is_enough(samples: list[Sample], seconds: float) -> bool:
    quiet = sum(each.is_quiet for each in samples)
    spent = sum(each.elapsed for each in samples)
    return quiet >= QUIET_SAMPLES or spent > (seconds if quiet else PATIENCE * seconds)


def _sample(call: Callable[[], object]) -> Sample:
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    calls, elapsed = 0, 0.0
    while elapsed < SHORTEST_SAMPLE:
        call()
        calls, elapsed = calls + 1, time.perf_counter() - start
    others = (_busy_seconds() - busy) - (time.process_time() - own)
    return Sample(elapsed, calls, others / (elapsed * torch.get_num_threads()))


def _summary(samples: list[Sample]) -> Timing:
    every = [each.elapsed / each.calls for each in samples]
    quiet = [each.elapsed / each.calls for each in samples if each.is_quiet]
    return Timing(statistics.median(quiet or every), min(every), len(every), len(quiet))


def _busy_seconds() -> float:
    """Seconds that all cores together have worked since the start; 0 where the system does not tell."""
    with suppress(OSError):
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / 100
    return 0.0


def _on_gpu(call: Callable[[], object], seconds: float) -> Timing:
    import triton

    milliseconds = triton.testing.do_bench(call, rep=round(1e3 * seconds), return_mode="all")
    samples = [each / 1e3 for each in milliseconds]
    return Timing(statistics.median(samples), min(samples), len(samples), len(samples))
