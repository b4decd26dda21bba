"""One call of an implementation under the conditions that a property asks for: all that is done on the candidate's side."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from gaugeblock.conformance.engine.frameworks import CALLERS, Call, LibraryInFloat64, candidates_own
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.registry import find_contract, load
from gaugeblock.conformance.engine.triton.interpreter import watch
from gaugeblock.conformance.engine.vocabulary import Tensors


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under what conditions a candidate is called."""

    grad_mode: Literal["grad", "no_grad", "inference"] = "grad"
    """The mode of autograd around the call."""
    library_in_float64: bool = False
    """Torch's own functions do not depend on the batch (`LibraryInFloat64`)."""
    fresh_memory_is_nan: bool = False
    """Torch fills the memory that it hands out."""
    poisoned_lanes: bool = False
    """What a Triton kernel loads where a mask is off, and no other value is given, is NaN."""
    program_order: int | None = None
    """A seed by which the programs of a Triton launch are shuffled; None for the usual order."""
    unusual_settings: int | None = None
    """A seed of the settings of the process before the call, and whether they are changed is found out."""
    elsewhere: str = ""
    """The input that lies on another device: on the CPU if the others are on a GPU, else on none."""
    world_size: int = 0
    """On how many devices a distributed implementation runs; 0 for one that is not."""
    traffic_counted: bool = False
    """What ranks send to each other is counted."""


USUAL = Conditions()


@dataclass
class Findings:
    """What was seen during a call besides its results."""

    launches: dict[str, int] = field(default_factory=dict)
    """Triton launches by kernel."""
    races: list[str] = field(default_factory=list)
    """Addresses that two programs of a launch wrote, each in a sentence."""
    unbatched: list[str] = field(default_factory=list)
    """Kernels, and what of them only Triton's own interpreter could run."""
    settings_changed: list[str] = field(default_factory=list)
    """Settings of the process that the call left changed."""
    collectives: int = 0
    """How many each rank entered, where they were counted."""
    sent_bytes: int = 0
    """What ranks sent to each other, where it was counted."""


def perform(
    implementation: Implementation, call: Call, conditions: Conditions, mesh_of: Callable[[int], Any] | None = None
) -> tuple[Tensors, Findings]:
    """Calls an implementation.

    Args:
        mesh_of: The device mesh of the first so many ranks, where ranks are processes.

    Returns:
        Results in the candidate's own memory, and what was seen.
    """
    if conditions.world_size:
        mesh = mesh_of(conditions.world_size) if mesh_of else _jax_mesh(conditions.world_size)
        call = replace(call, options=call.options | {"mesh": mesh})
    if conditions.elsewhere:
        there = call.inputs[conditions.elsewhere]
        call = replace(call, inputs=call.inputs | {conditions.elsewhere: there.to("meta" if there.is_cpu else "cpu")})
    findings = Findings()
    with ExitStack() as around:
        around.enter_context(_usual_settings())
        if conditions.fresh_memory_is_nan:
            around.enter_context(_filled_memory())
        if conditions.unusual_settings is not None:
            around.enter_context(_settings_watched(conditions.unusual_settings, findings.settings_changed))
        if conditions.grad_mode != "grad":
            around.enter_context(torch.no_grad() if conditions.grad_mode == "no_grad" else torch.inference_mode())
        if conditions.library_in_float64:
            around.enter_context(LibraryInFloat64())
        watched = around.enter_context(
            watch(call.inputs.values(), poison=conditions.poisoned_lanes, order=conditions.program_order)
        )
        traffic = around.enter_context(_traffic()) if conditions.traffic_counted else None
        with candidates_own():
            function = load(implementation)
        results = CALLERS[implementation.framework](find_contract(implementation.contract), function, call)
    if traffic is not None:
        findings.collectives, findings.sent_bytes = traffic.collectives, traffic.sent_bytes
    findings.launches = dict(watched.launches)
    findings.races, findings.unbatched = list(watched.races), list(watched.unbatched)
    return results, findings


def _traffic() -> Any:
    from gaugeblock.conformance.engine.processes.traffic import counted_traffic

    return counted_traffic()


def _jax_mesh(size: int) -> Any:
    import jax

    return jax.sharding.Mesh(jax.devices()[:size], ("ranks",))


@contextmanager
def _usual_settings() -> Iterator[None]:
    """Puts back what an earlier call may have changed in the process, and what this one does."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def _filled_memory() -> Iterator[None]:
    """Torch fills fresh memory with NaN and huge integers (torch.utils.deterministic.fill_uninitialized_memory)."""
    # what torch.use_deterministic_algorithms does, but for importing torch's compiler, 1 s, to tell it so
    switch = torch._C._set_deterministic_algorithms
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch(True, warn_only=True)
    try:
        yield
    finally:
        switch(before[0], warn_only=before[1])


@contextmanager
def _settings_watched(seed: int, changed: list[str]) -> Iterator[None]:
    """Sets unusual values, which a call that sets usual ones changes, and notes what is changed."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(threads - 1 or 2)  # more than there are cores would wait for each other
    torch.manual_seed(seed)
    torch.rand(1)  # away from where a seed would put the random state
    try:
        before = _settings()
        yield
        changed += [name for name, value in _settings().items() if value != before[name]]
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


def _settings() -> dict[str, Any]:
    return {
        "the default dtype": torch.get_default_dtype(),
        "the random state": torch.get_rng_state().numpy().tobytes(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "the number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
    }
