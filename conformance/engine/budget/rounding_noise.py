"""The rounding of code at the dtype under test, as noise on a float64 run of the reference.

What is disturbed and by how much, with the evidence: conformance/JUDGING.md, sections 3 to 5.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from gaugeblock.conformance.engine.budget.dispatch import Watching, tensors_in
from gaugeblock.conformance.engine.budget.operations import (
    ADDITIONS,
    COMPOSED,
    CONVOLUTIONS,
    MATRIX_PRODUCTS,
    MOST_ULPS,
    MOVES,
    SCATTERED_SUMS,
    SUMS,
    ULPS,
    argument_growth,
)
from gaugeblock.conformance.engine.budget.runs import Each, Runs, RunsDiffer, of_run, perform, values_of
from gaugeblock.conformance.engine.budget.steps import Steps
from gaugeblock.reference.torch import random

# A rounding error is uniform within half an ulp; over mantissas spread evenly in the logarithm its variance is 0.18 u² x².
ROUNDING_VARIANCE = 0.18
EXPONENT_BITS = 0x7FF0000000000000  # of a float64


def half_ulp(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbouring numbers of `dtype` at a magnitude."""
    info = torch.finfo(dtype)
    power = magnitude.clamp(info.smallest_normal, info.max).view(torch.int64) & EXPONENT_BITS  # of two, of the same exponent
    return power.view(torch.float64) * (info.eps / 2)


def rounding_unit(dtype: str) -> float:
    """Half an ulp of 1: the largest relative error of rounding to nearest (2^-8 for bfloat16)."""
    return torch.finfo(getattr(torch, dtype)).eps / 2


