"""The step of an upcycled GPT-2 on many ranks: each has a part of the batch, of every parameter and of its moments (FSDP2).

As in `train_image_diffusion`, the ranks first agree on the parts' sizes and on bad calls, and run as many microbatches, some of
them empty. The balance loss is of all ranks' examples of a microbatch: they tell each other the load of each expert, a few
numbers, and the loss is a sum over tokens once that is known. An expert is left alone if no rank has a token for it.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import fully_sharded_models
from gaugeblock.optimized.distributed.collectives import sum_over_ranks
from gaugeblock.optimized.distributed.training import ShardedRun
from gaugeblock.reference import validation
from gaugeblock.reference.configs import IGNORED_LABEL, MoELMConfig
from gaugeblock.reference.torch import train_moe_lm as reference
from gaugeblock.reference.torch import upcycled_gpt2
from gaugeblock.reference.torch.train_moe_lm import Metrics, Tensors


def train_step(
    state: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: MoELMConfig,
    mesh: DeviceMesh,
) -> tuple[Tensors, Metrics]:
    """Make one update on the losses of a batch that lies on all ranks; the given state is not written to.

    Scatters and gathers the whole state; a training run keeps a `ShardedTrainer`.

    Args:
        state: As of the reference, the same on every rank.
        input_ids, labels, example_ids: As of the reference, of this rank's examples. Any number, also 0.
        config: Of the run.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        new_state: As state, the same on every rank.
        metrics: In the dtype of the state; of the whole batch, the same on every rank.

    Raises:
        TypeError, ValueError: As the reference; or no rank has an example, or another rank's call raises, or does not fit to this
            one. Then all ranks raise, before any work.
        FloatingPointError: As the reference, on every rank; raised before any update.

    Source: `gaugeblock.reference.torch.train_moe_lm.train_step`; the sharding is that of ZeRO (arXiv:1910.02054), stage 3, by
    torch.distributed.fsdp.fully_shard.
    """
    trainer = ShardedTrainer(state, config=config, mesh=mesh)
    metrics = trainer.step(input_ids, labels, example_ids)
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

    def __init__(self, state: Mapping[str, torch.Tensor], *, config: MoELMConfig, mesh: DeviceMesh) -> None:
        self.config = config
        self.run = ShardedRun(
            fully_sharded_models.upcycled_gpt2,
            state,
            upcycled_gpt2.state_shapes(config.model),
            model_config=config.model,
            config=config,
            mesh=mesh,
            stacked=upcycled_gpt2.expert_names(config.model),
        )

    def step(self, input_ids: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor) -> Metrics:
        """Make one update on the losses of the batch of all ranks; arguments, result and errors as of `train_step`."""
        check = partial(validation.moe_lm_batch, input_ids, labels, example_ids, self.config)
        batch_sizes = self.run.agree_on_batch(check, {"input_ids": input_ids})
        of_microbatches = self.run.microbatch_sizes(batch_sizes)
        group, dtype, step = self.run.mesh.get_group(), self.run.dtype, int(self.run.updates)
        counts_BS = labels[:, 1:] != IGNORED_LABEL
        weights_BS = counts_BS.to(dtype) / sum_over_ranks(counts_BS.sum()[None], group)

        def shares(
            index: int, input_ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
        ) -> tuple[torch.Tensor, Tensors]:
            noise = reference.noise(ids, input_ids.shape[1], step, dtype=dtype, config=self.config)
            outputs = self.run.model(input_ids, noise)
            load = sum_over_ranks(outputs[4].double().sum(dim=0), group) / of_microbatches[index]
            example_shares = weights.new_ones(len(ids)) / sum(batch_sizes)
            return reference.shares_of_outputs(outputs, labels, weights, example_shares, load.to(dtype), config=self.config)

        batch = input_ids, labels, weights_BS, example_ids
        metrics, gradient_norm = self.run.step(shares, batch, len(of_microbatches), rows_used=reference.experts_used)
        return Metrics(**metrics, gradient_norm=gradient_norm)

    def state(self) -> Tensors:
        """Gather the whole state on every rank; later steps do not write to it."""
        return self.run.state()
