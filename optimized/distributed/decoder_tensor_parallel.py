"""Tensor-parallel SDAR, LLaDA and Dream: every rank has all tokens, some heads, some hidden features or experts, some of the
vocabulary.

A layer has one sum over the ranks for each branch, forward and backward (`tensor_parallel.py`); `partition_rules.of_decoder` says
which parameters are cut, and how. A rank has whole heads of keys and values, with all the heads of queries that they serve, and
keeps the past of these alone. It finds the embeddings of its part of the vocabulary, of which the ranks add up all, and gives the
logits of the same part, which they gather. Norms are computed on every rank alike, from the same numbers, so that no sum is
needed for their gradients; but of the norms of queries and keys, which have one weight for all heads, a rank sees its own heads:
their gradients of all layers are added up in one exchange. Of SDAR-MoE every rank routes all tokens, and adds what its experts
make of them to all ranks' sum (`experts_replicated_tokens.py`).

Each is the operation of its name in `gaugeblock.reference.torch`, called on every rank with the same arguments, whole, and
`mesh`, which has one dimension and the device type of the tensors; the config's num_key_value_heads, vocab_size, and
intermediate_size or num_experts are multiples of its size. Everything is in the dtype of the state, results of products and of
attention included, but for sums over ranks, sums of products, norms and rotations, which are float32 at least. Differentiable
once, by all that is floating: every rank calls backward where one does, and gets the whole gradients. A call that is bad on one
rank raises on all.

A run that goes on keeps its part of the state, and of the past, and calls what does not cut them in each call:

    parts = parts_of_state(state, partition_rules.of_decoder(config), group)
    logits, keys, values = sdar_cached.of_parts(parts, input_ids, own_keys, own_values, config=config, mesh=mesh)

Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized import decoder_composition, partition_rules
from gaugeblock.optimized.compiled.decoder_parts import LIBRARY
from gaugeblock.optimized.decoder_composition import DecoderParts
from gaugeblock.optimized.distributed import decoder_calls, moe_layers
from gaugeblock.optimized.distributed.collectives import GatherParts, SumOverRanks
from gaugeblock.optimized.distributed.tensor_parallel import gradients_summed, parts_of_state, summed_linear
from gaugeblock.optimized.model_parts import State
from gaugeblock.reference import validation
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.rotary import qk_norm_rotary

PAST = ("past_keys", "past_values")
Turned = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """An operation whose ranks share out heads, features or experts, and the vocabulary."""

    predict: Callable[..., Any]
    """A function of `decoder_composition`."""
    check: decoder_calls.Check
    takes_past: bool = False
    """Whether its last two arrays are keys and values, and its last two results likewise."""

    def __call__(self, state: State, *arrays: Any, config: Any, mesh: DeviceMesh) -> Any:
        """Run the operation, as the module says."""
        check = partial(self._check, num_ranks=mesh.size())
        decoder_calls.agree_on_call(check, state, *arrays, config=config, mesh=mesh, sizes=self._sizes(*arrays))
        rules, group = partition_rules.of_decoder(config), mesh.get_group()
        if not self.takes_past:
            return self.of_parts(parts_of_state(state, rules, group), *arrays, config=config, mesh=mesh)
        input_ids, *past = arrays
        parts = parts_of_state({**state, **dict(zip(PAST, past, strict=True))}, (*rules, *partition_rules.PAST), group)
        own_past = [parts.pop(name) for name in PAST]
        logits, *own = self.of_parts(parts, input_ids, *own_past, config=config, mesh=mesh)
        return logits, *(GatherParts.apply(each, 2, group) for each in own)

    def of_parts(self, parts: State, *arrays: torch.Tensor | None, config: Any, mesh: DeviceMesh) -> Any:
        """Run it with this rank's parts of the parameters, as `parts_of_state` cuts them; nothing is checked.

        Args:
            parts: By the names of the state.
            arrays: As of the operation, but of a past the rank's own heads.
            config: Of the whole model.
            mesh: Of the ranks.

        Returns:
            As the operation, but of keys and values the rank's own heads.
        """
        group = mesh.get_group()
        out = self.predict(_on_ranks(mesh), _norms_summed(parts, group), *arrays, config=_config_of_rank(config, mesh.size()))
        logits, *others = out if isinstance(out, tuple) else (out,)
        logits = GatherParts.apply(logits, 2, group)
        return (logits, *others) if others else logits

    def _check(self, state: State, *arrays: Any, config: Any, num_ranks: int) -> None:
        self.check(state, *arrays, config=config)
        partition_rules.require_divisible(config, partition_rules.of_decoder(config), num_ranks)

    def _sizes(self, ids: Any, *others: Any) -> decoder_calls.Facts:
        sizes = {"batch_size": lambda: ids.shape[0], "num_tokens": lambda: ids.shape[1]}
        return sizes | {"num_past_tokens": lambda: others[0].shape[3]} if self.takes_past else sizes


def _on_ranks(mesh: DeviceMesh) -> DecoderParts:
    """What a model is composed of on a rank."""
    group = mesh.get_group()
    experts: Callable[..., Any] = partial(moe_layers.qwen3_moe_replicated, mesh=mesh)
    return replace(
        LIBRARY,
        embed=partial(_embed, group=group),
        entering=lambda tokens: gradients_summed(group, tokens)[0],
        last_linear=lambda state, name, inner: summed_linear(inner, state[f"{name}.weight"], None, group),
        qk_norm_rotary=_qk_norm_rotary,
        qwen3_moe=experts,
    )


def _config_of_rank(config: Any, ranks: int) -> Any:
    """The config of what a rank has; hidden features, experts and the vocabulary are as many as its parameters have."""
    heads = {name: getattr(config, name) // ranks for name in ("num_attention_heads", "num_key_value_heads")}
    return replace(config, **heads)


def _norms_summed(parts: State, group: dist.ProcessGroup) -> State:
    """Return parameters of which the weights of heads' norms get the gradients of all ranks, in one exchange."""
    names = [name for name in parts if name.endswith(("q_norm.weight", "k_norm.weight"))]
    if not names:
        return parts
    # in float32, so that a weight's gradient is rounded once, when it is added up
    summed = gradients_summed(group, *(at_least_float32(parts[name]) for name in names))
    return {**parts, **dict(zip(names, summed, strict=True))}


