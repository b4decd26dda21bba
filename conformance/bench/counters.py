"""What one call allocates, dispatches and launches: the same every time, so that a change of it is a finding and no noise."""

import gc
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gaugeblock.conformance.bench.competitors import JaxCall
from gaugeblock.conformance.engine.triton.interpreter import watch

WARM_UP = 2  # calls, in which kernels are compiled and tables built
COPIES = ("Memcpy", "Memset")
UNCOUNTED = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")  # instructions of XLA that do no work


@dataclass(frozen=True)
class Counters:
    """One call's needs; None where they cannot be told."""

    bytes_allocated: int | None
    """Of all tensors made on the way, results among them."""
    peak_bytes: int | None
    """The most that was held at a time, beside what was there before."""
    operations: int | None
    """Dispatched by torch, nested ones too; or instructions of the compiled JAX program."""
    kernels: int | None
    """Launched: on a GPU all of them, on a CPU those of Triton."""


def count(call: Callable[[], object], device: str) -> Counters:
    """Counts one call, after some that do not count."""
    if isinstance(call, JaxCall):
        return _count_jax(call)
    for _ in range(WARM_UP):
        call()
    gc.collect()
    gc.disable()  # what a cycle holds would be freed at any time
    try:
        return _count_cuda(call) if device == "cuda" else _count_cpu(call)
    finally:
        gc.enable()


def _count_cpu(call: Callable[[], object]) -> Counters:
    launches: Any = watch() if "triton" in sys.modules else nullcontext()
    with launches as seen, _profiled(ProfilerActivity.CPU, profile_memory=True) as profiler:
        results = call()
    events = profiler.profiler.kineto_results.events()
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns()) if each.name() == "[memory]"]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    del results
    operations = sum(each.name().startswith("aten::") for each in events)
    return Counters(sum(each for each in changes if each > 0), peak, operations, seen.launches.total() if seen else 0)


def _count_cuda(call: Callable[[], object]) -> Counters:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, allocated = torch.cuda.memory_allocated(), _allocated_so_far()
    results = call()
    torch.cuda.synchronize()
    bytes_allocated, peak = _allocated_so_far() - allocated, torch.cuda.max_memory_allocated() - held
    del results
    with _profiled(ProfilerActivity.CPU, ProfilerActivity.CUDA) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    on_gpu = [each.name for each in events if each.device_type == torch.autograd.DeviceType.CUDA]
    operations = sum(each.name.startswith("aten::") for each in events)
    return Counters(bytes_allocated, peak, operations, sum(not name.startswith(COPIES) for name in on_gpu))


def _allocated_so_far() -> int:
    return torch.cuda.memory_stats()["allocated_bytes.all.allocated"]


def _profiled(*activities: ProfilerActivity, **options: Any) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of every start and stop
    return profile(activities=activities, **options)


def _count_jax(call: JaxCall) -> Counters:
    """Read from the compiled program, where there is one."""
    import jax

    if not call.is_one_program:
        return Counters(None, None, None, None)
    program: Any = jax.jit(call.function).lower(call.arrays).compile()  # whose analyses exist on every backend of ours
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    entry = program.as_text().rpartition("ENTRY ")[2].partition("\n}")[0].splitlines()[1:]
    operations = sum(not any(f" {name}(" in line for name in UNCOUNTED) for line in entry)
    return Counters(needed, needed, operations, None)
