"""Calls of experts, whatever way they are spread over the ranks: what the experts of each operation compute of their rows.

Shapes: R rows, sorted by expert, H hidden_size, I intermediate_size, F what the first of the two matrices gives.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import silu

from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.torch import experts as reference
from gaugeblock.reference.torch.precision import at_least_float32

Weights: TypeAlias = Mapping[str, torch.Tensor]
Linear: TypeAlias = tuple[str, str]
"""Names of matrices [num_experts, out_features, in_features] and biases [num_experts, out_features]; empty for none."""
Facts: TypeAlias = Mapping[str, Callable[[], int]]
"""Numbers by what an error says of them, in the same order on every rank: `w13 must require a gradient alike`."""
NO_FACTS: Facts = MappingProxyType({})


class ExpertCall(NamedTuple):
    """One rank's call: its tokens, where they go, and what an expert does to a row."""

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    weights: Weights  # of this rank's experts, by name; the first is a matrix
    up: Linear
    activate: Callable[[torch.Tensor], torch.Tensor]  # [R, F] -> [R, I]
    down: Linear
    check: Callable[[], None]  # raises what is wrong with the call
    out_dtype: torch.dtype | None = None  # of the sums; None for that of hidden_states
    alike: Facts = NO_FACTS  # what else ranks must have alike, of a layer; looked at where the call is good

    @property
    def dtype(self) -> torch.dtype:
        """Of the sums."""
        return self.out_dtype or self.hidden_states.dtype

    @property
    def num_experts(self) -> int:
        """Of this rank."""
        return len(next(iter(self.weights.values())))

    def outputs(
        self, rows_RH: torch.Tensor, group_sizes: torch.Tensor, weights: Weights, *, down_biases: bool = True
    ) -> torch.Tensor:
        """What experts make of rows sorted by expert, with or without the biases that come last; [R, H], float32 at least."""
        multiply = self._grouped_matmul()

        def linear(rows: torch.Tensor, matrices: str, biases: str) -> torch.Tensor:
            out = multiply(rows, weights[matrices], group_sizes)
            return out + spread(weights[biases], group_sizes, len(rows)) if biases else out

        inner_RI = self.activate(linear(rows_RH, *self.up))
        return linear(inner_RI, self.down[0], self.down[1] if down_biases else "")

    def error(self, mesh: DeviceMesh, num_holders: int) -> TypeError | ValueError | None:
        """What is wrong with this rank's call, if so many ranks hold other experts."""
        try:
            self.check()
            if self.hidden_states.device.type != mesh.device_type:
                device = self.hidden_states.device
                raise ValueError(f"hidden_states must be on the device of mesh, {mesh.device_type}, got {device}")
            validation.expert_ids_in_range(self.topk_ids, num_experts=self.num_experts * num_holders)
        except (TypeError, ValueError) as raised:
            return raised
        return None

    def facts(self, error: Exception | None, *, tokens_alike: bool = False) -> dict[str, int]:
        """What ranks must have alike, else they would wait for rows that nobody sends, or a gradient that nobody computes.

        Args:
            error: Of this rank's call; if there is one, nothing is looked at.
            tokens_alike: Whether all ranks have the same tokens.
        """
        first = next(iter(self.weights))
        names = (
            f"{first} must hold the same number of experts (num_experts / world_size)",
            f"{first} must have the same number of rows",
            "hidden_states must have the same hidden_size",
            "hidden_states must have the same dtype",
            "topk_weights must have the same dtype",
            "topk_ids must have the same top_k",
            *(["hidden_states must have the same num_tokens"] if tokens_alike else []),
            *self.alike,
            *(f"{name} must require a gradient alike" for name in ("hidden_states", "topk_weights", *self.weights)),
        )
        if error is not None:
            return dict.fromkeys(names, 1)
        dtypes = [validation.FLOATING.index(validation.dtype_name(each)) for each in (self.hidden_states, self.topk_weights)]
        tracked = [torch.is_grad_enabled() and each.requires_grad for each in (*self[:2], *self.weights.values())]
        num_tokens = [len(self.hidden_states)] if tokens_alike else []
        of_layer = [fact() for fact in self.alike.values()]
        values = (*self.weights[first].shape, *dtypes, self.topk_ids.shape[1], *num_tokens, *of_layer, *tracked)
        return dict(zip(names, values, strict=True))

    def _grouped_matmul(self) -> Callable[..., torch.Tensor]:
        """Choose what multiplies rows with their experts: Triton on a GPU; it has no float64."""
        if self.hidden_states.is_cuda and self.hidden_states.dtype != torch.float64:
            # imported here, since Triton is an optional package
            from gaugeblock.optimized.distributed import triton_grouped_matmul

            return triton_grouped_matmul.grouped_matmul
        return reference.grouped_matmul