def _qk_norm_rotary(query: torch.Tensor, key: torch.Tensor, *others: torch.Tensor, **options: Any) -> Turned:
    """Do what `qk_norm_rotary` does, of weights in float32 at least."""
    turned_query, turned_key = qk_norm_rotary(at_least_float32(query), at_least_float32(key), *others, **options)
    return turned_query.to(query.dtype), turned_key.to(key.dtype)


def _embed(table: torch.Tensor, ids: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the rows of ids, each of which one rank has; the sum of one number and zeros is exact in any dtype."""
    own_ids = ids.long() - dist.get_rank(group) * len(table)
    is_own = (own_ids >= 0) & (own_ids < len(table))
    rows_BSD = torch.where(is_own[..., None], table[own_ids.clamp(0, len(table) - 1)], 0)
    return SumOverRanks.apply(rows_BSD.flatten(0, 1), group).view(rows_BSD.shape)


llada = Model(predict=decoder_composition.llada, check=validation.llada)
dream = Model(predict=decoder_composition.dream, check=validation.dream)
sdar = Model(predict=decoder_composition.sdar, check=validation.sdar)
sdar_moe = Model(predict=decoder_composition.sdar_moe, check=validation.sdar_moe)
sdar_cached = Model(predict=decoder_composition.sdar_cached, check=validation.sdar_cached, takes_past=True)
sdar_training = Model(predict=decoder_composition.sdar_training, check=validation.sdar_training)
