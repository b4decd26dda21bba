"""Models whose ranks have a part of every parameter (FSDP2), and of the batch: ZeRO's third stage.

A block's parameters are gathered where it runs, forward and backward; its gradients are added up over the ranks, and each rank
keeps its part. `FullyShardedModel` is the module of a training run, `run_sharded` makes an operation with whole parameters of it.

Everything is float32 at least: gradients of a rank's examples that are rounded to bfloat16 before the ranks' are added up would
be further from the whole than one rounding.
"""

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gaugeblock.reference.torch.recomputation import recomputed

State = Mapping[str, torch.Tensor]
Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs a model, and what of it is gathered at once."""

    predict: Callable[..., Any]
    """Takes `gathered`, the state, then the arrays of a call. It runs each block as `gathered(function)(...)`, where one argument
    of the function is the mapping of the block's parameters. Nothing is checked."""
    blocks: str
    """A pattern of what the names of a block's parameters begin with. What is in no block is gathered for the whole call."""


class FullyShardedModel(torch.nn.Module):
    """A model with its parameters' names; each rank holds its part of each, as a DTensor; single numbers are of shape [1].

    Called with the arrays of a call, of this rank's examples, it returns what the model's operation returns of them; parameters
    and arrays are of one dtype, and nothing is checked.

    Args:
        plan: The model.
        state: The parameters, whole, the same on every rank; copied.
        mesh: One-dimensional; its device type is that of the tensors.
        compute_dtype: Of parameters where they are gathered, and so of the arrays of a call; by default that of the state.
            Gradients are added up in the dtype of the state.
        frozen: Names of what gets no gradients.
        activation_checkpointing: Whether a block keeps its arguments alone for the backward pass, and runs there once more.
    """

    sharded: FSDPModule
    """This module, as torch types it."""

    def __init__(
        self,
        plan: Plan,
        state: State,
        *,
        mesh: DeviceMesh,
        compute_dtype: torch.dtype | None = None,
        frozen: Container[str] = (),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.plan, self.activation_checkpointing = plan, activation_checkpointing
        precision = MixedPrecisionPolicy(compute_dtype, next(iter(state.values())).dtype, cast_forward_inputs=False)
        for name, tensor in state.items():
            *path, last = name.split(".")
            owner: torch.nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, _Block())
                owner = owner.get_submodule(part)
            copy = _with_rows(tensor.detach()).clone(memory_format=torch.contiguous_format)
            owner.register_parameter(last, torch.nn.Parameter(copy, requires_grad=name not in frozen))
        begins = (re.match(rf"({plan.blocks})\.", name) for name in state)
        self.blocks_of_names = {each.string: each[1] for each in begins if each}
        for name in dict.fromkeys(self.blocks_of_names.values()):
            fully_shard(self.get_submodule(name), mesh=mesh, mp_policy=precision)
        object.__setattr__(self, "sharded", fully_shard(self, mesh=mesh, mp_policy=precision))  # not a submodule: it is this one

    def forward(self, *arrays: Any) -> Any:
        """Run the model on this rank's examples."""
        state = dict(self.named_parameters())
        self.blocks_of_parts = {id(state[name]): self.get_submodule(block) for name, block in self.blocks_of_names.items()}
        outputs = self.plan.predict(self._gathered, state, *arrays)
        # FSDP warns of a result that is a view, which someone might write to
        return tuple(each.clone() for each in outputs) if isinstance(outputs, tuple) else outputs.clone()

    def _gathered(self, function: Function) -> Function:
        """Return a function that runs this one with the whole parameters of the block that it is given parts of."""

        def run(*arguments: Any, **options: Any) -> Any:
            place = next(place for place, each in enumerate(arguments) if isinstance(each, Mapping))
            owner, *others = {self.blocks_of_parts.get(id(part)) for part in arguments[place].values()}
            if owner is None or others:
                return function(*arguments, **options)  # what the model has outside of its blocks is gathered
            run_block = partial(recomputed, function) if self.activation_checkpointing else function
            return owner(run_block, arguments[:place], arguments[place + 1 :], options)

        return run