class RoundingNoise(Watching):
    """Disturbs float64 results as rounding would, in forward and backward; a value that needs no rounding is left alone.

    Args:
        dtype: The dtype under test.
        rounding: `"strict"`: operands of matrix products are rounded to `dtype`, all else to float32; `"eager"`: every result
            is rounded to `dtype`.
        seed: Of the noise.
        cancelling: Sums may be ordered so that their partial sums are as large as the sum of magnitudes.
        scale: How many times as coarse as the dtype's the rounding is.
        deviations: Of the sums of an earlier run of the same, in their order: their sizes hardly differ between runs, and take as
            long as the sums. A first run fills the list.
        runs: How many runs are done at once: what needs rounding is then `Runs`. None for one, in ordinary tensors.
        wide: Inputs in float32 whatever the dtype under test. What is computed of them, and of constants, alone is float32 in any
            code, `eager` or not; it is rounded to the dtype once, where it meets what is in the dtype.
        first_rounds: Whether the first run, or the only one, rounds in earnest wherever what is rounded is known. Rounding is a
            function of the value: a sum of 1 and 2^-10 is 1 in bfloat16, in every implementation and every such element,
            which no noise on the 2^-10 that is left comes to.
    """

    def __init__(
        self,
        dtype: str,
        rounding: str,
        seed: int,
        *,
        cancelling: bool = False,
        scale: float = 1.0,
        deviations: list[torch.Tensor] | None = None,
        runs: int | None = None,
        wide: Iterable[torch.Tensor] = (),
        first_rounds: bool = False,
    ) -> None:
        super().__init__()
        self.runs, self.first_rounds = runs, first_rounds
        self.cancelling, self.scale = cancelling, scale
        self.deviations, self.sums = [] if deviations is None else deviations, 0
        self.operand_dtype = getattr(torch, dtype)
        self.result_dtype = self.operand_dtype if rounding == "eager" else torch.float32
        self.steps = Steps(seed)
        self.wide = WeakIdKeyDictionary({each: False for each in wide})  # and whether rounding to the dtype is still due
        self.stores = False  # whether what is computed now is stored in the dtype
        self.terms = WeakIdKeyDictionary()  # of each element of a matrix product, and of what only shows one in another shape

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.result_dtype is torch.float32:
            return self._disturbed(func, args, kwargs)
        met = [each for each in tensors_in((*args, *kwargs.values())) if each.is_floating_point()]
        self.stores = not all(each in self.wide for each in met)
        if self.stores and not func.is_view and func.overloadpacket.__name__ not in {*MATRIX_PRODUCTS, *CONVOLUTIONS}:
            args = tuple(map(self._narrowed, args))
        result = self._disturbed(func, args, kwargs)
        for each in filter(_is_float64, tensors_in((result,))):
            if self.stores:
                self.wide.pop(each, None)
            elif each not in self.wide:
                self.wide[each] = self.wide[met[0]] if func.is_view else True
        return result

    def _narrowed(self, value: Any) -> Any:
        """A float32 result, rounded where it meets what is in the dtype under test."""
        if isinstance(value, tuple | list):
            return type(value)(map(self._narrowed, value))
        if not isinstance(value, torch.Tensor) or not self.wide.get(value, False):
            return value
        return self._held(self._round(self._values(value), self.operand_dtype))

    def _disturbed(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operation's result, disturbed as it is rounded."""
        name = func.overloadpacket.__name__
        if name in MATRIX_PRODUCTS:
            return self._matrix_product(func, MATRIX_PRODUCTS[name], args, kwargs)
        if name in CONVOLUTIONS:
            return self._convolution(func, CONVOLUTIONS[name], args, kwargs)
        if name.removesuffix("_") in COMPOSED and self.result_dtype is torch.float32 and _is_float64(args[0]):
            return self._composed(func, args, kwargs)
        if name == "_to_copy" and kwargs.get("dtype") is torch.float8_e4m3fn:  # near a tie it may go either way
            return self._held(self._round(self._values(args[0]), torch.float8_e4m3fn), writable=True)
        adds = name in SCATTERED_SUMS and (not name.startswith("index_put") or (len(args) > 3 and bool(args[3])))
        if not func.is_view and name not in MOVES and name not in SUMS:
            args, kwargs = tuple(map(self._constant, args)), {key: self._constant(each) for key, each in kwargs.items()}
        before = of_run(0, args[0]).clone() if adds else None
        if self._writes_to_all(func, args):
            return self._written_for_all(func, args, kwargs, is_exact=name in MOVES and not adds, adds=adds)
        result = self._perform(func, args, kwargs)
        if func.is_view or not _is_float64(result):
            return self._with_terms(result, self._terms(args[0])) if func.is_view else result
        if name == "_unsafe_view":
            return self._with_terms(self._held(self._values(result), writable=True), self._terms(args[0]))
        if (name in MOVES and not adds) or not result.numel():
            return result if func._schema.is_mutable else self._held(self._values(result), writable=True)
        values = self._values(result)
        if adds:
            noisy = self._add_noise(values, lambda: self._scattered_deviation(func, before, of_run(0, result), args, kwargs))
        elif name in SUMS:
            noisy = self._add_noise(values, lambda: self._sum_deviation(func, of_run(0, result), args, kwargs))
        elif name in ADDITIONS and (terms := sum(map(self._terms, args[:2]))):
            noisy = self._add_noise(values, lambda: self._continued_deviation(terms, of_run(0, result), args, kwargs))
        else:
            noisy = self._function(name.removesuffix("_"), values, tuple(map(self._values, args)))
        if not func._schema.is_mutable:
            return self._held(noisy)
        self._values(result).copy_(noisy)
        self.terms.pop(result, None)
        return result

    def _perform(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The operation itself, in each run."""
        if self.runs is None:
            return func(*args, **kwargs)
        return perform(func, args, kwargs, self.runs)

    def _writes_to_all(self, func: Any, args: tuple) -> bool:
        return self.runs is not None and func._schema.is_mutable and _is_float64(args[0]) and not isinstance(args[0], Runs)

    def _written_for_all(self, func: Any, args: tuple, kwargs: dict, *, is_exact: bool, adds: bool) -> torch.Tensor:
        """What all runs share, written to; a counter of steps, say. Of a sum it is not known what its parts are rounded to."""
        if not adds and not any(isinstance(each, Runs | Each) for each in (*args, *kwargs.values())):
            result = func(args[0].clone(), *args[1:], **kwargs)
            if is_exact or torch.equal(result.to(torch.float32).to(torch.float64), result):
                return args[0].copy_(result)
        raise RunsDiffer(f"{func} writes to what all runs share")

    def _composed(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        """An operation of several steps, disturbed in each."""
        if self._writes_to_all(func, args):
            raise RunsDiffer(f"{func} writes to what all runs share")
        with self:
            result = COMPOSED[func.overloadpacket.__name__.removesuffix("_")](*args, **kwargs)
        if not func._schema.is_mutable:
            return result
        self._values(args[0]).copy_(self._values(result))
        self.terms.pop(args[0], None)
        return args[0]

    def _values(self, value: Any) -> Any:
        """What is disturbed of a tensor: its values in all runs."""
        return values_of(value, self.runs) if self.runs is not None and isinstance(value, torch.Tensor) else value

    def _held(self, values: torch.Tensor, *, writable: bool = False) -> torch.Tensor:
        """The tensor of values."""
        if self.runs is None:
            return values
        return Runs(values.clone() if writable and values.stride(0) == 0 else values)

    def _constant(self, value: Any) -> Any:
        """A constant such as 1 - 1e-6 is rounded to float32 once, which is an error of one sign in all elements."""
        error = _error_of_constant(value) if isinstance(value, float) else 0.0
        if not error:
            return value
        noise = self._unit_noise(torch.zeros((1 if self.runs is None else self.runs,), dtype=torch.float64), error)
        rounded = torch.full_like(noise, value, dtype=torch.float32).to(torch.float64)
        numbers = self._first_rounded(value + noise, rounded).tolist()
        return numbers[0] if self.runs is None else Each(numbers)

    def _matrix_product(self, func: Any, first: int, args: tuple, kwargs: dict) -> torch.Tensor:
        if not all(each.numel() for each in args[first : first + 2]):  # of nothing, nothing is rounded
            return self._perform(func, args, kwargs)
        left, right = (self._operand(operand) for operand in args[first : first + 2])
        result = self._perform(func, (*args[:first], left, right, *args[first + 2 :]), kwargs)
        size = torch.abs if self.cancelling else torch.square

        def deviation() -> torch.Tensor:
            a, b, before, after = (of_run(0, each) for each in (left, right, args[:first], args[first + 2 :]))
            sizes = func(*map(size, before), size(a), size(b), *after, **kwargs)
            return self._accumulation_deviation(a.shape[-1], of_run(0, result), sizes)

        return self._with_terms(self._held(self._add_noise(self._values(result), deviation)), left.shape[-1])

    def _convolution(self, func: Any, factors: int, args: tuple, kwargs: dict) -> Any:
        """A convolution, or its gradients by images, weight and bias: of squares it gives the sums of squares."""
        args = (*map(self._operand, args[:factors]), *args[factors:])
        results = self._perform(func, args, kwargs)
        size = torch.abs if self.cancelling else torch.square
        *given, weight = (of_run(0, each) for each in args[:factors])  # images; or the result's gradient and images
        terms: tuple[int, ...]
        if factors == 2:
            bias = None if args[2] is None else size(of_run(0, args[2]))
            results, terms, others = (results,), (weight[0].numel(),), (bias, *args[3:])
        else:
            places = given[0].numel() // weight.shape[0]
            terms, others = (weight[:, 0].numel(), places, places), args[3:]

        @cache
        def sizes() -> tuple[torch.Tensor, ...]:
            sums = func(*map(size, given), size(weight), *others, **kwargs)
            return (sums,) if factors == 2 else sums

        def noisy(place: int, result: torch.Tensor) -> torch.Tensor:
            def deviation() -> torch.Tensor:
                return self._accumulation_deviation(terms[place], of_run(0, result), sizes()[place])

            return self._with_terms(self._held(self._add_noise(self._values(result), deviation)), terms[place])

        disturbed = tuple(each if each is None else noisy(place, each) for place, each in enumerate(results))
        return disturbed[0] if factors == 2 else disturbed

    def _terms(self, value: Any) -> int:
        """How many terms each element of a matrix product has; 0 for what is none."""
        return self.terms.get(value, 0) if isinstance(value, torch.Tensor) else 0

    def _with_terms(self, result: Any, terms: int) -> Any:
        """The result, known as a matrix product of so many terms."""
        if terms and isinstance(result, torch.Tensor):
            self.terms[result] = terms
        return result

    def _operand(self, operand: torch.Tensor) -> torch.Tensor:
        """An operand of a matrix product, rounded to the dtype under test."""
        if self.operand_dtype is torch.float32:
            return operand
        if not isinstance(operand, Runs) and torch.equal(operand.to(self.operand_dtype).to(torch.float64), operand):
            return operand  # a weight that is the same in all runs is looked at once
        values = self._values(operand)
        rounded = self._round(values, self.operand_dtype)
        return operand if rounded is values else self._held(rounded)

    def _sum_deviation(self, func: Any, result: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        name = func.overloadpacket.__name__
        args = of_run(0, args)
        terms = args[0].shape[args[1]] if name == "cumsum" else args[0].numel() // max(1, result.numel())
        scale = terms if name == "mean" and not self.cancelling else 1
        size = torch.abs if self.cancelling else torch.square
        return self._accumulation_deviation(terms - 1, result, func(size(args[0]), *args[1:], **kwargs) / scale)

    def _continued_deviation(self, terms: int, result: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """Of what is added to a matrix product: it is a term more of its sums, and libraries begin with it, as `addmm` may.

        Then every partial sum is as large as a bias that all but cancels what comes after it.
        """
        size = torch.abs if self.cancelling else torch.square
        left, right = (torch.as_tensor(each, dtype=torch.float64) for each in of_run(0, args[:2]))
        return self._accumulation_deviation(terms, result, size(left) + size(kwargs.get("alpha", 1) * right))

    def _scattered_deviation(self, func: Any, before: Any, result: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        position = SCATTERED_SUMS[func.overloadpacket.__name__]
        size = torch.abs if self.cancelling else torch.square
        sizes = [*of_run(0, args)]
        sizes[0], sizes[position] = size(before), size(sizes[position])
        return self._accumulation_deviation(6, result, func(*sizes, **kwargs))  # few terms meet in one place

    def _accumulation_deviation(self, terms: int, result: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Of a float32 sum: one rounding of each partial sum, squared and added up; that the total is exact says nothing.

        `sizes` is the sum of squares, and orders are random, so that partial sums have expected squares of a third of the
        result's and a sixth of that sum, in one order of a thousand seven times as much; or, if `cancelling`,
        the sum of magnitudes, which bounds them.
        """
        partial = sizes**2 if self.cancelling else result**2 / 3 + sizes
        return (ROUNDING_VARIANCE * terms * partial).sqrt() * rounding_unit("float32")

    def _function(self, name: str, result: torch.Tensor, args: tuple) -> torch.Tensor:
        """Adds the error of an elementwise function, relative to its result; what float32 holds exactly gets none."""
        noise = self._unit_noise(result, math.sqrt(ROUNDING_VARIANCE) * rounding_unit("float32"))
        rounded = result.to(torch.float32).to(torch.float64)
        if name not in ULPS:
            noise = noise.mul_(_is_inexact(result, rounded)).add_(1.0).mul_(result)  # so an infinity stays one
            return self._store(self._first_rounded(noise, rounded))
        growth = argument_growth(name, result, args, 0 if self.runs is None else 1)
        noise.mul_((growth + ULPS[name]).nan_to_num_(0.0, MOST_ULPS) if isinstance(growth, torch.Tensor) else ULPS[name])
        noise.mul_(_is_inexact(result, rounded))
        # a sigmoid of 1 is so only in float64: what is taken from it afterwards has no digits, in the oracle either
        noise.add_(self._unit_noise(result, torch.finfo(torch.float64).eps))
        return self._store(noise.add_(1.0).mul_(result))

    def _add_noise(self, result: torch.Tensor, deviation_of: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Adds the error of a float32 sum."""
        place, self.sums = self.sums, self.sums + 1
        if place == len(self.deviations):
            self.deviations.append(deviation_of().nan_to_num_(0.0, 0.0, 0.0))  # an infinity is exact
        known = self.deviations[place]
        alike = known.shape == (result.shape if self.runs is None else result.shape[1:])
        deviation = known if alike else deviation_of().nan_to_num_(0.0, 0.0, 0.0)
        return self._store(torch.addcmul(result, deviation, self._unit_noise(result)))

    def _store(self, result: torch.Tensor) -> torch.Tensor:
        """Adds the error of storing the result."""
        return self._round(result, self.result_dtype) if self.stores else result

    def _round(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The noise of rounding once to `dtype`, where that changes the value."""
        if dtype is torch.float32:  # the result's own noise was that rounding
            return value
        rounded = value.to(dtype).to(torch.float64)
        if torch.equal(rounded, value):
            return value
        info = torch.finfo(dtype)
        underflow = info.smallest_normal * info.eps / 2 * math.sqrt(1 / 3)
        deviation = (value.abs() * (math.sqrt(ROUNDING_VARIANCE) * info.eps / 2)).clamp_min_(underflow)
        noise = deviation.mul_(self._unit_noise(value)).mul_(_is_inexact(value, rounded))
        return self._first_rounded(noise.add_(value), rounded)

    def _first_rounded(self, noisy: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        """With what rounding comes to in the first run, where that is finite."""
        if self.first_rounds:
            first, real = (noisy, rounded) if self.runs is None else (noisy[0], rounded[0])
            first.copy_(real if math.isfinite(real.sum().item()) else torch.where(real.isfinite(), real, first))
        return noisy

    def _unit_noise(self, like: torch.Tensor, deviation: float = 1.0) -> torch.Tensor:
        """Uniform noise."""
        return self.steps.take(like.numel()).view(like.shape) * (math.sqrt(3) * deviation * self.scale / 2**15)


def _is_inexact(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """1.0 where rounding changed a value, else 0.0; in numbers, since truths take four times as long."""
    return (rounded - value).abs_().sign_()


@lru_cache(1024)
def _error_of_constant(value: float) -> float:
    """The deviation of a constant that float32 does not hold; 0 for one that it does."""
    constant = torch.tensor(value, dtype=torch.float64)
    if not math.isfinite(value) or constant.to(torch.float32) == constant:
        return 0.0
    return half_ulp(constant.abs(), torch.float32).item() / math.sqrt(3)


@contextmanager
def exact_draws() -> Iterator[None]:
    """Keeps rounding noise out of random numbers: they are the same bits everywhere, so nothing may be lost in them."""

    def undisturbed(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def drawn(*args: Any, **kwargs: Any) -> torch.Tensor:
            with _disable_current_modes():
                return draw(*args, **kwargs)

        return drawn

    drawing = {name: getattr(random, name) for name in ("uniform", "normal")}
    for name, draw in drawing.items():
        setattr(random, name, undisturbed(draw))
    try:
        yield
    finally:
        for name, draw in drawing.items():
            setattr(random, name, draw)


def _is_float64(result: Any) -> bool:
    return isinstance(result, torch.Tensor) and result.dtype == torch.float64
