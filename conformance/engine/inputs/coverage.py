"""Cases that are chosen to cover: few of them visit every pair (every triple) of classes of a contract's factors.

Own lines instead of a library: what PyPI has (allpairspy, covertable) takes values and a filter, and knows nothing of sizes that
follow from others, of values that only a landmark has, of landmarks to begin with, and of which of two points is cheaper.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from operator import itemgetter
from random import Random
from typing import Any

from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.factors import ORDINARY
from gaugeblock.conformance.engine.inputs.cases import LAYOUTS, Case, Layout
from gaugeblock.conformance.engine.judging.verdict import Coverage

POOL = 3000  # points that are looked at: a pair of classes that one in 300 has is among them but for one time in 20,000
TUPLES = {1: "classes", 2: "pairs", 3: "triples"}
OF_LAYOUTS = ", and layouts of each argument"
OF_OPTIONS = "classes, and pairs of options"


@dataclass(frozen=True)
class Demand:
    """What is to be visited: all classes, all pairs or triples of classes; of what is compiled, classes and pairs of options.

    With `layouts` also every layout of all arguments, and of each alone.
    """

    strength: int
    compiled: bool = False
    layouts: bool = False

    @property
    def of(self) -> str:
        """What is counted."""
        return (OF_OPTIONS if self.compiled else TUPLES[self.strength]) + (OF_LAYOUTS if self.layouts else "")


class Space:
    """The factors of a contract and the points that can be built; sets of visited tuples are the bits of an integer."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.traits: dict[str, list[str]] = {}
        for trait in contract.traits:
            self.traits.setdefault(trait.factor, []).append(trait.name)
        self.names = (*(factor.name for factor in contract.factors), *self.traits)
        self.pool = self._built()
        self._numbers: dict[object, int] = {}  # of classes, each with its place, and of layouts
        self._bits: dict[tuple[int, ...], int] = {}  # a power of two each
        self._masks: dict[tuple[Case, Demand], int] = {}

    def classes(self, case: Case) -> tuple[str, ...]:
        """The class of each factor that a case lies in."""
        parameters = case.parameters
        sizes = [factor.class_of(parameters) for factor in self.contract.factors]
        values = [next((name for name in names if name in case.traits), ORDINARY) for names in self.traits.values()]
        return (*sizes, *values)

    def mask(self, case: Case, demand: Demand) -> int:
        """What of a demand a case visits, a bit for each tuple of classes."""
        found = self._masks.get((case, demand))
        if found is None:
            found = 0
            for each in self._visited(case, demand):
                bit = self._bits.get(each)
                if bit is None:
                    bit = self._bits[each] = 1 << len(self._bits)
                found |= bit
            self._masks[case, demand] = found
        return found

    def _visited(self, case: Case, demand: Demand) -> Iterator[tuple[int, ...]]:
        """The tuples of classes, each class as a number."""
        numbers = [self._number(each) for each in enumerate(self.classes(case))]
        if demand.compiled:
            options = [number for number, factor in zip(numbers, self.contract.factors, strict=False) if factor.option]
            yield from combinations(numbers, 1)
            yield from combinations(options, 2)
        else:
            yield from combinations(numbers, min(demand.strength, len(numbers)))
        if demand.layouts:
            yield (self._number((case.layout, case.laid_out)),)

    def _number(self, what: object) -> int:
        return self._numbers.setdefault(what, len(self._numbers))

    def _built(self) -> list[Case]:
        """Points of random classes that can be built, each with random traits that fit."""
        choose, contract = _chooser(Random(0)), self.contract
        all_traits = [[contract.trait(name) for name in names] for names in self.traits.values()]
        by_class: dict[str, list[list[object]]] = {}
        for factor in contract.factors:
            groups: dict[str, list[object]] = {}
            for value in factor.values:
                groups.setdefault(factor.classify(value), []).append(value)
            if groups:
                by_class[factor.name] = list(groups.values())
        made: dict[Case, None] = {}
        for _ in range(POOL if contract.build else 0):
            assert contract.build is not None
            parameters = contract.build(**{name: choose(choose(groups)) for name, groups in by_class.items()})
            if parameters is None:
                continue
            fitting = [[trait.name for trait in several if trait.fits(parameters)] for several in all_traits]
            chosen = [choose([ORDINARY, *names]) for names in fitting]
            traits = tuple(name for name in chosen if name != ORDINARY)
            made[main_case(contract, **parameters, traits=traits)] = None
        return list(made)


def _chooser(random: Random) -> Callable[[Sequence[Any]], Any]:
    """`random.choice`, which takes twice as long to find out how to draw: a gate chooses a million times."""
    draw = random.getrandbits

    def choose(several: Sequence[Any]) -> Any:
        count = len(several)
        bits = count.bit_length()
        while (place := draw(bits)) >= count:
            pass
        return several[place]

    return choose


@cache
def space(contract: Contract) -> Space:
    """The contract's points, built once."""
    return Space(contract)


def main_case(contract: Contract, **others: object) -> Case:
    """A case of the main regime."""
    return Case(regime=contract.regimes[0].name, **others)  # type: ignore[arg-type]


def select(contract: Contract, points: Sequence[Case], demand: Demand, begun: Iterable[Case] = ()) -> list[Case]:
    """Of the points, few that with those in `begun` visit whatever all of them visit; greedily, the cheaper of equals."""
    room = space(contract)
    masks = [(room.mask(point, demand), -_size(point), point) for point in points]
    missing, chosen = union(mask for mask, _, _ in masks), []
    missing &= ~union(room.mask(case, demand) for case in begun)
    while missing:
        counts = [(mask & missing).bit_count() for mask, _, _ in masks]
        most = max(counts)
        mask, _, best = max((each for each, count in zip(masks, counts, strict=True) if count == most), key=itemgetter(1))
        chosen.append(best)
        missing &= ~mask
        masks = [each for each in masks if each[0] & missing]
    return chosen


