"""The image diffusion step on many ranks: each has a part of the batch, of every parameter and of AdamW's moments (FSDP2).

A block's parameters are gathered where it runs, forward and backward; its gradients are added up over the ranks and each rank
keeps its part, which AdamW updates. A step has two small exchanges of its own: before it, of the parts' sizes, so that the loss
is the mean over all examples, and of bad calls, which raise on every rank; after it, of the loss and the gradients' norm. All
ranks run as many microbatches, some of them empty, since the blocks' exchanges need everyone.

Draws are by example, so that it does not matter which rank has it.

Shapes: B batch_size of this rank, C in_channels, H and W height and width.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gaugeblock.optimized.distributed import fully_sharded_models
from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.fully_sharded import gather_shards, local_part, shard_like
from gaugeblock.reference import validation
from gaugeblock.reference.configs import ImageDiffusionConfig
from gaugeblock.reference.torch import dit, objectives
from gaugeblock.reference.torch import train_image_diffusion as reference
from gaugeblock.reference.torch.train_image_diffusion import Metrics, Tensors


def train_step(
    state: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: ImageDiffusionConfig,
    mesh: DeviceMesh,
) -> tuple[Tensors, Metrics]:
    """Make one update of AdamW on the mean loss of a batch that lies on all ranks; the given state is not written to.

    Scatters and gathers the whole state; a training run keeps a `ShardedTrainer`.

    Args:
        state: As of the reference, the same on every rank; float32 or float64, with an integer step.
        images: [batch_size of this rank, in_channels, input_size, input_size], dtype of the state. Any number, also 0.
        labels: [batch_size of this rank], integer in 0..num_classes - 1.
        example_ids: [batch_size of this rank], integer in 0..2**32 - 1; examples with the same id get the same draws.
        config: Of the run.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        new_state: As state, the same on every rank.
        metrics: In the dtype of the state; of the whole batch, the same on every rank.

    Raises:
        TypeError: An argument of this rank is not an array of the dtype above, or `state` is not a dict of arrays.
        ValueError: Shapes or devices do not fit together, `state` lacks an entry or has one too many, or no rank has an
            example; or another rank's call raises, or does not fit to this one. Then all ranks raise, before any work.
        FloatingPointError: The loss or a gradient is not finite on some rank; raised on all, before any update. The message
            names the step and the first bad one.

    Source: `gaugeblock.reference.torch.train_image_diffusion.train_step`; the sharding is that of ZeRO (arXiv:1910.02054),
    stage 3, by torch.distributed.fsdp.fully_shard.
    """
    trainer = ShardedTrainer(state, config=config, mesh=mesh)
    metrics = trainer.step(images, labels, example_ids)
    return trainer.state(), metrics


class ShardedTrainer:
    """A training run of which each rank holds its part; every rank makes the same calls.

    Args:
        state: As of `train_step`: whole, the same on every rank.
        config: Of the run.
        mesh: One-dimensional; its device type is that of the tensors.

    Raises:
        TypeError, ValueError: As `train_step`, of the state.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], *, config: ImageDiffusionConfig, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh.ndim}")
        self.config, self.mesh = config, mesh
        self.names = list(dit.state_shapes(config.model))
        self._agree_on_state(state)

        self.updates = state["step"].clone()
        self.model = fully_sharded_models.dit.sharded(reference.part_of_state(state, "model"), config=config.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        for name, parameter in self._parameters().items():
            moments = {moment: shard_like(parameter, state[f"{moment}.{name}"]) for moment in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.updates), device="cpu"), **moments}

    def step(self, images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor) -> Metrics:
        """Make one update on the mean loss of the batch of all ranks; arguments, result and errors as of `train_step`."""
        batch_sizes = self._agree_on_batch(images, labels, example_ids)
        num_microbatches = min(self.config.accumulation_steps, max(batch_sizes))
        self.optimizer.zero_grad()
        loss = images.new_zeros(())
        parts = (each.tensor_split(num_microbatches) for each in (images, labels, example_ids))
        for index, microbatch in enumerate(zip(*parts, strict=True)):
            # gradients are exchanged once, when this rank has added up its own
            self.model.sharded.set_requires_gradient_sync(index == num_microbatches - 1)
            share = self._example_losses(*microbatch).sum() / sum(batch_sizes)
            loss = loss + share.detach()
            (share * self.mesh.size()).backward()  # since FSDP averages over the ranks, and shares are to be added up

        gradients = {name: local_part(parameter.grad) for name, parameter in self._parameters().items()}
        square = torch.stack([each.square().sum() for each in gradients.values()]).sum()
        loss, square = self._sum(torch.stack([loss, square])).unbind()
        metrics = Metrics(loss, square.sqrt())
        self._require_finite(metrics, gradients)

        clipping = (self.config.max_gradient_norm / (metrics.gradient_norm + reference.CLIPPING_EPSILON)).clamp(max=1)
        for gradient in gradients.values():
            gradient.mul_(clipping)
        self.optimizer.step()
        self.updates += 1
        return metrics

    def state(self) -> Tensors:
        """Gather the whole state on every rank; later steps do not write to it."""
        parameters = self._parameters()
        exp_avg, exp_avg_sq = (
            {name: self.optimizer.state[parameter][moment] for name, parameter in parameters.items()}
            for moment in ("exp_avg", "exp_avg_sq")
        )
        state = reference.join_state(parameters, exp_avg, exp_avg_sq, self.updates.clone())
        return state | gather_shards({name: each for name, each in state.items() if isinstance(each, DTensor)}, self.mesh)

    def _parameters(self) -> Tensors:
        """Return this rank's shards, which are DTensors, by name in the order of the reference."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}

    def _example_losses(self, images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor) -> torch.Tensor:
        """Return the loss of each example, [batch_size]."""
        noise_BCHW, times_B, is_dropped_B = reference.draws(images, example_ids, int(self.updates), config=self.config)
        labels_B = labels.long().masked_fill(is_dropped_B, self.config.model.num_classes)
        noised_BCHW = objectives.rectified_flow_interpolate(images, noise_BCHW, times_B)
        velocity_BCHW = self.model(noised_BCHW, objectives.TIMESTEPS * times_B, labels_B)
        return objectives.rectified_flow_loss(velocity_BCHW, images, noise_BCHW, velocity=self.config.velocity)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up the values of all ranks, in place."""
        dist.all_reduce(values, group=self.mesh.get_group())
        return values

    def _require_finite(self, metrics: Metrics, gradients: Tensors) -> None:
        """Raise on every rank, as the reference does, where the loss or a gradient of any rank is not finite."""
        if not math.isfinite(metrics.loss + metrics.gradient_norm):
            marks = self._sum(torch.stack([(0 * each).sum() for each in gradients.values()]))  # NaN, or 0
            gradients = dict(zip(gradients, marks, strict=True))
            reference.require_finite(self.updates, metrics.loss, gradients, metrics.gradient_norm)

    def _agree_on_state(self, state: Mapping[str, torch.Tensor]) -> None:
        error, facts = None, dict.fromkeys(("state must have the same dtype", "state must have the same step"), 0)
        try:
            validation.image_diffusion_state(state, dit.state_shapes(self.config.model))
            first = state[f"model.{self.names[0]}"]
            _require_device("state", first, self.mesh)
        except (TypeError, ValueError) as raised:
            error = raised  # raised again once the other ranks know
        else:
            dtype = validation.FLOATING.index(validation.dtype_name(first))
            facts = dict(zip(facts, (dtype, int(state["step"])), strict=True))
        agree(torch.zeros(self.mesh.size(), dtype=torch.int64, device=self.mesh.device_type), facts, error, self.mesh)

    def _agree_on_batch(self, images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor) -> list[int]:
        """Return the number of examples of every rank."""
        error, batch_size, dtype = None, 0, self._parameters()[self.names[0]].dtype
        try:
            validation.image_diffusion_batch(images, labels, example_ids, self.config.model)
            _require_device("images", images, self.mesh)
            if images.dtype != dtype:
                raise TypeError(f"images must have the dtype of the state, {dtype}, got {images.dtype}")
        except (TypeError, ValueError) as raised:
            error = raised  # raised again once the other ranks know
        else:
            batch_size = images.shape[0]
        sizes = torch.full((self.mesh.size(),), batch_size, device=self.mesh.device_type)
        _, batch_sizes = agree(sizes, {}, error, self.mesh)
        if sum(batch_sizes) == 0:
            raise ValueError("images must hold at least one example on some rank, got none")
        return batch_sizes


def _require_device(name: str, tensor: torch.Tensor, mesh: DeviceMesh) -> None:
    if tensor.device.type != mesh.device_type:
        raise ValueError(f"{name} must be on the device of mesh, {mesh.device_type}, got {tensor.device}")
