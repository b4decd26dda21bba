"""What an expert does between its two products, and back: in PyTorch, on rows in memory that batch after batch borrows.

Shapes: B rows, i columns of the activation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch

from gaugeblock.optimized.compiled.expert_rows import Scratch
from gaugeblock.reference.configs import GeluApproximation

PullBack: TypeAlias = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
"""From the gradient of an activation, which it overwrites, to those of the rows that it is of."""


class Function(Protocol):
    """A function of one number."""

    def value(self, x_Bi: torch.Tensor, borrow: Scratch) -> torch.Tensor:
        """Return it of each element, in memory borrowed as `activation`."""

    def value_and_slope(self, x_Bi: torch.Tensor, borrow: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return it and its derivative."""


@dataclass(frozen=True)
class Swish:
    """x * sigmoid(alpha * x); SiLU where alpha is 1."""

    alpha: float = 1.0

    def value(self, x_Bi: torch.Tensor, borrow: Scratch) -> torch.Tensor:
        """As of every function."""
        return self._sigmoid(x_Bi, borrow("activation", *x_Bi.shape)).mul_(x_Bi)

    def value_and_slope(self, x_Bi: torch.Tensor, borrow: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """As of every function."""
        sigmoid_Bi = self._sigmoid(x_Bi, borrow("slope", *x_Bi.shape))
        value_Bi = torch.mul(x_Bi, sigmoid_Bi, out=borrow("value", *x_Bi.shape))
        return value_Bi, sigmoid_Bi.addcmul_(value_Bi, 1 - sigmoid_Bi, value=self.alpha)

    def _sigmoid(self, x_Bi: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.alpha == 1:  # one pass less
            return torch.sigmoid(x_Bi, out=out)
        return torch.sigmoid(torch.mul(x_Bi, self.alpha, out=out), out=out)


class GeluByErf:
    """x / 2 * erfc(-x / sqrt(2)), which keeps its digits where 1 + erf loses them."""

    def value(self, x_Bi: torch.Tensor, borrow: Scratch) -> torch.Tensor:
        """As of every function."""
        return self._distribution(x_Bi, borrow("activation", *x_Bi.shape)).mul_(x_Bi)

    def value_and_slope(self, x_Bi: torch.Tensor, borrow: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """As of every function."""
        distribution_Bi = self._distribution(x_Bi, borrow("distribution", *x_Bi.shape))
        density_Bi = torch.mul(x_Bi, x_Bi, out=borrow("slope", *x_Bi.shape)).mul_(-1 / 2).exp_().mul_(1 / math.sqrt(2 * math.pi))
        value_Bi = torch.mul(x_Bi, distribution_Bi, out=borrow("value", *x_Bi.shape))
        return value_Bi, density_Bi.mul_(x_Bi).add_(distribution_Bi)

    def _distribution(self, x_Bi: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.mul(x_Bi, -1 / math.sqrt(2), out=out)
        return torch.special.erfc(out, out=out).mul_(1 / 2)


class GeluByTanh:
    """x * sigmoid(2 * inner), which is x / 2 * (1 + tanh(inner)), inner = sqrt(2 / pi) * (x + 0.044715 * x**3)."""

    TWICE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715

    def value(self, x_Bi: torch.Tensor, borrow: Scratch) -> torch.Tensor:
        """As of every function."""
        return self._sigmoid(x_Bi, borrow("activation", *x_Bi.shape)).mul_(x_Bi)

    def value_and_slope(self, x_Bi: torch.Tensor, borrow: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """As of every function."""
        sigmoid_Bi = self._sigmoid(x_Bi, borrow("sigmoid", *x_Bi.shape))
        value_Bi = torch.mul(x_Bi, sigmoid_Bi, out=borrow("value", *x_Bi.shape))
        slope_Bi = torch.mul(x_Bi, x_Bi, out=borrow("slope", *x_Bi.shape)).mul_(3 * self.CUBIC).add_(1).mul_(self.TWICE)
        return value_Bi, slope_Bi.mul_(value_Bi).mul_(1 - sigmoid_Bi).add_(sigmoid_Bi)

    def _sigmoid(self, x_Bi: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.mul(x_Bi, x_Bi, out=out).mul_(self.CUBIC).add_(1).mul_(x_Bi).mul_(self.TWICE)
        return torch.sigmoid(out, out=out)


def gelu(approximate: GeluApproximation) -> Function:
    """The GELU that `approximate` names."""
    return GeluByTanh() if approximate == "tanh" else GeluByErf()


class Activation(Protocol):
    """What lies between the products."""

    @property
    def products(self) -> int:
        """How many the first one is: 2 where the halves of w13 are gate and up."""

    def activate(self, rows: Sequence[torch.Tensor], borrow: Scratch) -> torch.Tensor:
        """Return the activation, [B, i], in borrowed memory, of what each product leaves, [B, i] or more columns."""

    def vjp(self, rows: Sequence[torch.Tensor], borrow: Scratch) -> tuple[torch.Tensor, PullBack]:
        """Return the activation, which may be overwritten, and what pulls its gradient back to each of `rows`."""


@dataclass(frozen=True)
class Plain:
    """A function of what the first product leaves."""

    function: Function
    products: ClassVar[int] = 1

    def activate(self, rows: Sequence[torch.Tensor], borrow: Scratch) -> torch.Tensor:
        """As of every activation."""
        return self.function.value(rows[0], borrow)

    def vjp(self, rows: Sequence[torch.Tensor], borrow: Scratch) -> tuple[torch.Tensor, PullBack]:
        """As of every activation."""
        value_Bi, slope_Bi = self.function.value_and_slope(rows[0], borrow)
        return value_Bi, lambda d_activation_Bi: (d_activation_Bi.mul_(slope_Bi),)


@dataclass(frozen=True)
class Gated:
    """A function of the gate, times up; they are the halves of w13's rows."""

    function: Function
    products: ClassVar[int] = 2

    def activate(self, rows: Sequence[torch.Tensor], borrow: Scratch) -> torch.Tensor:
        """As of every activation."""
        gate_Bi, up_Bi = rows
        return self.function.value(gate_Bi, borrow).mul_(up_Bi)

    def vjp(self, rows: Sequence[torch.Tensor], borrow: Scratch) -> tuple[torch.Tensor, PullBack]:
        """As of every activation."""
        gate_Bi, up_Bi = rows
        value_Bi, slope_Bi = self.function.value_and_slope(gate_Bi, borrow)

        def pull_back(d_activation_Bi: torch.Tensor) -> tuple[torch.Tensor, ...]:
            d_up_Bi = torch.mul(d_activation_Bi, value_Bi, out=borrow("d_up", *gate_Bi.shape))
            return d_activation_Bi.mul_(up_Bi).mul_(slope_Bi), d_up_Bi

        return torch.mul(value_Bi, up_Bi, out=borrow("activation", *gate_Bi.shape)), pull_back


@dataclass(frozen=True)
class ClampedGated:
    """gpt-oss': a function of the gate, times up + 1; gate and up are clamped, and come from w13's rows in turn.

    Clamping copies every other column to memory without gaps, where the rest is several times as fast.
    """

    function: Function
    limit: float
    products: ClassVar[int] = 1

    def activate(self, rows: Sequence[torch.Tensor], borrow: Scratch) -> torch.Tensor:
        """As of every activation."""
        gate_Bi, up_1_Bi = self._clamped(rows[0], borrow)
        return self.function.value(gate_Bi, borrow).mul_(up_1_Bi)

    def vjp(self, rows: Sequence[torch.Tensor], borrow: Scratch) -> tuple[torch.Tensor, PullBack]:
        """As of every activation."""
        gate_Bi, up_1_Bi = self._clamped(rows[0], borrow)
        value_Bi, slope_Bi = self.function.value_and_slope(gate_Bi, borrow)

        def pull_back(d_activation_Bi: torch.Tensor) -> tuple[torch.Tensor, ...]:
            d_rows = borrow("d_rows", *rows[0].shape)
            inside_Bi = rows[0][:, 1::2].abs() <= self.limit
            torch.mul(value_Bi.mul_(d_activation_Bi), inside_Bi, out=d_rows[:, 1::2])
            inside_Bi = rows[0][:, 0::2] <= self.limit
            torch.mul(d_activation_Bi.mul_(up_1_Bi).mul_(slope_Bi), inside_Bi, out=d_rows[:, 0::2])
            return (d_rows,)

        return torch.mul(value_Bi, up_1_Bi, out=borrow("activation", *gate_Bi.shape)), pull_back

    def _clamped(self, rows: torch.Tensor, borrow: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gate and up + 1."""
        shape = len(rows), rows.shape[1] // 2
        gate_Bi = torch.clamp(rows[:, 0::2], max=self.limit, out=borrow("gate", *shape))
        return gate_Bi, torch.clamp(rows[:, 1::2], -self.limit, self.limit, out=borrow("up", *shape)).add_(1)
