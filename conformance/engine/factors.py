"""What a case can be like: factors, their classes, and traits of values; the vocabulary in which a contract says what to cover.

A kernel treats cases in different ways: one expert chosen or three, a tile of tokens or one more. A *factor* is what is looked at
(`top_k`), a *class* of it is what is expected to be treated in one way ("2", "4 and more").
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


ORDINARY = "ordinary"  # the class of a case that has none of a factor's traits


@dataclass(frozen=True)
class Factor:
    """A size or an option, and its classes."""

    name: str
    """As the report prints it."""
    classify: Callable[[Any], str]
    """The class that a value lies in."""
    _: KW_ONLY
    values: tuple[Any, ...] = ()
    """Of which cases are built, of each class one or more; none for what only follows from other factors."""
    of: Callable[[Mapping[str, Any]], Any] | None = None
    """Reads the value from a case's parameters; by default the one of that name."""
    option: bool = False
    """Whether it is no size: a compiler that sees the same shapes again still has to compile anew."""

    def class_of(self, parameters: Mapping[str, Any]) -> str:
        """The class that a case's parameters lie in."""
        return self.classify(parameters[self.name] if self.of is None else self.of(parameters))


@dataclass(frozen=True)
class Trait:
    """What inputs of the main regime may have on top: a value or a dtype that kernels treat in a way of its own."""

    name: str
    """Of the class, among those of `factor`: "one of them is 0"."""
    factor: str
    """What it is about; of one factor's traits a case has at most one."""
    change: Callable[[dict[str, "torch.Tensor"]], Mapping[str, "torch.Tensor"]] | None = None
    """From the inputs in float64 and int64, those that are to be replaced; inputs that have the trait are not changed. Rows stay
    different: errors of equal ones are equal, and no sample."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Of arguments, other than the contract's."""
    fits: Callable[[Mapping[str, Any]], bool] = lambda parameters: True
    """The parameters at which it can be had."""


def edges(name: str, *starts: int, of: Callable[[Mapping[str, Any]], int] | None = None, option: bool = False) -> Factor:
    """Classes of a number that begin at `starts`: `edges("top_k", 1, 2, 3, 5)` has "1", "2", "3 to 4" and "5 and more"."""
    ends = [following - 1 for following in starts[1:]]
    names = [str(start) if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=False)]
    names.append(f"{starts[-1]} and more")
    return Factor(name, lambda value: names[max(0, bisect_right(starts, value) - 1)], values=starts, of=of, option=option)


def either(name: str, *values: Any) -> Factor:
    """An option with a class for each of its values."""
    return Factor(name, _name_of, values=values, option=True)


def _name_of(value: Any) -> str:
    """A value in words; of a float, the shortest that gives the same number of float32, which is what a call is given."""
    if not isinstance(value, float):
        return str(value)
    import numpy as np  # not where a contract is only read

    return str(np.float32(value))


def kinds(
    name: str, classify: Callable[[int], str], *values: int, of: Callable[[Mapping[str, Any]], int] | None = None
) -> Factor:
    """A number whose classes are kinds, and numbers of each kind."""
    return Factor(name, classify, values=values, of=of)


def kind_of_count(value: int) -> str:
    """Of experts or the like: lanes are padded to a power of two, and ids may have eight bits."""
    if value > 255:
        return "above 255"
    if value <= 2:
        return str(value)
    return "a power of two" if value & (value - 1) == 0 else "no power of two"


def kind_of_width(value: int) -> str:
    """Of a dimension that products sum over: 1, odd, a multiple of 16 or not, longer than the usual tile."""
    if value == 1:
        return "1"
    if value > 64:
        return "above 64"
    if value % 2:
        return "odd"
    return "a multiple of 16" if value % 16 == 0 else "even"
