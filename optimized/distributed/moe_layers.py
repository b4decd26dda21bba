"""MoE layers over ranks: each routes its own tokens, and the experts lie on all ranks in one of the ways of `experts*.py`.

| way | a rank has | |
|---|---|---|
| all_to_all | some of the tokens, some experts | `experts.py` |
| all_gather | some of the tokens, some experts | `experts_gathered_tokens.py` |
| replicated_tokens | all tokens, some experts | `experts_replicated_tokens.py` |
| tensor_parallel | all tokens, a slice of each expert | `experts_tensor_parallel.py` |

The router, and the expert that all tokens pass, are whole on every rank. Where ranks have different tokens, their gradients are
added up over the ranks in float32, in the order of the ranks; else each rank has them whole. A call that is bad on one rank
raises on all: what is found before the experts run is told in their agreement.

Each is the operation of its name in `gaugeblock.reference.torch`, called on every rank with its part of the tokens (of DiT-MoE,
of the samples; of upcycled GPT-2, of the noise too) and of the entries `experts.*` of `state`, and `mesh`, which has one
dimension. Any rank may have any number of them, also none. Differentiable once, in hidden_states and all of `state`.

What is of all tokens, DiT-MoE's auxiliary loss and the load of upcycled GPT-2, is that of all ranks', the same on every rank
(`auxiliary_losses.py`). The auxiliary loss takes the same cotangent on every rank, as where each adds it to the loss of its own
tokens: it counts once, not once a rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.distributed import auxiliary_losses, expert_calls
from gaugeblock.optimized.distributed.collectives import replicated
from gaugeblock.optimized.distributed.dispatchers import WAYS
from gaugeblock.optimized.distributed.expert_calls import ExpertCall, Facts
from gaugeblock.reference import moe_states
from gaugeblock.reference.configs import DiTMoEConfig, GeluApproximation
from gaugeblock.reference.moe_parts import DISPATCHERS
from gaugeblock.reference.torch import dit_moe_layers, noisy_routers, routers
from gaugeblock.reference.torch import experts as reference
from gaugeblock.reference.torch.precision import at_least_float32

Router: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]


class _Parts:
    """What a layer is composed of, in one call of one rank; the routers are those of one rank."""

    def __init__(self, way: str, mesh: DeviceMesh, alike: Facts) -> None:
        self.mesh, self.alike, self.held = mesh, alike, DISPATCHERS[way]
        self.sum_of_experts: Callable[[ExpertCall, DeviceMesh], torch.Tensor] = WAYS[way].sum_of_experts
        self.num_holders = mesh.size() if self.held.splits_experts else 1
        self.has_told = False

    def __getattr__(self, router: str) -> Router:
        return partial(_route, router)

    def router_logits(self, hidden_states: torch.Tensor, *weight_and_bias: torch.Tensor) -> torch.Tensor:
        return moe_composition.router_logits(hidden_states, *self._whole(*weight_and_bias))

    def fused_swiglu(self, *inputs: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.run(expert_calls.swiglu(*inputs)._replace(out_dtype=out_dtype))

    def fused_swiglu_oai(self, *inputs: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
        call: Callable[..., ExpertCall] = expert_calls.swiglu_oai
        return self.run(call(*inputs, alpha=alpha, limit=limit))

    def fused_gelu_mlp(self, *inputs: torch.Tensor, approximate: GeluApproximation) -> torch.Tensor:
        call: Callable[..., ExpertCall] = expert_calls.gelu_mlp
        return self.run(call(*inputs, approximate=approximate))

    def shared_swiglu(self, hidden_states: torch.Tensor, *weights: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return reference.shared_swiglu(hidden_states.to(out_dtype), *self._whole(*weights))

    def gated_shared_swiglu(self, hidden_states: torch.Tensor, *weights: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return reference.gated_shared_swiglu(hidden_states.to(out_dtype), *self._whole(*weights))

    def run(self, call: ExpertCall) -> torch.Tensor:
        """Run the experts; what is wrong with the call of any rank raises on all."""
        self.has_told = True
        return self.sum_of_experts(call._replace(alike=self.alike), self.mesh)

    def balance_loss(self, router_logits: torch.Tensor, topk_ids: torch.Tensor, config: DiTMoEConfig) -> torch.Tensor:
        return auxiliary_losses.balance_loss(router_logits, topk_ids, config, self.mesh.get_group())

    def load_fractions(self, topk_ids: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        return auxiliary_losses.load_fractions(topk_ids, router_logits, self.mesh.get_group())

    def _whole(self, *parameters: torch.Tensor) -> list[torch.Tensor]:
        """What every rank has alike, as float32 at least, with the gradients of all ranks' tokens."""
        if self.held.splits_tokens:
            return replicated(self.mesh.get_group(), *parameters)
        return [at_least_float32(each) for each in parameters]


