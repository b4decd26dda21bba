"""How far an output may lie from the oracle, found by running the unmodified reference under rounding noise.

`RoundingNoise` disturbs a float64 run wherever code at the dtype under test would round; the spread of several such runs is
the variance V of an honest implementation's error, element by element, for outputs and gradients. No tolerance is written
by hand: what is chosen here, once for all operations, are the constants below. Why they have their values is told in
conformance/JUDGING.md, sections 6 to 8; `tests/test_error_budget.py` and `tests/test_judging.py` measure them again.
"""

import math
from dataclasses import dataclass

import torch

from gaugeblock.conformance.engine.budget.rounding_noise import half_ulp
from gaugeblock.conformance.engine.judging.verdict import Statistics
from gaugeblock.conformance.engine.vocabulary import Tensors

NOISE_RUNS = 12
# Deviations of the propagated error that one element may have. As they are estimated from 12 runs, an honest error exceeds so
# many once in 2.8 million, where it cannot be pooled with its row and column.
KAPPA = 10.0
# Limits of the two statistics, in deviations, for very many independent elements; for fewer, or for elements whose errors hang
# together, each limit widens by SIGMAS deviations of the statistic itself, as the noise runs show it.
RMS_LIMIT, BIAS_LIMIT, SIGMAS = 1.2, 0.1, 5.0


@dataclass(frozen=True)
class Budget:
    """What is allowed to one output or gradient."""

    value: torch.Tensor
    """The oracle."""
    variance: torch.Tensor
    """Of an honest implementation's error before its result is rounded, per element."""
    squares_variance: float
    signed_variance: float
    """Of the sums of q² and sign(value)·q over the elements, with q the error in deviations: they tell how many independent
    errors there are."""


def spread(oracle: Tensors, runs: Tensors) -> dict[str, Budget]:
    """Budgets from the oracle and noisy runs of the same reference, `[runs, *shape]` each."""
    return {key: _budget(value, runs[key]) for key, value in oracle.items()}


def widest(budgets: list[dict[str, Budget]]) -> dict[str, Budget]:
    """What is allowed by any of several budgets around the same oracle, output by output."""
    return {
        key: Budget(
            first.value,
            torch.stack([each[key].variance for each in budgets]).amax(0),
            max(each[key].squares_variance for each in budgets),
            max(each[key].signed_variance for each in budgets),
        )
        for key, first in budgets[0].items()
    }


def _budget(value: torch.Tensor, runs: torch.Tensor) -> Budget:
    if not value.is_floating_point():
        return Budget(value, torch.zeros_like(value), 0.0, 0.0)
    errors = runs - value
    mean = errors.mean(0)
    if not mean.isfinite().all():  # what is rounded in earnest may cancel to 0 / 0, and the other runs count
        errors[0].nan_to_num_(0.0, 0.0, 0.0)
        mean = errors.mean(0)
    variance = _pooled(errors.square().mean(0).nan_to_num(0.0, 0.0, 0.0))
    # Errors of one sign in every run are squares of errors (the square of a gradient that is 0 but for rounding): KAPPA
    # deviations of what is squared are KAPPA² of their mean. By chance it happens to one element of 2048. Where values are
    # rounded in earnest, some are 0.
    least, most = errors.amin(0), errors.amax(0)  # `aminmax` along rows takes ten times as long
    variance = torch.where((least >= 0) | (most <= 0), (KAPPA * mean).square(), variance)
    scaled = (errors * torch.where(variance > 0, variance.rsqrt(), 0.0)).reshape(len(runs), value.numel())
    if not mean.isfinite().all():
        scaled = scaled.nan_to_num(0.0, 0.0, 0.0)
    squares_sum, signed_sum = torch.linalg.vecdot(scaled, scaled), scaled @ value.sign().nan_to_num(0.0).flatten()
    return Budget(value, variance, float(squares_sum.var()), float(signed_sum.square().mean()))


