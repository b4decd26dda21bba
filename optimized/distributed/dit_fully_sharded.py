"""DiT whose ranks have a part of every parameter and of the batch (FSDP2): ZeRO's third stage.

A block's parameters are gathered where it runs, forward and backward; its gradients are added up over the ranks, and each rank
keeps its part. `FullyShardedDit` is the module of a training run, `dit` the operation with whole parameters.

Everything is float32 at least: gradients of a rank's examples that are rounded to bfloat16 before the ranks' are added up would
be further from the whole than one rounding.

Shapes: B batch_size of this rank, C in_channels, H and W height and width.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gaugeblock.optimized.distributed.dit_calls import agree_on_call
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch import dit as reference
from gaugeblock.reference.torch.precision import at_least_float32

Tensors = dict[str, torch.Tensor]


def dit(
    state: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    *,
    config: DiTConfig,
    mesh: DeviceMesh,
) -> torch.Tensor:
    """Predict the noise or the velocity (and with `learn_sigma` the variance) in this rank's latents of a class at a time.

    Every rank of the mesh calls it, and calls backward where one does. Differentiable once, by latents and state; gradients of
    the state are those of all ranks' latents, the same on every rank. Scatters and gathers the whole state; a training run keeps
    a `FullyShardedDit`.

    Args:
        state: The parameters by name, shapes as in `reference.torch.dit.state_shapes`, dtype of latents; the same on every rank.
        latents: [batch_size of this rank, in_channels, input_size, input_size], floating. Any number, also 0.
        timesteps: [batch_size of this rank], float32 or float64, usually in [0, 1000).
        class_labels: [batch_size of this rank], integer in 0 .. num_classes; num_classes is the label that was dropped.
        config: The model.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        [batch_size of this rank, out_channels, input_size, input_size], dtype as latents; computed in float32 (float64 for
        float64 latents) and rounded once.

    Raises:
        TypeError: An argument of this rank is not a tensor of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; a label names no class; or another rank's call raises, or does not fit to this one. Then all ranks raise.

    Source: `gaugeblock.reference.torch.dit.dit`; Rajbhandari et al. 2020 (arXiv:1910.02054), section 5, stage 3, by
    torch.distributed.fsdp.fully_shard.
    """
    agree_on_call(state, latents, timesteps, class_labels, config, mesh, batch_is_alike=False)
    times = timesteps.to(at_least_float32(latents).dtype)
    return _WholeState.apply((times, class_labels, config, mesh), tuple(state), latents, *state.values())


class FullyShardedDit(torch.nn.Module):
    """`dit.dit` in parts that `fully_shard` takes, with the parameters' names; each rank holds its part of each, as a DTensor.

    Args:
        state: The parameters, whole, the same on every rank; copied.
        config: The model.
        mesh: One-dimensional; its device type is that of the tensors.
    """

    sharded: FSDPModule
    """This module, as torch types it."""

    def __init__(self, state: Mapping[str, torch.Tensor], *, config: DiTConfig, mesh: DeviceMesh) -> None:
        super().__init__()
        self.config = config
        self.blocks = torch.nn.ModuleList(_Block(reference.block_state(state, index), config) for index in range(config.depth))
        _add_parameters(self, {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")})
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        object.__setattr__(self, "sharded", fully_shard(self, mesh=mesh))  # not a submodule: it is this one

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Return what `dit.dit` does of this rank's examples, of one dtype with the parameters; nothing is checked."""
        state = {name: parameter for name, parameter in self.named_parameters() if not name.startswith("blocks.")}
        hidden_BSD = reference.embed_patches(state, latents, config=self.config)
        conditioning_BD = reference.embed_conditions(state, timesteps, class_labels, config=self.config)
        for block in self.blocks:
            hidden_BSD = block(hidden_BSD, conditioning_BD)
        # FSDP warns of a result that is a view, which someone might write to
        return reference.final_layer(state, hidden_BSD, conditioning_BD, config=self.config).clone()


class _Block(torch.nn.Module):
    """`dit.block` with its parameters."""

    def __init__(self, state: Mapping[str, torch.Tensor], config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        _add_parameters(self, state)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        return reference.block(dict(self.named_parameters()), hidden_states, conditioning, config=self.config)


def _add_parameters(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a module copies of these tensors as parameters, by dotted names, for each part of which it gets a submodule."""
    for name, tensor in state.items():
        *path, last = name.split(".")
        owner = module
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, torch.nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))


class _WholeState(torch.autograd.Function):
    """A module of whole parameters, sharded for one call; their gradients are gathered."""

    @staticmethod
    def forward(
        ctx: Any, call: tuple[Any, ...], names: tuple[str, ...], latents: torch.Tensor, *state: torch.Tensor
    ) -> torch.Tensor:
        times, class_labels, config, mesh = call
        # also in inference mode, whose tensors FSDP cannot version
        with torch.inference_mode(False), torch.set_grad_enabled(any(ctx.needs_input_grad)):
            wide = {name: at_least_float32(each.clone()) for name, each in zip(names, state, strict=True)}
            module = FullyShardedDit(wide, config=config, mesh=mesh)
            leaf = at_least_float32(latents.clone()).detach().requires_grad_(any(ctx.needs_input_grad))
            out = module(leaf, times.clone(), class_labels.clone())
        ctx.names, ctx.mesh, ctx.module, ctx.leaf, ctx.out = names, mesh, module, leaf, out
        ctx.dtype = latents.dtype
        return out.detach().to(latents.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # FSDP averages over the ranks, and gradients are to be added up
        ranks = ctx.mesh.size()
        with torch.enable_grad():
            torch.autograd.backward(ctx.out, ranks * d_out.to(ctx.out.dtype))
        parameters = dict(ctx.module.named_parameters())
        whole = gather_shards({name: parameters[name].grad for name in ctx.names}, ctx.mesh)
        return None, None, (ctx.leaf.grad / ranks).to(ctx.dtype), *(whole[name].to(ctx.dtype) for name in ctx.names)


def shard_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor that every rank has whole, cut as the parameter is."""
    assert isinstance(parameter, DTensor)
    shard = distribute_tensor(tensor.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return shard.clone()  # AdamW writes to it


def local_part(shard: torch.Tensor | None) -> torch.Tensor:
    """Return what a DTensor holds on this rank."""
    assert isinstance(shard, DTensor)
    return shard.to_local()


def gather_shards(shards: Mapping[str, torch.Tensor], mesh: DeviceMesh) -> Tensors:
    """Return the whole tensors, in memory of their own; one exchange, since small ones cost as much as large ones."""
    padded = []  # to as many rows on each rank: a tensor is cut into equal parts, of which the last ones may be short or empty
    for shard in shards.values():
        local = local_part(shard)
        rows = local.new_zeros(-(-len(shard) // mesh.size()), *shard.shape[1:])
        rows[: len(local)] = local
        padded.append(rows.flatten())
    mine = torch.cat(padded)
    of_ranks = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(of_ranks, mine, group=mesh.get_group())
    parts = torch.stack(of_ranks).split([len(each) for each in padded], dim=1)
    return {
        name: part.reshape(-1, *shard.shape[1:])[: len(shard)].clone()
        for (name, shard), part in zip(shards.items(), parts, strict=True)
    }
