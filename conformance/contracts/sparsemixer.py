"""Contract of SparseMixer, whose choices are weighted among their neighbours."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import routers as of_routers
from gaugeblock.conformance.engine.contract import Contract, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import routers


@row
def sparsemixer() -> Contract:
    """The row of `routers.sparsemixer`."""
    return Contract(
        name="routers.sparsemixer",
        summary="Each token goes to its two best experts, each weighted among those whose logits are near.",
        formula=(
            "twice: id = argmax(x), without the expert chosen before; far = (x[id] - x) / max(|x|, x[id]) > 2 * jitter_eps; "
            "weight = softmax(x, or -inf where far)[id]"
        ),
        source="GRIN (arXiv:2409.12136) section 3; sparsemixer of transformers (Phi-3.5-MoE), as at inference",
        reference=routers.sparsemixer,
        inputs=(of_routers.LOGITS,),
        outputs=(
            Output("topk_weights", ("num_tokens", 2), dtype="float32", differentiable=True),
            Output("topk_ids", ("num_tokens", 2), dtype="int64", indexes="num_experts"),
        ),
        options=("jitter_eps",),
        batch="num_tokens",
        landmarks=(
            sizes(64, 13, 0.1),
            sizes(17, 300, 0.01),  # ids above 255
            sizes(5, 2, 0.1),
            sizes(33, 16, 0.01),  # Phi-3.5-MoE
        ),
        factors=(
            of_routers.TOKENS,
            kinds("num_experts", kind_of_count, 2, 8, 32, 5, 13, 257),
            either("jitter_eps", 0.01, 0.1),
        ),
        build=sizes,
        traits=(*of_routers.SOFTMAX_TRAITS[1:2], Trait("highest 0", "router_logits", _highest_0)),
        regimes=(
            Regime("steps", steps),
            Regime("ties", of_routers.tied, "worst element", differentiable=False),
            Regime("adversarial", of_routers.extreme, "worst element", differentiable=False),
            Regime("special", of_routers.special, "worst element", differentiable=False),
        ),
        flops=of_routers.flops,
        workloads=(Workload("phi-3.5-moe/prefill-4096", sizes(4096, 16, 0.01), "microsoft/Phi-3.5-MoE-instruct config.json"),),
        selection=Selection("topk_ids", _logits, 2),
        relabel=of_routers.shuffled_experts,
        rejections=(
            Rejection("one expert", "router_logits", lambda call: {"router_logits": call["router_logits"][:, :1]}),
            Rejection("a jitter of 0", "jitter_eps", lambda call: {"jitter_eps": 0.0}),
        ),
        implementations=(triton("sparsemixer:sparsemixer"),),
    )


def sizes(num_tokens: int, num_experts: int, jitter_eps: float) -> dict[str, Any]:
    """One point of the input space."""
    return {"num_tokens": num_tokens, "num_experts": num_experts, "jitter_eps": jitter_eps}


def steps(draw: Draw, parameters: Parameters) -> Tensors:
    """Logits below the highest by whole steps of three thresholds, and a little: none lies on the threshold of another, where
    rounding would decide whether it is near. Each token has its own highest."""
    tokens, experts = of_routers.logits_shape(parameters)
    threshold = 2 * parameters["jitter_eps"]
    step, little = draw.integers(0, 3, tokens, experts), 0.5 * draw.uniform(tokens, experts)
    highest = 1 + 3 * draw.uniform(tokens, 1)
    return {"router_logits": highest * (1 - threshold * (3 * step + little))}


def _highest_0(tensors: Tensors) -> Tensors:
    logits = tensors["router_logits"]
    return {"router_logits": logits - logits.amax(1, keepdim=True)}


def _logits(router_logits: torch.Tensor, **_: Any) -> torch.Tensor:
    return router_logits
