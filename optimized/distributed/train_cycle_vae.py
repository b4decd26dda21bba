"""The step of text-latent diffusion with cycles on many ranks: each has a part of the batch, of every parameter and of its
moments (FSDP2).

The ranks first agree on the parts' sizes and on bad calls, and run as many microbatches, some of them empty. Parameters are
gathered once for both directions, and once for both cycles.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.fully_sharded_models import text_latent_mmdit
from gaugeblock.optimized.distributed.training import ShardedRun
from gaugeblock.reference import validation
from gaugeblock.reference.configs import CycleVAEConfig
from gaugeblock.reference.torch import train_cycle_vae as reference
from gaugeblock.reference.torch.train_cycle_vae import Metrics, Tensors


def train_step(
    state: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    latents: torch.Tensor,
    attention_mask: torch.Tensor | None,
    example_ids: torch.Tensor,
    *,
    config: CycleVAEConfig,
    mesh: DeviceMesh,
) -> tuple[Tensors, Metrics]:
    """Make one update on the mean loss of a batch that lies on all ranks; the given state is not written to.

    Scatters and gathers the whole state; a training run keeps a `ShardedTrainer`.

    Args:
        state: As of the reference, the same on every rank.
        input_ids, latents, attention_mask, example_ids: As of the reference, of this rank's examples. Any number, also 0.
        config: Of the run.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        new_state: As state, the same on every rank.
        metrics: In the dtype of the state; of the whole batch, the same on every rank.

    Raises:
        TypeError, ValueError: As the reference; or no rank has an example, or another rank's call raises, or does not fit to this
            one. Then all ranks raise, before any work.
        FloatingPointError: As the reference, on every rank; raised before any update.

    Source: `gaugeblock.reference.torch.train_cycle_vae.train_step`; the sharding is that of ZeRO (arXiv:1910.02054), stage 3,
    by torch.distributed.fsdp.fully_shard.
    """
    trainer = ShardedTrainer(state, config=config, mesh=mesh)
    metrics = trainer.step(input_ids, latents, attention_mask, example_ids)
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

    def __init__(self, state: Mapping[str, torch.Tensor], *, config: CycleVAEConfig, mesh: DeviceMesh) -> None:
        self.config, shapes = config, reference.text_latent_mmdit.state_shapes(config.model)
        how: dict[str, Any] = {
            "model_config": config.model,
            "config": config,
            "mesh": mesh,
            "frozen": reference.frozen_names(config),
        }
        self.run = ShardedRun(text_latent_mmdit, state, shapes, **how)

    def step(
        self,
        input_ids: torch.Tensor,
        latents: torch.Tensor,
        attention_mask: torch.Tensor | None,
        example_ids: torch.Tensor,
    ) -> Metrics:
        """Make one update on the mean loss of the batch of all ranks; arguments, result and errors as of `train_step`."""
        batch = input_ids, latents, attention_mask, example_ids
        batch_sizes = self.run.agree_on_batch(
            partial(validation.cycle_vae_batch, *batch, self.config), {"latents": latents, "input_ids": input_ids}
        )
        step, weights = int(self.run.updates), reference.weight_metrics(self.run.updates, latents, config=self.config)
        runs = reference.cycles_run(step, config=self.config)

        def shares(_: int, *microbatch: Any) -> tuple[torch.Tensor, Tensors]:
            parts = reference.example_parts(self.run.model, *microbatch, step=step, runs=runs, config=self.config)
            means = {name: each.sum() / sum(batch_sizes) for name, each in parts.items()}
            return reference.weighted(means, step, config=self.config)

        metrics, gradient_norm = self.run.step(shares, batch, len(self.run.microbatch_sizes(batch_sizes)))
        return Metrics(**metrics, **weights, gradient_norm=gradient_norm)

    def state(self) -> Tensors:
        """Gather the whole state on every rank; later steps do not write to it."""
        return self.run.state()