class _Block(torch.nn.Module):
    """Parameters that are gathered, and dropped again, around what is called with them; or some of those."""

    def forward(self, function: Function, before: tuple[Any, ...], after: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return function(*before, dict(self.named_parameters()), *after, **options)


def run_sharded(plan: Plan, state: State, *arrays: torch.Tensor | None, mesh: DeviceMesh) -> tuple[torch.Tensor, ...]:
    """Run a model of whole parameters on this rank's examples, sharded for one call; nothing is checked.

    Every rank of the mesh calls it, and calls backward where one does. Gradients of the state are those of all ranks' examples,
    the same on every rank.

    Args:
        plan: The model.
        state: The parameters by name, the same on every rank.
        arrays: Of the call; None for what is left out. The first floating one has the dtype of the state.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        All that the model does, in float32 (float64 for a float64 state). Differentiable once, by floating arrays and state.
    """
    return _WholeState.apply(plan, tuple(state), mesh, *arrays, *map(_with_rows, state.values()))


class _WholeState(torch.autograd.Function):
    """A module of whole parameters, sharded for one call; their gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, names: tuple[str, ...], mesh: DeviceMesh, *tensors: Any) -> tuple[torch.Tensor, ...]:
        needed = ctx.needs_input_grad[3:]
        # also in inference mode, whose tensors FSDP cannot version
        with torch.inference_mode(False), torch.set_grad_enabled(any(needed)):
            dtype = torch.promote_types(torch.float32, tensors[-1].dtype)
            wide = [None if each is None else _widened(each, dtype) for each in tensors]
            arrays, state = wide[: -len(names)], dict(zip(names, wide[-len(names) :], strict=True))
            module = FullyShardedModel(plan, {name: each for name, each in state.items() if each is not None}, mesh=mesh)
            for array, needs in zip(arrays, needed, strict=False):
                if array is not None:
                    array.requires_grad_(needs)
            outputs = module(*arrays)
        ctx.names, ctx.mesh, ctx.module, ctx.arrays = names, mesh, module, arrays
        ctx.outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ctx.dtypes = [None if each is None else each.dtype for each in tensors]
        returned = tuple(each.detach() for each in ctx.outputs)
        ctx.mark_non_differentiable(*(own for own, each in zip(returned, ctx.outputs, strict=True) if not each.requires_grad))
        return returned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # FSDP averages over the ranks, and gradients are to be added up
        ranks = ctx.mesh.size()
        pairs = zip(ctx.outputs, d_outputs, strict=True)
        outputs, d_outputs = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)  # a load has no gradient
        with torch.enable_grad():
            torch.autograd.backward(outputs, [ranks * each for each in d_outputs])
        shards = {name: gradient_of(parameter) for name, parameter in ctx.module.named_parameters()}
        whole = gather_shards({name: shards[name] for name in ctx.names}, ctx.mesh)
        of_arrays = [each if each is None or each.grad is None else each.grad / ranks for each in ctx.arrays]
        gradients = [*of_arrays, *(whole[name] for name in ctx.names)]
        needed = ctx.needs_input_grad[3:]
        return (
            None,
            None,
            None,
            *(
                each.to(dtype) if needs and each is not None else None
                for each, dtype, needs in zip(gradients, ctx.dtypes, needed, strict=True)
            ),
        )


def _with_rows(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter with rows that ranks can share out: FSDP takes no single numbers."""
    return parameter.reshape(parameter.shape or (1,))


def _widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy to differentiate by, which is not what was made in inference mode; a floating one of this dtype at least."""
    copy = tensor.detach().clone()
    return copy.to(torch.promote_types(copy.dtype, dtype)) if copy.is_floating_point() else copy


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient, 0 where nothing was computed with the parameter."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def shard_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor that every rank has whole, cut as the parameter is."""
    assert isinstance(parameter, DTensor)
    shard = distribute_tensor(_with_rows(tensor.detach()), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return shard.clone()  # AdamW writes to it


def local_part(shard: torch.Tensor | None) -> torch.Tensor:
    """Return what a DTensor holds on this rank."""
    assert isinstance(shard, DTensor)
    return shard.to_local()


def gather_shards(shards: State, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Return the whole tensors, in memory of their own; an exchange a dtype, since small ones cost as much as large ones."""
    whole: dict[str, torch.Tensor] = {}
    for dtype in dict.fromkeys(shard.dtype for shard in shards.values()):
        whole |= _gather_of_one_dtype({name: shard for name, shard in shards.items() if shard.dtype == dtype}, mesh)
    return whole


def _gather_of_one_dtype(shards: State, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
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
