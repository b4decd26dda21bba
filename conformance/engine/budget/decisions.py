"""What a reference decides: where floating numbers become integers or truth values, and how that is replayed.

A reference says `topk`, `argmax`, `max`, `sort`, `argsort` or `scores > threshold` as any code would. `Decisions` watches a
run, operation by operation, and keeps each that makes integers or truth values. From the output that is the choice, `replay_of`
follows them back to the operations that took floating numbers: those decided, and in a replay they return another choice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointError

from gaugeblock.conformance.engine.budget.dispatch import Watching, tensors_in
from gaugeblock.conformance.engine.budget.error_budget import NOISE_RUNS
from gaugeblock.conformance.engine.budget.rounding_noise import RoundingNoise, exact_draws
from gaugeblock.conformance.engine.budget.runs import Runs, RunsDiffer, perform, values_of
from gaugeblock.conformance.engine.calls import apply
from gaugeblock.conformance.engine.contract import Contract, ContractError
from gaugeblock.conformance.engine.vocabulary import Tensors

# A case is redrawn if rounding this many times as coarse decides anything in it. A choice so near a tie that honest rounding
# turns it once in 6 calls passes 12 runs of its own size once in 9 times, of four times its size once in 500
# (conformance/JUDGING.md section 10).
MARGIN = 4.0
JITTER = 2.0**-20  # relative, of what decisions are made from: exact ties, which no rounding disturbs, are found by it

Place = tuple[int, int]  # which operation of a run that makes discrete values, and which of its results


@dataclass(frozen=True)
class Event:
    """An operation that made integers or truth values."""

    results: Mapping[Place, tuple[torch.Tensor, int]]
    """By place, a copy of each, and the memory it lies in."""
    sources: frozenset[int]
    """The memories of its own integers and truth values."""
    numbers: frozenset[int]
    """The memories of the floating numbers that it decides by; none if it does not decide."""

    @property
    def decides(self) -> bool:
        """Whether it made them from floating numbers."""
        return bool(self.numbers)


class Decisions(Watching):
    """Watches how the integers and truth values of a run come about, and replaces some.

    Args:
        replaced: Results that are returned instead of an operation's own; the values that it returns beside indices follow.
        jitter: The generator of a relative disturbance of what decisions are made from; None for none.
    """

    def __init__(self, replaced: Mapping[Place, torch.Tensor] | None = None, jitter: torch.Generator | None = None) -> None:
        super().__init__()
        self.replaced, self.jitter = replaced, jitter
        self.events: list[Event] = []
        self._position = -1
        self._alive: list[torch.Tensor] = []  # so that no memory is used twice

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = tuple(result) if isinstance(result, tuple | list) else (result,)
        if func.is_view or not any(map(_is_discrete, made)):
            return result
        self._position += 1
        if self.replaced is not None:
            made = self._with_replaced(func, args, kwargs, made)
            return type(result)(made) if isinstance(result, tuple | list) else made[0]
        given = list(tensors_in((*args, *kwargs.values())))
        decides = _decides(func, args, kwargs, result)
        if decides and self.jitter is not None:
            with _disable_current_modes():
                result = func(*_disturbed_together(args, partial(_jittered, generator=self.jitter)), **kwargs)
            made = tuple(result) if isinstance(result, tuple | list) else (result,)
        discrete = {(self._position, index): each for index, each in enumerate(made) if _is_discrete(each)}
        self._alive += [*discrete.values(), *given]
        results = {place: (each.clone(), _memory(each)) for place, each in discrete.items()}
        sources = frozenset(_memory(each) for each in given if _is_discrete(each))
        numbers = frozenset(_memory(each) for each in given if each.is_floating_point()) if decides else frozenset()
        self.events.append(Event(results, sources, numbers))
        return result

    def _with_replaced(self, func: Any, args: tuple, kwargs: dict, made: tuple) -> tuple:
        """The results of an operation, some replaced."""
        for index, own in enumerate(made):
            other = (self.replaced or {}).get((self._position, index))
            if other is not None:
                if other.shape != own.shape:
                    raise ContractError(
                        f"{func}: {tuple(other.shape)} cannot replace {tuple(own.shape)}; the run took another way"
                    )
                made = _with_indices(func, args, kwargs, made, index, other.to(own.dtype))
        return made

    def decided(self) -> list[torch.Tensor]:
        """All that was decided, in order."""
        return [value for event in self.events if event.decides for value, _ in event.results.values()]

    def behind(self, choice: torch.Tensor) -> Iterator[tuple[Place, torch.Tensor, Event]]:
        """What `choice` was made from, latest first, back to the decisions: place, value, and the operation."""
        memories = {_memory(choice)}
        for event in reversed(self.events):
            if any(memory in memories for _, memory in event.results.values()):
                if not event.decides:
                    memories |= event.sources
                for place, (value, memory) in event.results.items():
                    if memory in memories:
                        yield place, value, event


def replay_of(run: Callable[[], Tensors], output: str, chosen: torch.Tensor, none: int | None = None) -> Callable[[], Tensors]:
    """The same run with another choice, whatever disturbs its numbers.

    Args:
        run: A run of the reference, giving flat outputs.
        output: The one that is the choice.
        chosen: The choice to be made instead, of the shape of that output.
        none: The value in it that stands for no choice.

    Raises:
        ContractError: Nothing in the run decided that output, or what decided it cannot be replaced by `chosen`.
    """
    with Decisions() as watched:
        own = run()[output]
    replaced: dict[Place, torch.Tensor] = {}
    columns: list[tuple[Place, torch.Tensor]] = []
    numbers: set[int] = set()  # by which the choice is made
    decisions, combined = 0, False
    for place, value, event in watched.behind(own):
        other = _instead(value, own, chosen, none) if event.decides else _copied(value, own, chosen)
        if other is not None:
            replaced[place] = other
            decisions += event.decides
            numbers |= event.numbers
            combined |= own.dtype == torch.bool  # of a decision and what is no decision: a threshold, where tokens are valid
        elif event.decides and own.ndim and value.numel() == own[..., 0].numel():
            columns.append((place, value))
    for event in watched.events:  # a choice that is made twice by the same numbers: a maximum and its index
        for place, (value, _) in event.results.items() if event.numbers & numbers else ():
            other = _instead(value, own, chosen, none)
            if other is not None:
                replaced.setdefault(place, other)
    if not decisions and len(columns) == own.shape[-1]:  # the best, the best but that, and so on
        for column, (place, value) in enumerate(reversed(columns)):
            if not torch.equal(value.reshape(own.shape[:-1]).to(own.dtype), own[..., column]):
                break
            replaced[place] = chosen[..., column].reshape(value.shape)
            decisions += 1
    if not decisions and not combined:
        raise ContractError(f"nothing in the reference could be replayed: no operation on floating numbers decides {output}")

    def replayed() -> Tensors:
        with Decisions(replaced):
            results = run()
        if not torch.equal(results[output].to(chosen.dtype), chosen):
            raise ContractError(f"the replayed reference returns another {output} than it was told to choose")
        return results

    return replayed


def _copied(value: torch.Tensor, own: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor | None:
    """The other choice, if `value` is the whole of the reference's own."""
    same = value.shape == own.shape and torch.equal(value.to(own.dtype), own)
    return chosen if same else None