def _pooled(variance: torch.Tensor) -> torch.Tensor:
    """Where few runs happened to see little noise, what its row and column saw counts instead."""
    if variance.ndim < 2 or variance.numel() == 0:
        return variance
    table = variance.flatten(0, -2)
    smooth = table.mean(1, keepdim=True) * table.mean(0, keepdim=True) / table.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(table > 0, torch.maximum(table, smooth), table).view_as(variance)


def propagated_error(budget: Budget) -> torch.Tensor:
    """The largest error allowed to each element before the result is rounded."""
    return KAPPA * budget.variance.sqrt()


def rounding_error(budget: Budget, dtype: torch.dtype) -> torch.Tensor:
    """What rounding the result may add; on some chips a subnormal float32 becomes 0."""
    return half_ulp(budget.value.abs() + propagated_error(budget), dtype) + torch.finfo(torch.float32).smallest_normal


def element_errors(candidate: torch.Tensor, budget: Budget, dtype: torch.dtype) -> torch.Tensor:
    """Each element's error beyond the rounding of the result, in units of its budget; infinite where there is no budget.

    NaN and infinity must stand where the rounded oracle has them.
    """
    expected = budget.value.to(dtype).to(torch.float64)  # what the dtype cannot hold overflows to infinity
    value = candidate.to(torch.float64)
    beyond = (value - budget.value).abs() - rounding_error(budget, dtype)
    error = torch.where(beyond <= 0, 0.0, beyond / propagated_error(budget))
    same = (value == expected) | (value.isnan() & expected.isnan())
    return torch.where(beyond.isfinite(), error, torch.where(same, 0.0, math.inf))


@dataclass(frozen=True)
class Errors:
    """Errors of one output over one or several cases, as sums that can be pooled."""

    worst: float = 0.0
    """Largest error in units of the element's budget."""
    squares: float = 0.0
    signed: float = 0.0
    """Sums of q² and sign(y)·q, with q the error in deviations."""
    squares_variance: float = 0.0
    signed_variance: float = 0.0
    """Of these sums, for an honest implementation."""
    elements: int = 0
    """How many."""

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(
            max(self.worst, other.worst),
            self.squares + other.squares,
            self.signed + other.signed,
            self.squares_variance + other.squares_variance,
            self.signed_variance + other.signed_variance,
            self.elements + other.elements,
        )

    def statistics(self) -> Statistics:
        """The three statistics in units of their limits."""
        if not self.elements:
            return Statistics(self.worst, None, None, 0)
        independent = 2 * self.elements**2 / self.squares_variance  # errors: the mean of so many squares varies like that of q²
        tail = 2 / (9 * independent)
        # Wilson and Hilferty's quantile of chi-squared
        mean_square_limit = RMS_LIMIT**2 * (1 - tail + SIGMAS * math.sqrt(tail)) ** 3
        bias_limit = BIAS_LIMIT + SIGMAS * math.sqrt(self.signed_variance) / self.elements
        rms = math.sqrt(self.squares / self.elements / mean_square_limit)
        return Statistics(self.worst, rms, abs(self.signed / self.elements) / bias_limit, self.elements)


def measure(candidate: torch.Tensor, budget: Budget, dtype: torch.dtype, *, pooled: bool) -> Errors:
    """The errors of one output; `pooled` says whether the statistical model holds, so that rms and bias mean something."""
    if candidate.numel() == 0:
        return Errors()
    worst = float(element_errors(candidate, budget, dtype).max())
    if not pooled:
        return Errors(worst)
    inexact = budget.variance > 0
    deviation = (budget.variance + half_ulp(budget.value.abs(), dtype) ** 2 / 3).sqrt()
    scaled = torch.where(inexact, (candidate.to(torch.float64) - budget.value) / deviation, 0.0).nan_to_num_(0.0, 0.0, 0.0)
    elements = int(inexact.sum())
    return Errors(
        worst,
        float(scaled.square().sum()),
        float((scaled * budget.value.sign()).nan_to_num_(0.0).sum()),
        budget.squares_variance + elements,  # rounding the result adds an independent error to each element
        budget.signed_variance + elements,
        elements,
    )
