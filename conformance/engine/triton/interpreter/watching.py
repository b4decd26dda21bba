"""`watch`: which Triton kernels are launched, and on the CPU how they run and what they do wrong."""

import importlib.util
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from gaugeblock.conformance.engine.triton.interpreter.memory import Extent, extents_of
from gaugeblock.conformance.engine.triton.patching import wrapped


@dataclass
class Watch:
    """What the kernels did inside `watch`."""

    launches: Counter[str] = field(default_factory=Counter)
    """Launches per kernel name; the evidence that a kernel really ran."""
    races: list[str] = field(default_factory=list)
    """Elements that two programs of one launch write, none of it by atomics; a sentence for each."""
    unbatched: list[str] = field(default_factory=list)
    """Launches that ran under Triton's own interpreter, and the operation that asks for it."""
    _reachable: list[Extent] = field(default_factory=list)
    _poison: bool = False
    _order: random.Random | None = None


_watching: list[Watch] = []  # the innermost last


@contextmanager
def watch(reachable: Iterable[Any] = (), *, poison: bool = False, order: int | None = None) -> Iterator[Watch]:
    """Counts kernel launches and, where kernels are interpreted, runs them in an interpreter of our own and watches them.

    All programs of a launch run in lockstep, in arithmetic that is the same on every CPU. An enabled lane of a load, store or
    atomic may touch only the bytes that the sizes and strides of the launch's tensor arguments span (not their whole storage, so
    that views inside guarded buffers are guarded too). Lanes masked without `other` load 0, as on the chips that there are.

    May be nested: launches count everywhere, and the innermost says how they run. Not thread-safe. Does nothing without Triton;
    on a GPU it counts. Launches replayed from a CUDA graph are not seen.

    Args:
        reachable: Tensors that every launch may touch besides its arguments, for kernels that reach them through addresses, such
            as a table of pointers.
        poison: Lanes masked without `other` load NaN or, for integers, by turns a large, a negative and a zero value.
        order: A seed: each launch runs its programs once each, in an order drawn from it, a few at a time. Programs that are
            independent, as a GPU demands, give the same bits in any order.

    Yields:
        The `Watch`, whose attributes stay readable afterwards.

    Raises:
        OutOfBoundsAccess: Out of the launch, naming the kernel, the program, the access and the distance.
    """
    seen = Watch(
        _reachable=[extent for tensor in reachable for extent in extents_of("an input", tensor)],
        _poison=poison,
        _order=None if order is None else random.Random(order),
    )
    if importlib.util.find_spec("triton") is None:
        yield seen
        return
    with ExitStack() as patches:
        if not _watching:
            patches.enter_context(_patched_triton())
        _watching.append(seen)
        patches.callback(_watching.pop)
        yield seen


@contextmanager
def _patched_triton() -> Iterator[None]:
    from triton.runtime import autotuner, interpreter, jit

    with (
        wrapped(jit.JITFunction, "run", _run_compiled),
        wrapped(interpreter.InterpretedFunction, "run", _run_interpreted),
        wrapped(autotuner.Autotuner, "run", _run_tuned),
    ):
        yield


def _run_compiled(run: Callable, kernel: Any, *args: Any, **kwargs: Any) -> Any:
    if not kwargs["warmup"]:
        _count(kernel)
    return run(kernel, *args, **kwargs)


def _run_interpreted(run: Callable, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    if warmup:
        return
    from gaugeblock.conformance.engine.triton.interpreter.control_flow import Unbatched
    from gaugeblock.conformance.engine.triton.interpreter.launch import Launch

    _count(kernel)
    reachable = [extent for each in _watching for extent in each._reachable]
    launch = Launch(kernel, args, kwargs, grid, reachable, _watching[-1]._poison, _watching[-1]._order)
    try:
        races = launch.run()
    except Unbatched as operation:
        for each in _watching:
            each.unbatched.append(f"{kernel.fn.__name__}: {operation}")
        launch.run_one_by_one(lambda: run(kernel, *args, grid=grid, warmup=False, **kwargs))
        return
    for each in _watching:
        each.races += races


def _count(kernel: Any) -> None:
    for each in _watching:
        each.launches[kernel.fn.__name__] += 1


def _run_tuned(run: Callable, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Has `triton.autotune` take the first of an interpreted kernel's configurations without trying any.

    To time them it asks for a GPU's driver; and each new shape would run them all: 240 launches for the five kernels of Liger's
    experts, and no verdict within two minutes.
    """
    import triton
    from triton.runtime import driver

    from gaugeblock.conformance.engine.triton.chips import CHIPS
    from gaugeblock.conformance.engine.triton.driver import driver_of

    if not triton.knobs.runtime.interpret:
        return run(tuner, *args, **kwargs)
    before, stand_in = driver._active, driver_of(CHIPS["sm_90"])
    stand_in.get_benchmarker = lambda: lambda call, quantiles, **_: [1.0] * len(quantiles)
    driver.set_active(stand_in)
    try:
        return run(tuner, *args, **kwargs)
    finally:
        driver._active = before
