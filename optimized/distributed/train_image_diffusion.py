"""The image diffusion step on many ranks: each has a part of the batch, of every parameter and of its moments (FSDP2).

Before a step the ranks agree on the parts' sizes, so that the loss is the mean over all examples, and on bad calls, which raise
on every rank. All ranks run as many microbatches, some of them empty, since the blocks' exchanges need everyone. Draws are by
example, so that it does not matter which rank has it. The load balance of a mixture of experts is that of all ranks' examples of
a microbatch.

Shapes: B batch_size of this rank, C in_channels, H and W height and width.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import fully_sharded_models
from gaugeblock.optimized.distributed.fully_sharded_models import Model
from gaugeblock.optimized.distributed.training import ShardedRun
from gaugeblock.reference import validation
from gaugeblock.reference.configs import (
    DiTMoEModelConfig,
    FluxConfig,
    ImageDiffusionConfig,
    ImageModelConfig,
    MMDiTConfig,
    UNetConfig,
)
from gaugeblock.reference.torch import image_models
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
    """Make one update on the mean loss of a batch that lies on all ranks; the given state is not written to.

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
        FloatingPointError: A loss or a gradient is not finite on some rank; raised on all, before any update. The message
            names the step and the first bad one.

    Source: `gaugeblock.reference.torch.train_image_diffusion.train_step`; the sharding is that of ZeRO (arXiv:1910.02054),
    stage 3, by torch.distributed.fsdp.fully_shard.
    """
    trainer = ShardedTrainer(state, config=config, mesh=mesh)
    metrics = trainer.step(images, labels, example_ids)
    return trainer.state(), metrics


def train_step_on_texts(
    state: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor | None,
    example_ids: torch.Tensor,
    *,
    config: ImageDiffusionConfig,
    mesh: DeviceMesh,
) -> tuple[Tensors, Metrics]:
    """As `train_step`, of a model that is told texts; these as of the reference, of this rank's examples."""
    trainer = ShardedTrainer(state, config=config, mesh=mesh)
    metrics = trainer.step_on_texts(images, encoder_hidden_states, pooled_projections, example_ids)
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
        self.config = config
        self.run = ShardedRun(
            model_of(config.model),
            state,
            image_models.state_shapes(config.model),
            model_config=config.model,
            config=config,
            mesh=mesh,
            frozen=image_models.frozen_names(config.model),
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor) -> Metrics:
        """Make one update on the mean loss of the batch of all ranks; arguments, result and errors as of `train_step`."""
        check = partial(validation.image_diffusion_batch, images, labels, example_ids, self.config)
        return self._step(check, images, labels, None, None, example_ids)

    def step_on_texts(
        self,
        images: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor | None,
        example_ids: torch.Tensor,
    ) -> Metrics:
        """As `step`, of a model that is told texts."""
        texts = encoder_hidden_states, pooled_projections
        check = partial(validation.image_diffusion_batch_on_texts, images, *texts, example_ids, self.config)
        return self._step(check, images, None, *texts, example_ids)

    def state(self) -> Tensors:
        """Gather the whole state on every rank; later steps do not write to it."""
        return self.run.state()

    def _step(self, check: Callable[[], None], images: torch.Tensor, *others: torch.Tensor | None) -> Metrics:
        batch_sizes = self.run.agree_on_batch(check, {"images": images})
        of_microbatches = self.run.microbatch_sizes(batch_sizes)

        def shares(index: int, images: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
            losses_B, auxiliary_loss = reference.example_losses(
                self.run.model, images, *others, step=int(self.run.updates), config=self.config
            )
            # each rank has the auxiliary loss of all ranks' examples: of its value a part, of its gradient all, which counts once
            weight = of_microbatches[index] / sum(batch_sizes)
            value = auxiliary_loss.detach()
            of_rank = weight * (value / self.run.mesh.size() + auxiliary_loss - value)
            loss = losses_B.sum() / sum(batch_sizes)
            return loss + of_rank, {"loss": loss, "auxiliary_loss": of_rank}

        metrics, gradient_norm = self.run.step(shares, (images, *others), len(of_microbatches))
        return Metrics(**metrics, gradient_norm=gradient_norm)


def model_of(config: ImageModelConfig) -> Model:
    """Return the sharded model of a config."""
    match config:
        case DiTMoEModelConfig():
            return fully_sharded_models.dit_moe
        case UNetConfig():
            return fully_sharded_models.unet
        case FluxConfig():
            return fully_sharded_models.flux
        case MMDiTConfig():
            return fully_sharded_models.mmdit
        case _:
            return fully_sharded_models.dit
