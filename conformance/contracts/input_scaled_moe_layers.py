"""Contracts of the MoE layers whose routers weigh what experts are given."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.contracts import routed_layers as of_layers
from gaugeblock.conformance.contracts.routed_layers import W2, W13
from gaugeblock.conformance.engine.contract import Contract, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.implementation import compiled, distributed, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference import moe_states
from gaugeblock.reference.torch import input_scaled_moe_layers


@row
def llama4_moe() -> Contract:
    """The row of `input_scaled_moe_layers.llama4_moe`."""
    return Contract(
        name="input_scaled_moe_layers.llama4_moe",
        summary="Each token, times its weight, passes the experts of its highest logits, and as it is the shared expert.",
        formula=(
            "router_logits = hidden_states @ router.weight.T; topk_weights, topk_ids = sigmoid_input_scaling(router_logits); "
            "hidden_states_out = sum of swiglu(topk_weights * hidden_states, experts[topk_ids]) + "
            "shared_swiglu(hidden_states, shared_expert)"
        ),
        source="Llama 4 (Llama4TextMoe of transformers), of which names and axes of parameters are too",
        reference=input_scaled_moe_layers.llama4_moe,
        inputs=of_layers.inputs(moe_states.LLAMA4),
        outputs=of_layers.OUTPUTS,
        options=("top_k",),
        batch="num_tokens",
        landmarks=tuple(
            {**point, "shared_intermediate_size": width}
            for point, width in zip((*of_layers.LANDMARKS, of_experts.sizes(17, 16, 24, 16, 1)), (28, 17, 40, 8, 24), strict=True)
        ),
        factors=(*of_experts.FACTORS, of_layers.SHARED_WIDTH),
        build=point,
        traits=(of_layers.gate_in_turn(ROUTER),),
        regimes=of_layers.regimes(ENTRIES, lattice=lattice, more=of_layers.and_shared),
        cases=0.25,
        flops=of_layers.flops,
        moved=of_layers.moved,
        workloads=(
            *of_layers.workloads("llama-4-scout", (5120, 8192, 16, 1), SCOUT, shared_intermediate_size=8192),
            *of_layers.workloads("llama-4-maverick", (5120, 8192, 128, 1), MAVERICK, shared_intermediate_size=8192),
            Workload("two-cores/prefill-2048", {**TWO_CORES, "shared_intermediate_size": 1024}, "a size for a CPU"),
        ),
        selection=Selection("topk_ids", _logits, "top_k"),
        relabel=of_experts.shuffled,
        shardings=of_layers.EXPERT_PARALLEL,
        rejections=(
            *of_layers.rejections(ROUTER, rows=2),
            Rejection("a shared expert of two widths", SHARED_DOWN, changed(f"state/{SHARED_DOWN}", lambda each: each[:, :-1])),
        ),
        implementations=(
            triton(),
            compiled("torch-grouped"),
            distributed("expert-parallel", "moe_layers:llama4_moe", **of_experts.ON_RANKS),
        ),
    )


SCOUT = "meta-llama/Llama-4-Scout-17B-16E config.json"
MAVERICK = "meta-llama/Llama-4-Maverick-17B-128E config.json"
TWO_CORES = of_experts.sizes(2048, 512, 1024, 16, 1)
ROUTER, SHARED_DOWN = "router.weight", "shared_expert.down_proj.weight"
ENTRIES: of_layers.Entries = {
    ROUTER: lambda drawn: drawn["gate"],
    W13: lambda drawn: drawn["w13"].mT,
    W2: lambda drawn: drawn["w2"].mT,
    **of_layers.shared_entries("shared_expert"),
}


def point(*, shared_intermediate_size: int, **values: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return of_layers.with_shared(of_experts.point(**values), shared_intermediate_size)


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Logits of 64 and -256: tokens are times 1 or 0."""
    favoured = draw.distinct_rows(2, parameters["top_k"], parameters["num_experts"])
    return of_layers.sums_exact(draw, parameters, favoured, (64.0, -256.0))


def _logits(hidden_states: torch.Tensor, state: Tensors, **_: Any) -> torch.Tensor:
    return hidden_states @ state[ROUTER].mT