def _instead(value: torch.Tensor, own: torch.Tensor, chosen: torch.Tensor, none: int | None) -> torch.Tensor | None:
    """What a decision gives where `chosen` is due instead of `own`; None if it is not the choice in any form.

    The forms: the choice itself, or its opposite; ids of which it is the first few (a sort); the ids of a mask; whether
    anything is chosen.
    """
    is_mask, are_ids = own.dtype == torch.bool, value.dtype != torch.bool
    if value.numel() == own.numel() and not (is_mask and are_ids):
        there = value.reshape(own.shape)
        if are_ids:
            kept = _equals(chosen, none)
            known = ((there == own) | _equals(own, none)).all()
            return torch.where(kept, there, chosen.to(there.dtype)).reshape(value.shape) if known else None
        before, after = (own, chosen) if is_mask else (~_equals(own, none), ~_equals(chosen, none))
        if torch.equal(there, before):
            return after.reshape(value.shape)
        return ~after.reshape(value.shape) if torch.equal(there, ~before) else None
    if not are_ids or value.ndim != own.ndim or value.shape[:-1] != own.shape[:-1] or not value.ndim:
        return None
    count = value.shape[-1]
    if is_mask:
        if not torch.equal(torch.zeros_like(own).scatter(-1, value, True), own):
            return None
        everyone = torch.arange(own.shape[-1], device=value.device).expand(own.shape)
        order = torch.cat([value, everyone], -1)
        return _first_distinct(order, count, chosen.gather(-1, order))
    if count < own.shape[-1] or not torch.equal(value[..., : own.shape[-1]].to(own.dtype), own):
        return None
    order = torch.cat([chosen.to(value.dtype), value], -1)
    return _first_distinct(order, count, torch.ones_like(order, dtype=torch.bool))


def _equals(ids: torch.Tensor, none: int | None) -> torch.Tensor:
    """Where nothing is chosen."""
    return torch.zeros_like(ids, dtype=torch.bool) if none is None else ids == none


def _first_distinct(ids: torch.Tensor, count: int, wanted: torch.Tensor) -> torch.Tensor:
    """Of each row the first `count` distinct ids that are wanted, and after them others, in their order."""
    earlier = torch.ones(ids.shape[-1], ids.shape[-1], dtype=torch.bool, device=ids.device).tril(-1)
    repeated = ((ids.unsqueeze(-1) == ids.unsqueeze(-2)) & earlier).any(-1)
    rank = repeated * 2 + ~wanted
    return ids.gather(-1, rank.argsort(dim=-1, stable=True)[..., :count])


