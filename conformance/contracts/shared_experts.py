"""Contracts of the experts that all tokens pass."""

from collections.abc import Callable
from typing import Any

import torch

from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.engine.contract import Contract, Input, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import experts

Make = Callable[[Draw, Parameters], Tensors]


@row
def shared_swiglu() -> Contract:
    """The row of `experts.shared_swiglu`."""
    return Contract(
        name="experts.shared_swiglu",
        summary="Each token passes the SwiGLU expert that all tokens share.",
        formula="gate, up = halves of w13 @ hidden_states[t]; out[t] = w2 @ (silu(gate) * up)",
        source="DeepSeekMoE (arXiv:2401.06066) section 3.2, equation 9",
        reference=experts.shared_swiglu,
        inputs=(of_experts.HIDDEN_STATES, W13, W2),
        outputs=of_experts.OUTPUTS,
        options=(),
        batch="num_tokens",
        landmarks=LANDMARKS,
        factors=FACTORS,
        build=sizes,
        regimes=_regimes(dithered, lattice),
        flops=flops,
        workloads=(
            Workload("deepseek-v3/prefill-4096", sizes(4096, 7168, 2048), DEEPSEEK_V3),
            Workload("deepseek-v2-lite/prefill-4096", sizes(4096, 2048, 2 * 1408), DEEPSEEK_V2_LITE),
            Workload("deepseek-v3/decode-64", sizes(64, 7168, 2048), DEEPSEEK_V3),
            Workload("two-cores/prefill-2048", sizes(2048, 1024, 512), "a size for a CPU"),
        ),
        cases=0.5,
        rejections=(of_experts.ODD_ROWS,),
        implementations=(triton("shared_experts:shared_swiglu"),),
    )


@row
def gated_shared_swiglu() -> Contract:
    """The row of `experts.gated_shared_swiglu`."""
    return Contract(
        name="experts.gated_shared_swiglu",
        summary="Each token passes the SwiGLU expert that all tokens share, as far as the token's gate is open.",
        formula="out[t] = sigmoid(shared_gate @ hidden_states[t]) * shared_swiglu(hidden_states, w13, w2)[t]",
        source="Qwen2-MoE (Qwen2MoeSparseMoeBlock of transformers)",
        reference=experts.gated_shared_swiglu,
        inputs=(of_experts.HIDDEN_STATES, W13, W2, Input("shared_gate", (1, "hidden_size"), differentiable=True)),
        outputs=of_experts.OUTPUTS,
        options=(),
        batch="num_tokens",
        landmarks=LANDMARKS,
        factors=FACTORS,
        build=sizes,
        traits=(Trait("0", "shared_gate", lambda tensors: {"shared_gate": 0 * tensors["shared_gate"]}),),
        regimes=(*_regimes(gated, gated_lattice), Regime("saturated", saturated, "worst element")),
        flops=gated_flops,
        workloads=(
            Workload("qwen2-57b-a14b/prefill-4096", sizes(4096, 3584, 20480), QWEN2),
            Workload("qwen1.5-moe-a2.7b/prefill-4096", sizes(4096, 2048, 5632), "Qwen/Qwen1.5-MoE-A2.7B config.json"),
            Workload("qwen2-57b-a14b/decode-64", sizes(64, 3584, 20480), QWEN2),
            Workload("two-cores/prefill-2048", sizes(2048, 1024, 512), "a size for a CPU"),
        ),
        cases=0.5,
        rejections=(
            of_experts.ODD_ROWS,
            Rejection("shared_gate of two rows", "shared_gate", changed("shared_gate", lambda each: torch.cat([each, each]))),
        ),
        implementations=(triton("shared_experts:gated_shared_swiglu"),),
    )


def sizes(num_tokens: int, hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    """One point of the input space."""
    return {
        "num_tokens": num_tokens,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "two_intermediate_sizes": 2 * intermediate_size,
    }


W13 = Input("w13", ("two_intermediate_sizes", "hidden_size"), differentiable=True)
W2 = Input("w2", ("hidden_size", "intermediate_size"), differentiable=True)
FACTORS = tuple(each for each in of_experts.FACTORS if each.name in ("num_tokens", "hidden_size", "intermediate_size"))
LANDMARKS = (
    sizes(33, 100, 70),  # tails everywhere
    sizes(6, 320, 96),  # long sums: an accumulator that is not float32 shows
    sizes(260, 16, 32),  # gradients of weights over many tiles of rows
    sizes(17, 28, 160),  # Qwen2-57B-A14B's proportions
)
DEEPSEEK_V3 = "deepseek-ai/DeepSeek-V3 config.json, one shared expert"
DEEPSEEK_V2_LITE = "deepseek-ai/DeepSeek-V2-Lite config.json, two shared experts"
QWEN2 = "Qwen/Qwen2-57B-A14B config.json, shared_expert_intermediate_size"


def flops(parameters: Parameters) -> float:
    """Three matrix products a token."""
    return of_experts.flops({**parameters, "top_k": 1})


def gated_flops(parameters: Parameters) -> float:
    """The gate is one column more."""
    return flops(parameters) + 2.0 * parameters["num_tokens"] * parameters["hidden_size"]


def _of_one_expert(make: Make) -> Make:
    """Tokens and weights of the one expert that all tokens choose."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors = make(draw, {**parameters, "num_experts": 1, "top_k": 1})
        return {"hidden_states": tensors["hidden_states"], "w13": tensors["w13"][0], "w2": tensors["w2"][0]}

    return made


dithered, lattice = _of_one_expert(of_experts.dithered), _of_one_expert(of_experts.lattice)


def gated(draw: Draw, parameters: Parameters) -> Tensors:
    """The same with a gate that is half open, more or less."""
    width = parameters["hidden_size"]
    return {**dithered(draw, parameters), "shared_gate": draw.normal(1, width) * width**-0.5}


def gated_lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Every token's gate is open, or all are half open."""
    shared_gate = torch.zeros(1, parameters["hidden_size"], dtype=torch.float64)
    shared_gate[0, 0] = 41 * draw.integers(0, 2, 1)
    return {**lattice(draw, parameters), "shared_gate": shared_gate}


def saturated(draw: Draw, parameters: Parameters) -> Tensors:
    """Gates that are open or shut, so far that an exponential overflows."""
    tensors = gated(draw, parameters)
    tensors["hidden_states"][:, 0] = 1 - 2 * draw.integers(0, 2, parameters["num_tokens"])
    tensors["shared_gate"] = torch.zeros_like(tensors["shared_gate"])
    tensors["shared_gate"][0, 0] = 128
    return tensors


def _regimes(make: Make, exact: Make) -> tuple[Regime, ...]:
    return (
        Regime("dithered", make),
        Regime("adversarial", of_experts.cancelling(make), "worst element"),
        Regime("denormals", of_experts.tiny(make, down=-5), "worst element", differentiable=False),
        Regime("special", _with_bad_tokens(make), "worst element", differentiable=False),
        Regime("lattice", exact, "exact", differentiable=False),
    )


def _with_bad_tokens(make: Make) -> Make:
    """A token of NaN and one with an infinity."""
    return lambda draw, parameters: of_experts.special(make)(draw, {**parameters, "num_experts": 1, "top_k": 1})