def _route(router: str, router_logits: torch.Tensor, *inputs: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    """Triton's router on a GPU, which has no float64; else the reference."""
    if router_logits.is_cuda and router_logits.dtype != torch.float64:
        # imported here, since Triton is an optional package
        from gaugeblock.optimized.triton import dit_moe_layers as of_dit_moe
        from gaugeblock.optimized.triton import noisy_routers as noisy_kernels
        from gaugeblock.optimized.triton import routers as kernels

        others: Mapping[str, Router] = {"ste_topk": noisy_kernels.ste_topk, "dit_moe_gate": of_dit_moe.dit_moe_gate}
        return (others.get(router) or getattr(kernels, router))(router_logits, *inputs, **options)
    return (REFERENCES.get(router) or getattr(routers, router))(router_logits, *inputs, **options)


REFERENCES: Mapping[str, Router] = MappingProxyType({"ste_topk": noisy_routers.ste_topk, "dit_moe_gate": dit_moe_layers.gate})
"""Routers that are not among `routers`."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer of which each rank runs its part."""

    composed: Callable[..., tuple[torch.Tensor, ...]]
    """A function of `moe_composition`."""
    axes: moe_states.StateAxes
    """Of its parameters, by whose names a rank whose call is bad joins the agreement of the others."""
    way: str = "all_to_all"
    """One of `dispatchers.WAYS`."""
    agreed: tuple[str, ...] = ()
    """Fields of its `config` that decide what ranks exchange."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        state: moe_composition.State,
        *inputs: torch.Tensor,
        mesh: DeviceMesh,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:
        expert_calls.require_one_dimension(mesh)
        parts = _Parts(self.way, mesh, self._alike(state, options))
        try:
            return self.composed(parts, hidden_states, state, *inputs, **options)
        except (TypeError, ValueError) as error:
            if not parts.has_told:
                of_experts = [name for name in self.axes if _is_of_experts(name)]
                parts.sum_of_experts(expert_calls.bad_call(error, of_experts, parts.alike), mesh)
            raise

    def _alike(self, state: moe_composition.State, options: Mapping[str, Any]) -> Facts:
        """What ranks must have alike of what is whole on each; whether it is there shows when it is looked at."""
        of_all = [name for name in self.axes if not _is_of_experts(name)]
        tracked = {f"state[{name!r}] must require a gradient alike": partial(_is_tracked, state, name) for name in of_all}
        return tracked | {f"config must have the same {field}": partial(_field, options, field) for field in self.agreed}


def _is_of_experts(name: str) -> bool:
    """Whether an entry of the state is split among the ranks."""
    return name.startswith("experts.")


def _is_tracked(state: moe_composition.State, name: str) -> int:
    return int(torch.is_grad_enabled() and state[name].requires_grad)


def _field(options: Mapping[str, Any], name: str) -> int:
    return int(getattr(options["config"], name))


mixtral_moe = _Layer(moe_composition.mixtral_moe, moe_states.QWEN3)
qwen3_moe = _Layer(moe_composition.qwen3_moe, moe_states.QWEN3)
qwen3_moe_replicated = _Layer(moe_composition.qwen3_moe, moe_states.QWEN3, "replicated_tokens")
qwen2_moe = _Layer(moe_composition.qwen2_moe, moe_states.QWEN2)
qwen2_moe_gathered = _Layer(moe_composition.qwen2_moe, moe_states.QWEN2, "all_gather")
qwen2_moe_replicated = _Layer(moe_composition.qwen2_moe, moe_states.QWEN2, "replicated_tokens")
qwen2_moe_tensor_parallel = _Layer(moe_composition.qwen2_moe, moe_states.QWEN2, "tensor_parallel")
deepseek_v2_moe = _Layer(moe_composition.deepseek_v2_moe, moe_states.DEEPSEEK_V2)
deepseek_v3_moe = _Layer(moe_composition.deepseek_v3_moe, moe_states.DEEPSEEK_V3)
llama4_moe = _Layer(moe_composition.llama4_moe, moe_states.LLAMA4)
gpt_oss_moe = _Layer(moe_composition.gpt_oss_moe, moe_states.GPT_OSS)
upcycled_gpt2_moe = _Layer(moe_composition.upcycled_gpt2_moe, moe_states.UPCYCLED_GPT2)
dit_moe = _Layer(moe_composition.dit_moe, moe_states.DIT_MOE, agreed=("per_sample",))
