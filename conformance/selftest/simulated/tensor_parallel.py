"""Experts in slices, simulated: every rank has all tokens and some intermediate features; sums go through one all-reduce."""

from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from gaugeblock.conformance.selftest.simulated.biased_experts import GeluMlpExperts
from gaugeblock.conformance.selftest.simulated.experts import Experts
from gaugeblock.conformance.selftest.simulated.ranks import LocalExperts, raise_together
from gaugeblock.reference import validation


class AddedForward(torch.autograd.Function):
    """What ranks have parts of, added up; its gradient is that of each part."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class AddedBackward(torch.autograd.Function):
    """What all ranks have; the gradients of their parts are added up."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Slices:
    """What slices of experts share, whatever the operation."""

    claims: ClassVar[dict[str, Any]] = {"world_sizes": (2,), "sharding": "tensor_parallel"}
    group: Any
    rank: int
    ranks: int

    def join(self, mesh: Any, validate: Any, call: tuple[Any, ...], num_experts: int) -> None:
        """Takes note of the ranks, and raises on every rank what the contract demands of any."""
        self.group, self.rank, self.ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        error = None
        try:
            validate(*call)
            validation.expert_ids_in_range(call[-1], num_experts=num_experts)
        except (TypeError, ValueError) as raised:
            error = raised
        raise_together(error, self.group)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """What every rank has alike, in float32."""
        return AddedBackward.apply(tensor.float(), self.group)

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """Of all ranks."""
        return AddedForward.apply(part, self.group)


class TensorParallel(Slices):
    """`experts.fused_swiglu`."""

    contract = "experts.fused_swiglu"

    def __call__(
        self,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        mesh: Any,
    ) -> torch.Tensor:
        call = (hidden_states, w13, w2, topk_weights, topk_ids)
        self.join(mesh, validation.fused_swiglu, call, len(w13))
        experts: Experts = LocalExperts(hidden_states.dtype)
        part = experts(self.whole(hidden_states), self.rows(w13), w2, self.whole(topk_weights), topk_ids)
        return self.total(part).to(hidden_states.dtype)

    def rows(self, w13: torch.Tensor) -> torch.Tensor:
        """The gate rows and the up rows of this rank's features."""
        return w13


class TensorParallelMlp(Slices, GeluMlpExperts):
    """`experts.fused_gelu_mlp`, the last biases with the first rank's part."""

    contract = "experts.fused_gelu_mlp"
    claims: ClassVar[dict[str, Any]] = {**Slices.claims, "dtypes": ("float32",)}

    def __call__(self, hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, *, mesh, approximate):
        self.join(
            mesh,
            partial(validation.fused_gelu_mlp, approximate=approximate),
            (hidden_states, w1, b1, w2, b2, topk_weights, topk_ids),
            len(w1),
        )
        tokens, biases, weights = (self.whole(each) for each in (hidden_states, b2, topk_weights))
        part = super().__call__(tokens, w1, b1, w2, self.last_biases(biases), weights, topk_ids, approximate=approximate)
        return self.total(part).to(hidden_states.dtype)

    def last_biases(self, biases: torch.Tensor) -> torch.Tensor:
        """Those that this rank adds."""
        return biases if self.rank == 0 else 0 * biases
