"""What training steps on many ranks share: each has a part of every parameter, of its moments, and of the batch (FSDP2).

A block's parameters are gathered where it runs, forward and backward; its gradients are added up over the ranks and each rank
keeps its part, which the optimizer updates: element by element, so that it is the reference's own function, of local parts.
A step has two small exchanges of its own: of its losses and the gradients' norm, and before it whatever the trainer agrees on.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gaugeblock.optimized.distributed import saved_runs
from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.fully_sharded import gather_shards, gradient_of, local_part, shard_like
from gaugeblock.optimized.distributed.fully_sharded_models import Shardable
from gaugeblock.reference import validation
from gaugeblock.reference.configs import TrainingConfig
from gaugeblock.reference.torch import training as reference
from gaugeblock.reference.torch.training import Tensors

Shares = Callable[..., tuple[torch.Tensor, Tensors]]


class ShardedRun:
    """The state of a training run of which each rank holds its part; every rank makes the same calls.

    Args:
        model: Of the table `fully_sharded_models`, or composed of such.
        state: As of `gaugeblock.reference.torch.training`: whole, the same on every rank.
        shapes: Of the model's parameters.
        model_config: Of the model.
        config: Of the run.
        mesh: One-dimensional; its device type is that of the tensors.
        frozen: Names of what is not trained.
        stacked: Names of parameters of which each row is updated only where a batch has a use for it; their first axis is cut.

    Raises:
        TypeError: `state` is not a dict of arrays of one dtype, float32 or float64, with an integer step.
        ValueError: `mesh` has more than one dimension; `state` lacks an entry, has one too many, or differs between the ranks.
            All ranks raise where one does.
    """

    def __init__(
        self,
        model: Shardable,
        state: Mapping[str, torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        model_config: Any,
        config: TrainingConfig,
        mesh: DeviceMesh,
        frozen: Container[str] = (),
        stacked: Container[str] = (),
    ) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh.ndim}")
        self.config, self.mesh, self.shapes = config, mesh, shapes
        self._agree_on_state(state, shapes, frozen, stacked)

        self.updates = state["step"].clone()
        dtype = None if config.compute_dtype is None else getattr(torch, config.compute_dtype)
        whole = {part: reference.part_of_state(state, part) for part in (*config.parts, "num_updates")}
        how: dict[str, Any] = {"frozen": frozen, "activation_checkpointing": config.activation_checkpointing}
        self.model = model.sharded(whole["model"], config=model_config, mesh=mesh, compute_dtype=dtype, **how)
        parameters = dict(self.model.named_parameters())
        self.shards: dict[str, Tensors] = {"model": {name: parameters[name] for name in shapes}}
        for part in (*config.parts[1:], "num_updates"):
            self.shards[part] = {name: shard_like(parameters[name], each) for name, each in whole[part].items()}

    @property
    def dtype(self) -> torch.dtype:
        """That of the state."""
        return next(iter(self.shards["model"].values())).dtype

    def step(
        self,
        shares: Shares,
        batch: Iterable[torch.Tensor | None],
        num_microbatches: int,
        *,
        rows_used: reference.RowsUsed = reference.all_rows,
    ) -> tuple[Tensors, torch.Tensor]:
        """Make one update on the batches of all ranks.

        Args:
            shares: Function of a microbatch of this rank's, after its place: its share of what is minimized, [], and of each
                metric of the whole batch, by name.
            batch: This rank's arrays, whose first axis is of the examples, of which there may be none; None for what there is
                none of.
            num_microbatches: The same on every rank: all of them gather the parameters as often.
            rows_used: As of the reference's `finish`.

        Returns:
            metrics: By name, of the batches of all ranks, before the update.
            gradient_norm: [].

        Raises:
            FloatingPointError: As the reference, on every rank; nothing is updated.
        """
        self.model.zero_grad()
        metrics: Tensors = {}
        split = ([None] * num_microbatches if each is None else each.tensor_split(num_microbatches) for each in batch)
        for index, microbatch in enumerate(zip(*split, strict=True)):
            # gradients are exchanged once, when this rank has added up its own
            self.model.sharded.set_requires_gradient_sync(index == num_microbatches - 1)
            objective, some = shares(index, *microbatch)
            metrics = {name: metrics.get(name, 0) + share.detach() for name, share in some.items()}
            # FSDP averages over the ranks, and shares are to be added up
            (objective * (self.mesh.size() * self.config.loss_scale)).backward()

        parameters = self.shards["model"]
        trained = reference.trained_names(self.parts(), self.config)
        gradients = {name: local_part(gradient_of(parameters[name])) / self.config.loss_scale for name in trained}
        square = torch.stack([each.square().sum() for each in gradients.values()]).sum()
        *sums, square = self._sum(torch.cat([each.flatten() for each in (*metrics.values(), square)])).split(
            [*(each.numel() for each in metrics.values()), 1]
        )
        metrics = {name: each.view_as(metrics[name]) for name, each in zip(metrics, sums, strict=True)}
        gradient_norm = square.squeeze().sqrt()
        self._require_finite(metrics, gradients, gradient_norm)
        used = rows_used(metrics, config=self.config)
        self._update(gradients, gradient_norm, {name: shard_like(parameters[name], each) for name, each in used.items()})
        return metrics, gradient_norm

    def microbatch_sizes(self, batch_sizes: list[int]) -> list[int]:
        """Return how many examples of all ranks each microbatch has, of so many of each rank; on a rank some may be empty."""
        count = min(self.config.accumulation_steps, max(batch_sizes))
        of_ranks = [[len(part) for part in torch.empty(size).tensor_split(count)] for size in batch_sizes]
        return [sum(sizes) for sizes in zip(*of_ranks, strict=True)]

    def state(self) -> Tensors:
        """Gather the whole state on every rank; later steps do not write to it."""
        state = self.parts() | {"step": self.updates.clone()}
        whole = gather_shards({name: each for name, each in state.items() if isinstance(each, DTensor)}, self.mesh)
        numbers = {name for name, each in whole.items() if not self.shapes[name.partition(".")[2]]}  # which lie as rows of one
        return state | whole | {name: whole[name].reshape(()) for name in numbers}

    def parts(self) -> Tensors:
        """Return the state as it lies here: this rank's part of each tensor, and the step; later steps write to it."""
        return reference.join_state(self.shards, self.updates)

    def save(self, folder: Path) -> Path:
        """Write the run to a folder of the step within `folder`, each rank its parts, and return it.

        The folder appears under its name when it is whole: a run that is killed while it writes leaves the last one before.

        Raises:
            FileExistsError: The step was saved before; the other ranks raise ValueError.
            OSError: It cannot be written.
        """
        return saved_runs.save(self.parts(), folder, config=self.config, mesh=self.mesh)

    def load(self, path: Path, *, changed: Container[str] = ()) -> None:
        """Go on with a run that was saved, on as many ranks as it may have been.

        Args:
            path: What `save` returned; `gaugeblock.reference.saved_runs.last_saved` finds the last one.
            changed: Names of fields of the config that may be others than those that were saved, `model.depth` of its model's.

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: What is there is no whole saved run, or one of another config or of other tensors, or not on every rank
                the same. All ranks raise, before anything is changed.
        """
        self.updates = saved_runs.load(self.parts(), path, config=self.config, mesh=self.mesh, changed=changed)

    @torch.no_grad()
    def _update(self, gradients: Tensors, gradient_norm: torch.Tensor, used: Tensors) -> None:
        """Let this rank's parts be updated, in place."""
        local = {part: {name: local_part(each) for name, each in shards.items()} for part, shards in self.shards.items()}
        clipped = reference.clipped(gradients, gradient_norm, config=self.config)
        own = {name: local_part(each) for name, each in used.items()}
        reference.optimizer_step(local, clipped, int(self.updates), config=self.config, used=own)
        self.updates += 1
        if self.config.ema is not None:
            averages = reference.average(local["ema"], local["model"], int(self.updates), config=self.config.ema)
            for name, each in averages.items():
                local["ema"][name].copy_(each)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up the values of all ranks, in place."""
        dist.all_reduce(values, group=self.mesh.get_group())
        return values

    def _require_finite(self, metrics: Tensors, gradients: Tensors, gradient_norm: torch.Tensor) -> None:
        """Raise on every rank, as the reference does, where a metric or a gradient of any rank is not finite."""
        if not torch.cat([each.flatten() for each in (*metrics.values(), gradient_norm)]).isfinite().all():
            marks = self._sum(torch.stack([(0 * each).sum() for each in gradients.values()]))  # NaN, or 0
            reference.require_finite(self.updates, metrics, dict(zip(gradients, marks, strict=True)), gradient_norm)

    def _agree_on_state(
        self,
        state: Mapping[str, torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        frozen: Container[str],
        stacked: Container[str],
    ) -> None:
        error, facts = None, dict.fromkeys(("state must have the same dtype", "state must have the same step"), 0)
        try:
            validation.training_state(state, shapes, self.config, frozen=frozen, stacked=stacked)
            first = state[f"model.{next(iter(shapes))}"]
            require_device("state", first, self.mesh)
        except (TypeError, ValueError) as raised:
            error = raised  # raised again once the other ranks know
        else:
            dtype = validation.FLOATING.index(validation.dtype_name(first))
            facts = dict(zip(facts, (dtype, int(state["step"])), strict=True))
        agree(torch.zeros(self.mesh.size(), dtype=torch.int64, device=self.mesh.device_type), facts, error, self.mesh)

    def agree_on_batch(self, check: Callable[[], None], arrays: Mapping[str, torch.Tensor]) -> list[int]:
        """Return the number of examples of every rank.

        Args:
            check: Raises TypeError or ValueError where this rank's arrays are bad.
            arrays: By their names; the first has the dtype of the state, unless it is of integers.

        Raises:
            TypeError, ValueError: What `check` raises on any rank; or no rank has an example. All ranks raise, before any work.
        """
        error, batch_size = None, 0
        try:
            check()
            name, first = next(iter(arrays.items()))
            require_device(name, first, self.mesh)
            if first.is_floating_point() and first.dtype != self.dtype:
                raise TypeError(f"{name} must have the dtype of the state, {self.dtype}, got {first.dtype}")
        except (TypeError, ValueError) as raised:
            error = raised  # raised again once the other ranks know
        else:
            batch_size = first.shape[0]
        sizes = torch.full((self.mesh.size(),), batch_size, device=self.mesh.device_type)
        _, batch_sizes = agree(sizes, {}, error, self.mesh)
        if sum(batch_sizes) == 0:
            raise ValueError(f"{next(iter(arrays))} must hold at least one example on some rank, got none")
        return batch_sizes


def require_device(name: str, tensor: torch.Tensor, mesh: DeviceMesh) -> None:
    """Raise ValueError where a tensor does not lie where the mesh computes."""
    if tensor.device.type != mesh.device_type:
        raise ValueError(f"{name} must be on the device of mesh, {mesh.device_type}, got {tensor.device}")
