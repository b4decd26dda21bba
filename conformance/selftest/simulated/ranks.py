"""Operations on several ranks, simulated: experts whose tokens travel in buffers of one size, and a trainer that averages.

Each is called once per rank, with the rank's shard and `mesh`. Every rank takes part in every exchange, in the same order.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from gaugeblock.conformance.selftest.simulated.experts import Experts
from gaugeblock.conformance.selftest.simulated.train_image_diffusion import Trainer
from gaugeblock.reference import validation
from gaugeblock.reference.configs import ImageDiffusionConfig
from gaugeblock.reference.torch import image_models
from gaugeblock.reference.torch.train_image_diffusion import Metrics, Tensors


class Transpose(torch.autograd.Function):
    """`[ranks, rows, width]`: block r goes to rank r; its own gradient, the other way."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return transpose(blocks, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return transpose(gradients[0], ctx.group), None


def transpose(blocks: torch.Tensor, group: Any) -> torch.Tensor:
    """Sends block r to rank r, and returns what all ranks sent here."""
    arrived = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    dist.all_to_all_single(arrived, blocks.contiguous(), group=group)
    return arrived


class LocalExperts(Experts):
    """Experts of rows that travelled in float32, and travel on in it; operands are rounded to the tokens' dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def validate(self, *inputs: torch.Tensor) -> None:
        pass  # each rank's call was looked at before any row travelled

    def expert(
        self, hidden: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        return super().expert(hidden, w13, w2, weights, self.dtype)


class ExpertParallel:
    """`experts.fused_swiglu` with a part of the tokens and of the experts on each rank."""

    contract = "experts.fused_swiglu"
    claims: ClassVar[dict[str, Any]] = {"world_sizes": (2,)}

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
        self.group, self.ranks, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self.agree(hidden_states, w13, w2, topk_weights, topk_ids)
        tokens, top_k = topk_ids.shape
        ids = topk_ids.flatten().long()
        order = self.owner(ids, len(w13)).argsort(stable=True)
        sent = self.owner(ids, len(w13)).bincount(minlength=self.ranks)
        received = self.received(sent)
        capacity = self.capacity(sent)
        rows = self.exchange(hidden_states.float()[order // top_k], sent, received, capacity)
        here = self.local(self.exchange(ids[order, None], sent, received, capacity), len(w13))
        outs = LocalExperts(hidden_states.dtype)(rows, w13, w2, torch.ones(here.shape), here)
        returned = self.exchange(self.sent_back(outs), received, sent, capacity)
        combined = torch.empty_like(returned).index_copy(0, order, returned).view(tokens, top_k, hidden_states.shape[1])
        return (topk_weights.float()[:, :, None] * combined).sum(1).to(hidden_states.dtype)

    def agree(self, *inputs: torch.Tensor) -> None:
        """Raises on every rank what the contract demands of any."""
        error = None
        try:
            self.validate(*inputs)
        except (TypeError, ValueError) as raised:
            error = raised
        raise_together(error, self.group)

    def validate(self, *inputs: torch.Tensor) -> None:
        """Raises what the contract demands of this rank's call."""
        validation.fused_swiglu(*inputs)
        validation.expert_ids_in_range(inputs[4], num_experts=self.ranks * len(inputs[1]))

    def owner(self, ids: torch.Tensor, experts_here: int) -> torch.Tensor:
        """The rank that holds each expert."""
        return ids // experts_here

    def local(self, ids: torch.Tensor, experts_here: int) -> torch.Tensor:
        """Ids among this rank's experts."""
        return ids - self.rank * experts_here

    def received(self, sent: torch.Tensor) -> torch.Tensor:
        """How many rows come from each rank."""
        return transpose(sent[:, None], self.group)[:, 0]

    def capacity(self, sent: torch.Tensor) -> int:
        """Rows of a buffer: as many as any rank sends to any other."""
        most = sent.max()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def exchange(self, rows: torch.Tensor, sent: torch.Tensor, received: torch.Tensor, capacity: int) -> torch.Tensor:
        """Rows of all ranks for this one, one rank's behind the other's."""
        pad = torch.nn.functional.pad
        blocks = torch.stack([pad(each, (0, 0, 0, capacity - len(each))) for each in rows.split(sent.tolist())])
        arrived = Transpose.apply(blocks, self.group)
        return torch.cat([block[:count] for block, count in zip(arrived, received.tolist(), strict=True)])

    def sent_back(self, outs: torch.Tensor) -> torch.Tensor:
        """What is sent of the experts' outputs."""
        return outs


def raise_together(error: Exception | None, group: Any) -> None:
    """Raises this rank's error, or that of another."""
    errors: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    for each in errors:
        if each is not None:
            raise each


class DataParallel(Trainer):
    """`train_image_diffusion.train_step` with a part of the batch on each rank, and the state on all."""

    contract = "train_image_diffusion.train_step"
    claims: ClassVar[dict[str, Any]] = {"dtypes": ("float32",), "world_sizes": (2,)}

    def __call__(
        self,
        state: Mapping[str, torch.Tensor],
        images: torch.Tensor,
        labels: torch.Tensor,
        example_ids: torch.Tensor,
        *,
        config: ImageDiffusionConfig,
        mesh: Any,
    ) -> tuple[Tensors, Metrics]:
        self.group, self.ranks, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        return super().__call__(state, *self.batch(images, labels, example_ids), config=config)

    def batch(self, *batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What of its shard a rank takes."""
        return batch

    def validate(
        self, state: Mapping[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor
    ) -> None:
        error = None
        try:
            self.validate_shard(state, images, labels, example_ids)
        except (TypeError, ValueError) as raised:
            error = raised
        raise_together(error, self.group)
        self.batch_size = int(self.sum(torch.tensor(len(images))))
        if not self.batch_size:
            raise ValueError("images must hold an example on some rank, got none")

    def validate_shard(
        self, state: Mapping[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor
    ) -> None:
        """Raises what the contract demands of this rank's call; its shard may be empty."""
        validation.image_diffusion_batch(images, labels, example_ids, self.config)
        validation.training_state(state, image_models.state_shapes(self.model), self.config, like=images)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over the ranks."""
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def share(self, losses: torch.Tensor, batch_size: int) -> torch.Tensor:
        return super().share(losses, self.batch_size)

    def reduce(self, loss: torch.Tensor, gradients: Tensors) -> tuple[torch.Tensor, Tensors]:
        return self.sum(loss), {name: self.sum(each) for name, each in gradients.items()}