def _size(case: Case) -> int:
    numbers = [value for value in case.parameters.values() if isinstance(value, int) and not isinstance(value, bool)]
    return math.prod(max(1, each) for each in numbers)


def union(masks: Iterable[int]) -> int:
    """All bits of any."""
    total = 0
    for mask in masks:
        total |= mask
    return total


@cache
def landmarks(contract: Contract) -> tuple[Case, ...]:
    """The contract's landmarks in the main regime."""
    return tuple(main_case(contract, **sizes, seed=seed) for seed, sizes in enumerate(contract.landmarks))


@cache
def array(contract: Contract, strength: int) -> tuple[Case, ...]:
    """Landmarks, then cases that visit every tuple of classes that can be had; that of a lower strength is its beginning."""
    if not contract.factors:
        return landmarks(contract)
    begun = landmarks(contract) if strength <= 2 else array(contract, strength - 1)
    chosen = select(contract, space(contract).pool, Demand(max(strength, 2)), begun)
    return (*begun, *(case.replace(seed=len(begun) + number) for number, case in enumerate(chosen)))


@cache
def covering(contract: Contract, demand: Demand) -> tuple[Case, ...]:
    """Cases of the main regime that visit what is demanded; all are of `array`, so that properties share their budgets.

    Every landmark is among them, unless each case has to be compiled.
    """
    if demand.strength > 1 and not demand.compiled:
        return array(contract, demand.strength)
    pairs = array(contract, 2)
    begun = pairs[:1] if demand.compiled else landmarks(contract)
    return (*begun, *select(contract, pairs, demand, begun))


def visits(contract: Contract, regime: str, demand: Demand) -> tuple[Case, ...]:
    """What is visited in a regime: in the main one what is demanded, in another every class of sizes and every other landmark.

    What is compiled is visited at the same points in every regime.
    """
    if regime == contract.regimes[0].name or demand.compiled:
        return _in(contract, regime, covering(contract, demand))
    place = [each.name for each in contract.regimes].index(regime)
    begun = landmarks(contract)[place % 2 :: 2] or landmarks(contract)
    built = array(contract, 2)[len(contract.landmarks) :]
    return _in(contract, regime, (*begun, *select(contract, built, Demand(1), begun)))


def few_visits(contract: Contract, regime: str, demand: Demand, count: int) -> tuple[Case, ...]:
    """So many landmarks, one at least, in each regime beginning with another; as many others, those that cover most first."""
    begun = landmarks(contract)
    if demand.compiled:  # what was compiled for one regime serves them all
        return _in(contract, regime, (begun[0], *select(contract, begun, demand, begun[:1]))[: max(1, 2 * count)])
    turn = [each.name for each in contract.regimes].index(regime) % len(begun)
    turned = (*begun[turn:], *begun[:turn])
    return _in(contract, regime, (*turned[: max(1, count)], *array(contract, 2)[len(begun) :][:count]))


def layouts_of(contract: Contract) -> list[tuple[Layout, str]]:
    """Every layout, of all arguments and of each alone; the first five are five layouts, of as many arguments as there are.

    Equal rows of a router's weights would tie all choices inside an operation. Equal rows of all of a model's weights leave one
    channel of it, a norm of which sees no variance; only its other arguments get them.
    """
    names = [spec.name for spec in contract.inputs]
    whose = ["", *names] if len(names) > 1 else [""]
    whose_of = dict.fromkeys(LAYOUTS[1:], whose)
    if contract.chooses_inside:
        del whose_of["broadcast"]
    elif contract.rigid:
        whose_of["broadcast"] = [spec.name for spec in contract.inputs if spec.leaves is None]
    return [
        (layout, names[(turn + place) % len(names)])
        for turn in range(len(whose))
        for place, (layout, names) in enumerate(whose_of.items())
    ]


def laid_out(contract: Contract, points: Sequence[Case], *, sparing: bool = False) -> tuple[Case, ...]:
    """The points, dealt every layout in turn: each point and each layout is there; each layout once alone, if sparing."""
    layouts = layouts_of(contract)[: len(LAYOUTS) - 1 if sparing else None]
    dealt = [(points[turn % len(points)], *layouts[turn % len(layouts)]) for turn in range(max(len(points), len(layouts)))]
    return tuple(case.replace(layout=layout, laid_out=name) for case, layout, name in dealt)


def _in(contract: Contract, regime: str, points: Iterable[Case]) -> tuple[Case, ...]:
    """The cases in a regime; outside the main one values have no traits."""
    if regime == contract.regimes[0].name:
        return tuple(points)
    return tuple(dict.fromkeys(case.replace(regime=regime, traits=()) for case in points))


def measure(
    contract: Contract, cases: Iterable[Case], demand: Demand, *, sparing: bool, seen: Callable[[Case], Case] = lambda case: case
) -> Coverage | None:
    """What of a demand those cases visit that lie in the main regime; None for a contract that names no factors.

    Args:
        seen: What becomes of a case where not all sizes can be had: on ranks.
    """
    if not contract.factors:
        return None
    room, main = space(contract), contract.regimes[0].name
    all_cases = array(contract, max(2, demand.strength))
    due = union(room.mask(seen(case), demand) for case in (laid_out(contract, all_cases) if demand.layouts else all_cases))
    visited = union(room.mask(seen(case), demand) for case in cases if case.regime == main) & due
    return Coverage(visited.bit_count(), due.bit_count(), demand.of, sparing)