def swiglu(
    hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> ExpertCall:
    """A call of `experts.fused_swiglu`."""

    def activate(gate_up_RF: torch.Tensor) -> torch.Tensor:
        gate_RI, up_RI = gate_up_RF.chunk(2, dim=-1)
        return silu(gate_RI) * up_RI

    check = partial(validation.fused_swiglu, hidden_states, w13, w2, topk_weights, topk_ids)
    weights = {"w13": w13, "w2": w2}
    return ExpertCall(hidden_states, topk_weights, topk_ids, weights, ("w13", ""), activate, ("w2", ""), check)


def geglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    approximate: GeluApproximation,
) -> ExpertCall:
    """A call of `experts.fused_geglu`."""

    def activate(gate_up_RF: torch.Tensor) -> torch.Tensor:
        gate_RI, up_RI = gate_up_RF.chunk(2, dim=-1)
        return reference.gelu(gate_RI, approximate) * up_RI

    check = partial(validation.fused_geglu, hidden_states, w13, w2, topk_weights, topk_ids, approximate)
    weights = {"w13": w13, "w2": w2}
    return ExpertCall(hidden_states, topk_weights, topk_ids, weights, ("w13", ""), activate, ("w2", ""), check)


def gelu_mlp(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    approximate: GeluApproximation,
) -> ExpertCall:
    """A call of `experts.fused_gelu_mlp`."""
    activate = partial(reference.gelu, approximate=approximate)
    check = partial(validation.fused_gelu_mlp, hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, approximate)
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return ExpertCall(hidden_states, topk_weights, topk_ids, weights, ("w1", "b1"), activate, ("w2", "b2"), check)


def swiglu_oai(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    b13: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    alpha: float,
    limit: float,
) -> ExpertCall:
    """A call of `experts.fused_swiglu_oai`."""
    activate = partial(reference.clamped_swiglu, alpha=alpha, limit=limit)
    check = partial(validation.fused_swiglu_oai, hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, alpha, limit)
    weights = {"w13": w13, "b13": b13, "w2": w2, "b2": b2}
    return ExpertCall(hidden_states, topk_weights, topk_ids, weights, ("w13", "b13"), activate, ("w2", "b2"), check)


def bad_call(error: TypeError | ValueError, weights: Sequence[str], alike: Facts) -> ExpertCall:
    """The call of a rank that has found an error before it could make its own.

    Args:
        weights: Any names of the experts' weights; the other ranks expect as many facts as they tell.
        alike: What the other ranks tell of the layer; it is not looked at.
    """

    def check() -> None:
        raise error

    none = torch.empty(0)
    return ExpertCall(none, none, none, dict.fromkeys(weights, none), ("", ""), lambda rows: rows, ("", ""), check, alike=alike)


def over_ranks(
    sum_of_experts: Callable[[ExpertCall, DeviceMesh], torch.Tensor],
    call: Callable[..., ExpertCall],
    *arguments: torch.Tensor,
    mesh: DeviceMesh,
    **others: Any,
) -> torch.Tensor:
    """Make a call, and spread it in one way over the ranks of `mesh`; its arguments are those of `call`."""
    return sum_of_experts(call(*arguments, **others), mesh)


def spread(biases: torch.Tensor, group_sizes: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Give each row, sorted by expert, its expert's bias; [num_rows, out_features], float32 at least."""
    return _Spread.apply(biases, group_sizes, num_rows)


class _Spread(torch.autograd.Function):
    """Back, sums in the order of the rows, where autograd's would be atomics on a GPU."""

    @staticmethod
    def forward(ctx: Any, biases: torch.Tensor, group_sizes: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(group_sizes)
        ctx.dtype = biases.dtype
        return at_least_float32(biases).repeat_interleave(group_sizes, dim=0, output_size=num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (group_sizes,) = ctx.saved_tensors
        return torch.segment_reduce(d_rows.contiguous(), "sum", lengths=group_sizes).to(ctx.dtype), None, None


def require_one_dimension(mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}")
