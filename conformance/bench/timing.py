"""Times of several calls, taken in turn, with the samples left out during which other processes were busy."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

SHORTEST_SAMPLE = 0.1  # seconds: /proc/stat counts in hundredths
MOST_SAMPLES = 15
QUIET = 0.1  # of the cores' time, taken by other processes


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: Of the quiet samples, or of all if none was quiet.
        best: The shortest sample.
        samples: How many were taken.
        quiet: During how many of them other processes took less than a tenth of the cores' time.
    """

    median: float
    best: float
    samples: int
    quiet: int


def measure(calls: Mapping[str, Callable[[], object]], device: str, seconds: float) -> dict[str, Timing]:
    """Times each call, all of them in turn, so that a slow minute of the machine falls on all alike.

    Args:
        calls: What to time, warmed up; each returns when its work is done, or has queued it on the GPU.
        device: On `"cuda"` the GPU's own clock times each call, with a cold cache.
        seconds: For each call; at least one sample is taken.
    """
    if device == "cuda":
        return {name: _on_gpu(call, seconds) for name, call in calls.items()}
    loops = {name: _loops(call) for name, call in calls.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    while pending := [name for name in calls if spent[name] < seconds and len(samples[name]) < MOST_SAMPLES]:
        for name in pending:
            samples[name].append(_sample(calls[name], loops[name]))
            spent[name] += samples[name][-1][0] * loops[name]
    return {name: _summary(each) for name, each in samples.items()}


def _loops(call: Callable[[], object]) -> int:
    """How often to call for one sample."""
    shortest, end = float("inf"), time.perf_counter() + SHORTEST_SAMPLE
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return max(1, round(SHORTEST_SAMPLE / shortest))


def _sample(call: Callable[[], object], loops: int) -> tuple[float, float]:
    """Seconds of one call, and the share of the cores that other processes took meanwhile."""
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(loops):
        call()
    elapsed = time.perf_counter() - start
    others = (_busy_seconds() - busy) - (time.process_time() - own)
    return elapsed / loops, others / (elapsed * torch.get_num_threads())


def _summary(samples: list[tuple[float, float]]) -> Timing:
    every = [seconds for seconds, _ in samples]
    quiet = [seconds for seconds, others in samples if others < QUIET]
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
