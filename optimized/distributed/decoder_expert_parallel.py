"""Expert-parallel SDAR-MoE: a rank has some of the examples and, of each layer, some of the experts; all else is whole on each.

Attention is data parallel: nothing travels. Tokens travel to the experts that their rank's router chose, and back
(`experts.py`), in each layer once each way, and backward again. Gradients of what is whole on every rank are those of all ranks'
examples: of the routers they are added up layer by layer (`moe_layers.py`), of all else in one exchange.

Everything is in the dtype of the state, results of products and of attention included, also a rank's gradients of parameters; but
for sums over ranks, sums of products and what is inside of norms and rotations, which are float32 at least.

Shapes: as in `reference.torch.decoder`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized import decoder_composition, partition_rules
from gaugeblock.optimized.compiled.decoder_parts import LIBRARY
from gaugeblock.optimized.distributed import decoder_calls, moe_layers
from gaugeblock.optimized.distributed.tensor_parallel import gradients_summed, parts_of_state
from gaugeblock.optimized.model_parts import State
from gaugeblock.reference import validation
from gaugeblock.reference.configs import SDARMoEConfig


def sdar_moe(
    state: State, input_ids: torch.Tensor, *, config: SDARMoEConfig, mesh: DeviceMesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict masked tokens of this rank's examples, each token seeing its block and those before it.

    Every rank of the mesh calls it, and calls backward where one does, also without examples. Differentiable once, by the state;
    gradients are those of all ranks' examples, the same on every rank. A training run keeps the parts of the state alone, and
    calls `sdar_moe_of_parts`.

    Args:
        state: The parameters by name, shapes as in `reference.torch.sdar.state_shapes`, whole and the same on every rank.
        input_ids: [batch_size of this rank, num_tokens], int32 or int64 in 0 .. vocab_size - 1; any numbers on any rank.
        config: The model; its num_experts is a multiple of the world size.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        logits: [batch_size of this rank, num_tokens, vocab_size], dtype of the state.
        router_logits: [num_hidden_layers, batch_size of this rank, num_tokens, num_experts], float32 (float64 for a float64
            state).

    Raises:
        TypeError: An argument of this rank is not a tensor of the dtype above, or config not a SDARMoEConfig.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; an id names no token; or another rank's call raises. Then all ranks raise.

    Source: `gaugeblock.reference.torch.sdar.sdar_moe`; GShard (arXiv:2006.16668) section 3.2, without capacities.
    """
    check = partial(_check, num_ranks=mesh.size())
    decoder_calls.agree_on_call(check, state, input_ids, config=config, mesh=mesh)
    parts = parts_of_state(state, partition_rules.EXPERTS_OF_DECODER, mesh.get_group())
    return sdar_moe_of_parts(parts, input_ids, config=config, mesh=mesh)


def sdar_moe_of_parts(
    parts: State, input_ids: torch.Tensor, *, config: SDARMoEConfig, mesh: DeviceMesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `sdar_moe` does with this rank's experts, as `parts_of_state` cuts them by `partition_rules.EXPERTS_OF_DECODER`.

    Each layer checks that the ranks' experts fit together; nothing else is checked.
    """
    names = [name for name in parts if ".mlp." not in name]
    summed = gradients_summed(mesh.get_group(), *(parts[name] for name in names))
    experts: Callable[..., Any] = partial(moe_layers.qwen3_moe, mesh=mesh)
    of_ranks = {**parts, **dict(zip(names, summed, strict=True))}
    return decoder_composition.sdar_moe(replace(LIBRARY, qwen3_moe=experts), of_ranks, input_ids, config=config)


def _check(state: State, input_ids: torch.Tensor, *, config: SDARMoEConfig, num_ranks: int) -> None:
    validation.sdar_moe(state, input_ids, config=config)
    partition_rules.require_divisible(config, partition_rules.EXPERTS_OF_DECODER, num_ranks)
