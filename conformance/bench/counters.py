"""What one call allocates, dispatches and launches: the same every time, so that a change of it is a finding and no noise."""

import gc
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from gaugeblock.conformance.bench.competitors import JaxCall
from gaugeblock.conformance.bench.problem import Direction, Unavailable, make_problem
from gaugeblock.conformance.bench.roofline import Machine
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.devices import available_world_size
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.processes.perform import Conditions
from gaugeblock.conformance.engine.processes.seats import Seat
from gaugeblock.conformance.engine.shardings import fit
from gaugeblock.conformance.engine.trial import Subject
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
    saved_bytes: int | None = None
    """Of all memory that autograd keeps from the forward for the backward pass, the inputs' own among it."""
    collectives: int | None = None
    """That each rank enters, of what runs on several."""
    sent_bytes: float | None = None
    """That all ranks together send each other, for each example of the batch."""


def count(call: Callable[[], object], device: str, *, called: int = 0) -> Counters:
    """Counts one call, after `WARM_UP` that do not count; `called` says how many of those have been made."""
    if isinstance(call, JaxCall):
        return _count_jax(call)
    with _watched():
        for _ in range(WARM_UP - called):
            call()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of every start and stop
    gc.disable()  # what a cycle holds would be freed at any time
    try:
        counted = _count_cuda(call) if device == "cuda" else _count_cpu(call)
        return replace(counted, saved_bytes=_saved_bytes(call))
    finally:
        gc.enable()


def count_on_ranks(implementation: Implementation, contract: Contract, direction: Direction, machine: Machine) -> Counters:
    """Counts what ranks send each other in one call at the contract's first landmark, on the most ranks that there can be.

    Raises:
        Unavailable: If there cannot be as many as it needs.
    """
    subject = Subject(implementation, machine.dtype, machine.device)
    ranks = max((each for each in implementation.world_sizes if each <= available_world_size("torch")), default=0)
    if not ranks:
        raise Unavailable(f"needs {min(implementation.world_sizes)} ranks")
    parameters = fit(subject.sharding, contract.landmarks[0], ranks)
    call = make_problem(contract, parameters, direction, machine).call
    found = Seat(subject, ranks).call(parameters, call, Conditions(world_size=ranks, traffic_counted=True)).findings
    sent = found.sent_bytes / parameters[contract.batch]
    return Counters(None, None, None, None, collectives=found.collectives, sent_bytes=sent)


def _count_cpu(call: Callable[[], object]) -> Counters:
    # not by torch.profiler, which imports torch's compiler: two seconds
    with _watched() as seen, torch.autograd.profiler.profile(profile_memory=True) as profiler:
        results = call()
    events = profiler.kineto_results.events()
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns()) if each.name() == "[memory]"]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    del results
    operations = sum(each.name().startswith("aten::") for each in events)
    return Counters(sum(each for each in changes if each > 0), peak, operations, seen.launches.total() if seen else 0)


def _saved_bytes(call: Callable[[], object]) -> int:
    """Each memory once, however many tensors look at it."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage().data_ptr()
        saved[memory] = max(saved.get(memory, 0), tensor.nbytes)
        return tensor

    with _watched(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(saved.values())


def _watched() -> Any:
    """Where there are kernels, has them interpreted quickly and their launches counted."""
    return watch() if "triton" in sys.modules else nullcontext()


def _count_cuda(call: Callable[[], object]) -> Counters:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, allocated = torch.cuda.memory_allocated(), _allocated_so_far()
    results = call()
    torch.cuda.synchronize()
    bytes_allocated, peak = _allocated_so_far() - allocated, torch.cuda.max_memory_allocated() - held
    del results
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    on_gpu = [each.name for each in events if each.device_type == torch.autograd.DeviceType.CUDA]
    operations = sum(each.name.startswith("aten::") for each in events)
    return Counters(bytes_allocated, peak, operations, sum(not name.startswith(COPIES) for name in on_gpu))


def _allocated_so_far() -> int:
    return torch.cuda.memory_stats()["allocated_bytes.all.allocated"]


def _count_jax(call: JaxCall) -> Counters:
    """Read from the compiled program, where there is one."""
    program = call.compiled()
    if program is None:
        return Counters(None, None, None, None)
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    entry = program.as_text().rpartition("ENTRY ")[2].partition("\n}")[0].splitlines()[1:]
    operations = sum(not any(f" {name}(" in line for name in UNCOUNTED) for line in entry)
    return Counters(needed, needed, operations, None)
