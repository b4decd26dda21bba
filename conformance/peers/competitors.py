"""What public libraries offer for our contracts; they are imported only when they are asked to run."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

from gaugeblock.conformance.bench.problem import Problem, Results, Unavailable
from gaugeblock.conformance.engine.frameworks import call_torch


def grouped_mm(problem: Problem) -> Callable[[], Results]:
    """`torch.nn.functional.grouped_mm` between a sort by expert and a weighted sum."""
    _require_aligned_rows(problem)

    def experts(
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        order = topk_ids.flatten().argsort(stable=True)
        ends = topk_ids.flatten().bincount(minlength=w13.shape[0]).cumsum(0).to(torch.int32)
        rows = hidden_states[order // topk_ids.shape[1]]
        gate, up = torch.nn.functional.grouped_mm(rows, w13.mT, offs=ends).chunk(2, dim=-1)
        out = torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * up, w2.mT, offs=ends)
        chosen = out[order.argsort()].view(*topk_ids.shape, -1)
        return (chosen * topk_weights[..., None]).sum(1).to(hidden_states.dtype)

    return partial(call_torch, problem.contract, experts, problem.call)


def transformers_experts(implementation: str, problem: Problem) -> Callable[[], Results]:
    """transformers' module of the Qwen3-MoE experts, with one of its experts implementations."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    sizes = problem.parameters
    if implementation == "batched_mm":
        _guard_memory(problem)
    if implementation == "grouped_mm":
        _require_aligned_rows(problem)
    config = Qwen3MoeConfig(
        num_experts=sizes["num_experts"],
        hidden_size=sizes["hidden_size"],
        moe_intermediate_size=sizes["intermediate_size"],
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def experts(hidden_states: Any, w13: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> torch.Tensor:
        weights = {"gate_up_proj": w13, "down_proj": w2}
        return torch.func.functional_call(module, weights, (hidden_states, topk_ids, topk_weights))

    return partial(call_torch, problem.contract, experts, problem.call)


def transformers_layer(peer: str, implementation: str, problem: Problem) -> Callable[[], Results]:
    """A MoE layer of transformers, a class of `transformers_layers.py`, with one of its experts implementations."""
    if implementation == "grouped_mm":
        _require_aligned_rows(problem)
    from gaugeblock.conformance.peers import transformers_layers

    layer = getattr(transformers_layers, peer)(implementation)
    return partial(call_torch, problem.contract, layer, problem.call)


def torchtitan_module(peer: str, problem: Problem) -> Callable[[], Results]:
    """A MoE layer of torchtitan, or its experts: a class of `torchtitan.py`."""
    from gaugeblock.conformance.peers import torchtitan

    if problem.machine.dtype != "bfloat16":
        raise Unavailable(f"its experts compute in bfloat16, whatever they are given, not in {problem.machine.dtype}")
    _require_aligned_rows(problem)
    return partial(call_torch, problem.contract, getattr(torchtitan, peer)(), problem.call)


@dataclass(frozen=True)
class PeerModel:
    """A model of a public library: a class of a module of this folder, as it comes or compiled by torch.compile."""

    module: str
    peer: str
    is_compiled: bool
    layers: int = 0
    """With so many layers at most a model is compiled for a CPU too; of others that takes minutes."""

    def __call__(self, problem: Problem) -> Callable[[], Results]:
        """The call to be timed."""
        return partial(call_torch, problem.contract, self.function(problem), problem.call)

    def function(self, problem: Problem) -> Callable[..., Any]:
        """What is called as the contract says."""
        num_layers = problem.parameters.get("num_hidden_layers", math.inf)
        if self.is_compiled and problem.machine.device == "cpu" and num_layers > self.layers:
            raise Unavailable("compiling a whole model for a CPU takes minutes")
        candidate = getattr(import_module(f"gaugeblock.conformance.peers.{self.module}"), self.peer)()
        return torch.compile(candidate) if self.is_compiled else candidate


def _models(library: str, module: str, peer: str, **limits: int) -> dict[str, Callable[[Problem], Callable[[], Results]]]:
    """A library's model, eager and compiled."""
    return {f"{library} {how}": PeerModel(module, peer, how == "compiled", **limits) for how in ("eager", "compiled")}


def _layers(of_transformers: str, of_torchtitan: str = "") -> dict[str, Callable[[Problem], Callable[[], Results]]]:
    """transformers' layer with the implementations of its experts that are not dearer than the memory of most machines, and
    torchtitan's."""
    found: dict[str, Callable[[Problem], Callable[[], Results]]] = {
        f"transformers {each}": partial(transformers_layer, of_transformers, each) for each in ("eager", "grouped_mm")
    }
    return found | ({"torchtitan": partial(torchtitan_module, of_torchtitan)} if of_torchtitan else {})


def transformers_softmax_router(problem: Problem) -> Callable[[], Results]:
    """transformers' router of Qwen3-MoE, with an identity for its projection."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

    sizes = problem.parameters
    config = Qwen3MoeConfig(
        num_experts=sizes["num_experts"],
        hidden_size=sizes["num_experts"],
        num_experts_per_tok=sizes["top_k"],
        norm_topk_prob=sizes["renormalize"],
    )
    return _router_call(problem, Qwen3MoeTopKRouter(config))


def transformers_grouped_router(problem: Problem) -> Callable[[], Results]:
    """transformers' router of DeepSeek-V3, with an identity for its projection."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    sizes = problem.parameters
    if problem.call.cotangents is not None:
        raise Unavailable("returns its choices unsorted, so the cotangents would not fit")
    config = DeepseekV3Config(
        n_routed_experts=sizes["num_experts"],
        hidden_size=sizes["num_experts"],
        num_experts_per_tok=sizes["top_k"],
        n_group=sizes["num_groups"],
        topk_group=sizes["topk_groups"],
        norm_topk_prob=sizes["renormalize"],
        routed_scaling_factor=sizes["routed_scaling_factor"],
    )
    return _router_call(problem, DeepseekV3TopkRouter(config))


def _router_call(problem: Problem, module: torch.nn.Module) -> Callable[[], Results]:
    logits = problem.call.inputs["router_logits"]
    module = module.to(logits.device, logits.dtype).requires_grad_(False)
    torch.nn.init.eye_(module.get_parameter("weight"))

    def router(router_logits: Any, e_score_correction_bias: Any = None, **_: Any) -> Any:
        if e_score_correction_bias is not None:
            module.e_score_correction_bias = e_score_correction_bias
        return module(router_logits)[1:]

    return partial(call_torch, problem.contract, router, problem.call)


def _require_aligned_rows(problem: Problem) -> None:
    """torch's grouped_mm takes rows whose bytes are a multiple of 16."""
    itemsize = getattr(torch, problem.machine.dtype).itemsize
    for name in ("hidden_size", "intermediate_size"):
        if problem.parameters[name] * itemsize % 16:
            raise Unavailable(f"{name} of {problem.parameters[name]} gives rows that are not multiples of 16 bytes")


def _guard_memory(problem: Problem) -> None:
    """batched_mm copies the weights of every routed row; backward, as many gradients."""
    sizes = problem.parameters
    one_expert = 3 * sizes["hidden_size"] * sizes["intermediate_size"]
    passes = 1 if problem.call.cotangents is None else 2
    itemsize = getattr(torch, problem.machine.dtype).itemsize
    needed = passes * sizes["num_tokens"] * sizes["top_k"] * one_expert * itemsize
    if problem.machine.device == "cuda":
        limit = torch.cuda.mem_get_info()[0]
    else:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    if needed > limit:
        raise Unavailable(f"copies {needed / 2**30:.0f} GiB of weights, {limit / 2**30:.0f} GiB allowed")


def torch_function(function: Callable[..., torch.Tensor], compiled: bool, problem: Problem) -> Callable[[], Results]:
    """A function of torch in the dtype of its inputs, as it is or compiled for the very sizes."""
    called = torch.compile(function) if compiled else function
    return partial(call_torch, problem.contract, called, problem.call)


def _rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(hidden_states, weight.shape, weight, eps)


def _layer_norm(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    return torch.nn.functional.layer_norm(hidden_states, weight.shape, weight, bias, eps)


def _group_norm(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float) -> torch.Tensor:
    return torch.nn.functional.group_norm(images, num_groups, weight, bias, eps)


def _group_norm_silu(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float
) -> torch.Tensor:
    return torch.nn.functional.silu(_group_norm(images, weight, bias, num_groups=num_groups, eps=eps))


def _of_torch(function: Callable[..., torch.Tensor]) -> dict[str, Callable[[Problem], Callable[[], Results]]]:
    return {name: partial(torch_function, function, name == "torch.compile") for name in ("torch", "torch.compile")}


OUTSIDERS: dict[str, dict[str, Callable[[Problem], Callable[[], Results]]]] = {
    "experts.fused_swiglu": {
        "torch grouped_mm": grouped_mm,
        "transformers eager": partial(transformers_experts, "eager"),
        "transformers grouped_mm": partial(transformers_experts, "grouped_mm"),
        "transformers batched_mm": partial(transformers_experts, "batched_mm"),
        "torchtitan": partial(torchtitan_module, "TorchtitanRoutedExperts"),
    },
    "moe_layers.mixtral_moe": _layers("TransformersMixtralBlock"),
    "moe_layers.qwen3_moe": _layers("TransformersQwen3Block", "TorchtitanQwen3Block"),
    "moe_layers.qwen2_moe": _layers("TransformersQwen2Block", "TorchtitanQwen35Block"),
    "grouped_moe_layers.deepseek_v3_moe": _layers("TransformersDeepseekV3Block", "TorchtitanDeepseekV3Block"),
    "biased_moe_layers.gpt_oss_moe": _layers("TransformersGptOssBlock", "TorchtitanGptOssBlock"),
    "dit.dit": _models("diffusers", "diffusers", "DiffusersDit"),
    "mmdit.mmdit": _models("diffusers", "diffusers_mmdit", "DiffusersMmdit"),
    "train_image_diffusion.train_step_on_texts": {
        "diffusers' loop": PeerModel("diffusers_training", "DiffusersTrainingLoop", is_compiled=False),
    },
    "train_stable_diffusion.train_step": {
        "diffusers' loop": PeerModel("diffusers_stable_training", "DiffusersStableDiffusionLoop", is_compiled=False),
    },
    "train_block_diffusion.train_step": {
        "transformers' loop": PeerModel("transformers_training", "TransformersTrainingLoop", is_compiled=False),
    },
    "train_cycle_vae.train_step": {
        "LGDLM's loop": PeerModel("lgdlm_training", "LgdlmTrainingLoop", is_compiled=False),
    },
    "flux.flux": _models("diffusers", "diffusers_flux", "DiffusersFlux"),
    "train_moe_lm.train_step": {
        "moe-emergence's loop": PeerModel("transformers_gpt2", "EmergenceTrainingLoop", is_compiled=False),
    },
    "upcycled_gpt2.upcycled_gpt2": _models("transformers", "transformers_gpt2", "TransformersUpcycledGpt2"),
    "unet.unet": _models("diffusers", "diffusers_unet", "DiffusersUnet"),
    "unet.unet_text_time": _models("diffusers", "diffusers_unet", "DiffusersUnetTextTime"),
    "vae.encode": _models("diffusers", "diffusers_vae", "DiffusersVaeEncode"),
    "vae.decode": _models("diffusers", "diffusers_vae", "DiffusersVaeDecode"),
    "clip_text.clip_text": _models("transformers", "transformers_clip", "TransformersClip"),
    "llada.llada": _models("transformers", "transformers_decoders", "TransformersLlama", layers=2),
    "dream.dream": _models("transformers", "transformers_decoders", "TransformersQwen2", layers=2),
    "sdar.sdar": _models("transformers", "transformers_decoders", "TransformersQwen3", layers=2),
    "sdar.sdar_moe": _models("transformers", "transformers_decoders", "TransformersQwen3Moe", layers=2),
    "sdar.sdar_cached": _models("transformers", "transformers_decoders", "TransformersQwen3Cached", layers=2),
    "sdar.sdar_training": _models("transformers", "transformers_decoders", "TransformersQwen3Training", layers=2),
    "rotary.rotate": _models("diffusers", "diffusers", "DiffusersRotary"),
    "rotary.qk_norm_rotary": _models("diffusers", "diffusers", "DiffusersFluxQkNorm"),
    "gated_activations.swiglu": _models("diffusers", "diffusers", "DiffusersSwiGlu"),
    "gated_activations.geglu": _models("diffusers", "diffusers", "DiffusersGeGlu"),
    "norms.rms_norm": _of_torch(_rms_norm),
    "norms.layer_norm_affine": _of_torch(_layer_norm),
    "norms.group_norm": _of_torch(_group_norm),
    "norms.group_norm_silu": _of_torch(_group_norm_silu),
    "routers.softmax_topk": {"transformers, identity gate": transformers_softmax_router},
    "routers.grouped_sigmoid_topk": {"transformers, identity gate": transformers_grouped_router},
}