def _with_indices(func: Any, args: tuple, kwargs: dict, made: tuple, index: int, other: torch.Tensor) -> tuple:
    """The results of an operation with other indices, and the values that lie there."""
    if func._schema.is_mutable:
        return (*made[:index], made[index].copy_(other), *made[index + 1 :])
    results = list(made)
    results[index] = other
    for position, values in enumerate(made):
        if isinstance(values, torch.Tensor) and values.is_floating_point():
            named = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
            dimension = named.get("dim", -1)
            along = values.shape == other.shape and values.ndim < args[0].ndim  # the dimension is gone
            at = other.unsqueeze(dimension) if along else other
            there = torch.take_along_dim(args[0], at, dimension)
            results[position] = there.squeeze(dimension) if along else there
    return tuple(results)


def _is_discrete(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex()


def _only_creates(func: Any) -> bool:
    """Whether an operation takes a tensor for its shape alone."""
    name = func.overloadpacket.__name__
    return name.endswith("_like") or name.startswith("new_")


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def rounding_decides(contract: Contract, inputs: Tensors, options: Mapping[str, Any], dtype: str, *, ties_matter: bool) -> bool:
    """Whether any run of the reference under rounding noise decides otherwise than the exact one.

    Args:
        inputs: Flat, in float64.
        dtype: Of the rounding.
        ties_matter: Whether what is tied exactly, and so is not disturbed by rounding, counts as undecided.

    Raises:
        ContractError: The reference decides nothing.
    """

    def run() -> None:
        apply(contract, contract.reference, inputs, options, torch.stack)

    with Decisions() as watched:
        run()
    exact = watched.decided()
    if not exact:
        raise ContractError(f"{contract.name} is said to choose inside, but its reference makes no decision")

    def same(decided: list[torch.Tensor]) -> bool:
        return len(decided) == len(exact) and all(map(torch.equal, decided, exact))

    def jitter(seed: int) -> torch.Generator | None:
        return torch.Generator().manual_seed(seed) if ties_matter else None

    def noise(seed: int, **how: Any) -> RoundingNoise:
        return RoundingNoise(dtype, "eager", seed, scale=MARGIN, **how)

    try:
        with suppress(RunsDiffer):  # of what torch has no form for at once
            with noise(0, runs=NOISE_RUNS), exact_draws(), DecisionsAtOnce(NOISE_RUNS, jitter(0)) as at_once:
                run()
            return not same(at_once.decided)
        for seed in range(NOISE_RUNS):
            with noise(seed), exact_draws(), Decisions(jitter=jitter(seed)) as watched:
                run()
            if not same(watched.decided()):
                return True
    except (Parted, CheckpointError):  # or what is computed a second time, for the backward pass, was decided otherwise
        return True
    return False


class Parted(Exception):
    """Runs at once decide differently."""


class DecisionsAtOnce(Watching):
    """Watches what several runs at once decide, and ends them where they part.

    Args:
        runs: How many.
        jitter: As of `Decisions`; another one in each run.
    """

    def __init__(self, runs: int, jitter: torch.Generator | None) -> None:
        super().__init__()
        self.runs, self.jitter = runs, jitter
        self.decided: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _decides(func, args, kwargs, result):
            return result
        if self.jitter is not None:
            with _disable_current_modes():
                result = perform(func, _disturbed_together(args, self._with_noise), kwargs, self.runs)
        for each in tensors_in((result,)):
            if isinstance(each, Runs) and _is_discrete(each):
                raise Parted(f"{func} comes to something else in another run")
            if _is_discrete(each):
                self.decided.append(each.clone())
        return result

    def _with_noise(self, value: torch.Tensor) -> torch.Tensor:
        return Runs(_jittered(values_of(value, self.runs), self.jitter))


def _decides(func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> bool:
    """Whether an operation makes integers or truth values from floating numbers."""
    if func.is_view or not any(map(_is_discrete, tensors_in((result,)))) or _only_creates(func):
        return False
    return any(each.is_floating_point() for each in tensors_in((*args, *kwargs.values())))


def _disturbed_together(values: tuple, disturbed: Callable[[torch.Tensor], torch.Tensor]) -> tuple:
    """Floating tensors disturbed; one that is given twice is still one: isfinite compares it with itself."""
    floating = {id(each): each for each in values if isinstance(each, torch.Tensor) and each.is_floating_point()}
    once = {name: disturbed(each) for name, each in floating.items()}
    return tuple(once.get(id(each), each) for each in values)


def _jittered(values: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    noise = torch.empty(values.shape, dtype=values.dtype).uniform_(-JITTER, JITTER, generator=generator)
    return torch.where(values.isfinite(), values + values * noise, values)
