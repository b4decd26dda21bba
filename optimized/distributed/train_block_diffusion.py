"""The block diffusion step on many ranks: each has a part of the batch, of every parameter and of its moments (FSDP2).

Which tokens are masked is drawn by example, so that it does not matter which rank has it, and before anything is computed: a sum
over the ranks makes the numbers of tokens those of the whole batch. All ranks run as many microbatches, some of them empty, since
the layers' exchanges need everyone. Before a step the ranks agree on bad calls, which raise on every rank.

Shapes: B batch_size of this rank, S num_tokens, which may be another on every rank.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import fully_sharded_models
from gaugeblock.optimized.distributed.fully_sharded_models import Model
from gaugeblock.optimized.distributed.training import ShardedRun
from gaugeblock.reference import validation
from gaugeblock.reference.configs import BlockDiffusionConfig, DreamConfig, LanguageModelConfig, LLaDAConfig
from gaugeblock.reference.torch import language_models
from gaugeblock.reference.torch import train_block_diffusion as reference
from gaugeblock.reference.torch.train_block_diffusion import Metrics, Tensors


def train_step(
    state: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    sample_ids: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: BlockDiffusionConfig,
    mesh: DeviceMesh,
) -> tuple[Tensors, Metrics]:
    """Make one update on a batch that lies on all ranks; the given state is not written to.

    Scatters and gathers the whole state; a training run keeps a `ShardedTrainer`.

    Args:
        state: As of the reference, the same on every rank; float32 or float64, with an integer step.
        input_ids, labels, sample_ids: [batch_size of this rank, num_tokens], int32 or int64, as of the reference. Any number of
            examples, also 0.
        example_ids: [batch_size of this rank], integer in 0..2**32 - 1; sequences with the same id get the same draws.
        config: Of the run.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        new_state: As state, the same on every rank.
        metrics: In the dtype of the state; of the whole batch, the same on every rank.

    Raises:
        TypeError: An argument of this rank is not an array of the dtype above, or `state` is not a dict of arrays.
        ValueError: Shapes or devices do not fit together, `state` lacks an entry or has one too many, an id or a label names no
            token, or no rank has an example; or another rank's call raises, or does not fit to this one. Then all ranks raise,
            before any work.
        FloatingPointError: A loss or a gradient is not finite on some rank; raised on all, before any update. The message
            names the step and the first bad one.

    Source: `gaugeblock.reference.torch.train_block_diffusion.train_step`; the sharding is that of ZeRO (arXiv:1910.02054),
    stage 3, by torch.distributed.fsdp.fully_shard.
    """
    trainer = ShardedTrainer(state, config=config, mesh=mesh)
    metrics = trainer.step(input_ids, labels, sample_ids, example_ids)
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

    def __init__(self, state: Mapping[str, torch.Tensor], *, config: BlockDiffusionConfig, mesh: DeviceMesh) -> None:
        self.config, model = config, config.model
        shapes = language_models.state_shapes(model)
        self.run = ShardedRun(model_of(model), state, shapes, model_config=model, config=config, mesh=mesh)

    def step(self, input_ids: torch.Tensor, labels: torch.Tensor, sample_ids: torch.Tensor, example_ids: torch.Tensor) -> Metrics:
        """Make one update on the batch of all ranks; arguments, result and errors as of `train_step`."""
        arrays, run = (input_ids, labels, sample_ids), self.run
        check = partial(validation.block_diffusion_batch, *arrays, example_ids, self.config)
        batch_sizes = run.agree_on_batch(check, {"input_ids": input_ids})
        noisy_ids, weights_BS, number = reference.masked_batch(
            *arrays, example_ids, int(run.updates), dtype=run.dtype, config=self.config
        )
        dist.all_reduce(number, group=run.mesh.get_group())

        def shares(_: int, *microbatch: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
            loss = reference.weighted_loss(run.model, *microbatch, config=self.config)
            return loss, {"loss": loss}

        batch = noisy_ids, *arrays, weights_BS / number.clamp(min=1)
        metrics, gradient_norm = run.step(shares, batch, len(run.microbatch_sizes(batch_sizes)))
        return Metrics(**metrics, gradient_norm=gradient_norm)

    def state(self) -> Tensors:
        """Gather the whole state on every rank; later steps do not write to it."""
        return self.run.state()


def model_of(config: LanguageModelConfig) -> Model:
    """Return the sharded model of a config."""
    match config:
        case LLaDAConfig():
            return fully_sharded_models.llada
        case DreamConfig():
            return fully_sharded_models.dream
        case _:
            return fully_sharded_models.sdar_training
