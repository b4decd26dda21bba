"""Contracts of the MoE layers with a softmax router."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.contracts import routed_layers as of_layers
from gaugeblock.conformance.contracts.routed_layers import GATE, W2, W13
from gaugeblock.conformance.engine.contract import Contract, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import either
from gaugeblock.conformance.engine.implementation import compiled, distributed, jax, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference import moe_states
from gaugeblock.reference.torch import experts, moe_layers


@row
def mixtral_moe() -> Contract:
    """The row of `moe_layers.mixtral_moe`."""
    return Contract(
        name="moe_layers.mixtral_moe",
        summary="Each token passes the SwiGLU experts that a linear router gives the highest probability.",
        formula=(
            "router_logits = hidden_states @ gate.weight.T; topk_weights, topk_ids = softmax_topk(router_logits), renormalized; "
            "hidden_states_out = fused_swiglu(hidden_states, experts.gate_up_proj, experts.down_proj, topk_weights, topk_ids)"
        ),
        source="Mixtral of Experts (arXiv:2401.04088) section 2.1; names of parameters as in transformers' MixtralSparseMoeBlock",
        reference=moe_layers.mixtral_moe,
        inputs=of_layers.inputs(moe_states.QWEN3),
        outputs=of_layers.OUTPUTS,
        options=("top_k",),
        batch="num_tokens",
        parameters=of_experts.parameters,
        landmarks=(
            *of_layers.LANDMARKS,
            of_experts.sizes(17, 24, 16, 8, 2),  # Mixtral's experts
            of_experts.sizes(3, 16, 8, 128, 8),  # Qwen3's
        ),
        factors=of_experts.FACTORS,
        build=of_experts.point,
        traits=(of_layers.gate_in_turn(),),
        regimes=of_layers.regimes(of_layers.ROUTED),
        cases=0.5,
        flops=of_layers.flops,
        moved=of_layers.moved,
        workloads=(
            *of_layers.workloads("mixtral-8x7b", (4096, 14336, 8, 2), MIXTRAL_8X7B),
            *of_layers.workloads("mixtral-8x22b", (6144, 16384, 8, 2), MIXTRAL_8X22B, uses=("prefill-4096",)),
            Workload("two-cores/prefill-2048", of_experts.sizes(2048, 1024, 512, 32, 4), "a size for a CPU"),
        ),
        formulas=(_softmax_of_chosen,),
        selection=Selection("topk_ids", scores, "top_k"),
        relabel=of_experts.shuffled,
        shardings=of_experts.SHARDINGS,
        rejections=of_layers.rejections(),
        implementations=(
            triton(),
            compiled("torch-grouped"),
            jax("jax-grouped"),
            of_experts.EXPERT_PARALLEL,
        ),
    )


@row
def qwen3_moe() -> Contract:
    """The row of `moe_layers.qwen3_moe`."""
    return Contract(
        name="moe_layers.qwen3_moe",
        summary="The same, with probabilities as they are or renormalized: Qwen3-MoE's, OLMoE's and SDAR-MoE's layer.",
        formula=(
            "router_logits = hidden_states @ gate.weight.T; topk_weights, topk_ids = softmax_topk(router_logits, renormalize); "
            "hidden_states_out = fused_swiglu(hidden_states, experts.gate_up_proj, experts.down_proj, topk_weights, topk_ids)"
        ),
        source="Qwen3 (arXiv:2505.09388) section 2; OLMoE (arXiv:2409.02060) section 2; SDAR (arXiv:2510.06303)",
        reference=moe_layers.qwen3_moe,
        inputs=of_layers.inputs(moe_states.QWEN3),
        outputs=of_layers.OUTPUTS,
        options=("top_k", "renormalize"),
        batch="num_tokens",
        landmarks=of_experts.dealt(
            (*of_layers.LANDMARKS, of_experts.sizes(3, 16, 8, 128, 8), of_experts.sizes(5, 16, 8, 64, 8)), *RENORMALIZE
        ),
        factors=(*of_experts.FACTORS, either("renormalize", False, True)),
        build=qwen3_point,
        traits=(of_layers.gate_in_turn(),),
        regimes=of_layers.regimes(of_layers.ROUTED),
        cases=0.25,
        flops=of_layers.flops,
        moved=of_layers.moved,
        workloads=(
            *of_layers.workloads("qwen3-30b-a3b", (2048, 768, 128, 8), QWEN3_30B_A3B, renormalize=True),
            *of_layers.workloads("olmoe-1b-7b", (2048, 1024, 64, 8), OLMOE, renormalize=False),
            *of_layers.workloads("sdar-30b-a3b", (2048, 768, 128, 8), SDAR, uses=("decode-64",), renormalize=True),
            Workload(
                "two-cores/prefill-2048", {**of_experts.sizes(2048, 512, 256, 64, 8), "renormalize": True}, "a size for a CPU"
            ),
        ),
        selection=Selection("topk_ids", scores, "top_k"),
        relabel=of_experts.shuffled,
        shardings=of_experts.SHARDINGS,
        rejections=of_layers.rejections(),
        implementations=(triton(), compiled("torch-grouped"), of_experts.EXPERT_PARALLEL),
    )


@row
def qwen2_moe() -> Contract:
    """The row of `moe_layers.qwen2_moe`."""
    return Contract(
        name="moe_layers.qwen2_moe",
        summary="The same, and an expert that all tokens pass, as far as a gate of each token is open.",
        formula=(
            "hidden_states_out = qwen3_moe(hidden_states) + sigmoid(shared_expert_gate.weight @ hidden_states[t]) * "
            "shared_swiglu(hidden_states, shared_expert)"
        ),
        source="Qwen2 (arXiv:2407.10671) section 2.2.2; names of parameters as in transformers' Qwen2MoeSparseMoeBlock",
        reference=moe_layers.qwen2_moe,
        inputs=of_layers.inputs(moe_states.QWEN2),
        outputs=of_layers.OUTPUTS,
        options=("top_k", "renormalize"),
        batch="num_tokens",
        landmarks=tuple(
            {**point, "shared_intermediate_size": width}
            for point, width in zip(of_experts.dealt(of_layers.LANDMARKS, *RENORMALIZE), (28, 17, 40, 8), strict=True)
        ),
        factors=(*of_experts.FACTORS, of_layers.SHARED_WIDTH, either("renormalize", False, True)),
        build=qwen2_point,
        traits=(of_layers.gate_in_turn(),),
        regimes=of_layers.regimes(QWEN2, more=_and_gated_shared),
        cases=0.25,
        flops=of_layers.flops,
        moved=of_layers.moved,
        workloads=(
            *of_layers.workloads(
                "qwen2-57b-a14b", (3584, 2560, 64, 8), QWEN2_57B_A14B, shared_intermediate_size=20480, renormalize=False
            ),
            Workload(
                "two-cores/prefill-2048",
                {**TWO_CORES, "shared_intermediate_size": 1024, "renormalize": False},
                "a size for a CPU",
            ),
        ),
        selection=Selection("topk_ids", scores, "top_k"),
        relabel=of_experts.shuffled,
        shardings=of_experts.SHARDINGS,
        rejections=(
            *of_layers.rejections(),
            Rejection("a shared expert of two widths", SHARED_DOWN, changed(f"state/{SHARED_DOWN}", lambda each: each[:, :-1])),
        ),
        implementations=(
            triton(),
            compiled("torch-grouped"),
            of_experts.EXPERT_PARALLEL,
            distributed("gathered-tokens", "moe_layers:qwen2_moe_gathered", **of_experts.ON_RANKS),
            distributed(
                "replicated-tokens", "moe_layers:qwen2_moe_replicated", sharding="replicated_tokens", **of_experts.ON_RANKS
            ),
            distributed(
                "tensor-parallel", "moe_layers:qwen2_moe_tensor_parallel", sharding="tensor_parallel", **of_experts.ON_RANKS
            ),
            distributed("jax-expert-parallel", "sharded_layers:qwen2_moe", framework="jax", world_sizes=(4,)),
        ),
    )


TWO_CORES = of_experts.sizes(2048, 512, 256, 64, 8)
MIXTRAL_8X7B = "mistralai/Mixtral-8x7B-v0.1 config.json"
MIXTRAL_8X22B = "mistralai/Mixtral-8x22B-v0.1 config.json"
QWEN3_30B_A3B = "Qwen/Qwen3-30B-A3B config.json"
QWEN2_57B_A14B = "Qwen/Qwen2-57B-A14B config.json"
OLMOE = "allenai/OLMoE-1B-7B-0924 config.json"
SDAR = "JetLM/SDAR-30B-A3B-Chat config.json"
RENORMALIZE = ({"renormalize": True}, {"renormalize": False})
SHARED_DOWN = "shared_expert.down_proj.weight"
QWEN2: of_layers.Entries = {
    **of_layers.ROUTED,
    **of_layers.shared_entries("shared_expert"),
    "shared_expert_gate.weight": lambda drawn: drawn["shared_gate"],
}


def qwen3_point(*, renormalize: bool, **values: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    point = of_experts.point(**values)
    return None if point is None else {**point, "renormalize": renormalize}


def qwen2_point(*, shared_intermediate_size: int, **values: Any) -> dict[str, Any] | None:
    """The same with the width of the expert that all tokens pass."""
    return of_layers.with_shared(qwen3_point(**values), shared_intermediate_size)


def _and_gated_shared(make: of_layers.Make, exact: bool) -> of_layers.Make:
    """The expert that all tokens pass, and its gate: where sums are to be exact, it is half open, or open."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors, width = of_layers.and_shared(make, exact)(draw, parameters), parameters["hidden_size"]
        if not exact:
            return {**tensors, "shared_gate": draw.normal(1, width) * width**-0.5}
        shared_gate = torch.zeros(1, width, dtype=torch.float64)
        shared_gate[0, 0] = 41 * draw.integers(0, 2, 1)
        return {**tensors, "shared_gate": shared_gate}

    return made


def _logits(hidden_states: torch.Tensor, state: Tensors) -> torch.Tensor:
    return hidden_states @ state[GATE].mT


def scores(hidden_states: torch.Tensor, state: Tensors, **_: Any) -> torch.Tensor:
    """What experts are chosen by."""
    return torch.softmax(_logits(hidden_states, state), -1)


def _softmax_of_chosen(hidden_states: torch.Tensor, state: Tensors, *, top_k: int) -> tuple[torch.Tensor, ...]:
    """The commonest other way: the softmax of the chosen logits is the renormalized softmax of all."""
    router_logits = _logits(hidden_states, state)
    ids = router_logits.topk(top_k, -1).indices
    topk_weights = router_logits.gather(-1, ids).softmax(-1)
    return experts.fused_swiglu(hidden_states, state[W13], state[W2], topk_weights, ids), router_logits, ids
