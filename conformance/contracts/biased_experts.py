"""Contracts of the experts that have biases."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.contracts.routed_experts import sizes
from gaugeblock.conformance.engine.contract import Contract, Input, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, either
from gaugeblock.conformance.engine.implementation import compiled, triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import experts


@row
def fused_gelu_mlp() -> Contract:
    """The row of `experts.fused_gelu_mlp`."""
    return Contract(
        name="experts.fused_gelu_mlp",
        summary="Each token passes the experts of one hidden layer that its router chose; their weighted outputs are added up.",
        formula=(
            "out[t] = sum over j of topk_weights[t, j] * (w2[e] @ gelu(w1[e] @ hidden_states[t] + b1[e]) + b2[e]), "
            "e = topk_ids[t, j]; gelu as in experts.fused_geglu"
        ),
        source="GPT-2 (openai/gpt-2 model.py, mlp) as expert: sparse upcycling (arXiv:2212.05055) section 3",
        reference=experts.fused_gelu_mlp,
        inputs=(
            of_experts.HIDDEN_STATES,
            Input("w1", ("num_experts", "intermediate_size", "hidden_size"), differentiable=True),
            Input("b1", ("num_experts", "intermediate_size"), differentiable=True),
            of_experts.W2,
            of_experts.B2,
            *of_experts.ROUTES,
        ),
        outputs=of_experts.OUTPUTS,
        options=("approximate",),
        batch="num_tokens",
        landmarks=of_experts.dealt(
            (*of_experts.LANDMARKS, sizes(17, 24, 96, 8, 2), of_experts.IDS_ABOVE_255),  # the sixth: GPT-2's proportions
            {"approximate": "tanh"},
            {"approximate": "none"},
        ),
        factors=(*of_experts.FACTORS, of_experts.APPROXIMATE),
        build=mlp_point,
        traits=(*of_experts.TRAITS, *BIAS_TRAITS),
        regimes=(
            *of_experts.regimes(mlp, down=-10),
            # a library's erf errs to one side in so narrow a range, so that errors are no sample
            Regime("constant-probing", in_the_tail, "worst element"),
            Regime("lattice", mlp_lattice, "exact", differentiable=False),
        ),
        flops=lambda parameters: of_experts.flops(parameters, matrices=2),
        moved=mlp_moved,
        workloads=(
            Workload("gpt2-upcycled-8e/train-4096", mlp_sizes(4096, 768, 3072, 8, 2), UPCYCLED),
            Workload("gpt2-upcycled-8e/decode-64", mlp_sizes(64, 768, 3072, 8, 2), UPCYCLED),
            Workload("two-cores/prefill-2048", mlp_sizes(2048, 768, 512, 32, 4), "a size for a CPU"),
        ),
        formulas=(mlp_by_sums,),
        relabel=of_experts.shuffled,
        cases=0.5,
        shardings=of_experts.SHARDINGS | {"tensor_parallel": {"intermediate_size": "even"}},
        rejections=(of_experts.IDS_FOR_MORE_TOKENS,),
        implementations=(
            triton(),
            compiled("torch-grouped"),
            of_experts.EXPERT_PARALLEL,
            of_experts.tensor_parallel("fused_gelu_mlp"),
        ),
    )


@row
def fused_swiglu_oai() -> Contract:
    """The row of `experts.fused_swiglu_oai`."""
    return Contract(
        name="experts.fused_swiglu_oai",
        summary="Each token passes the experts of gpt-oss that its router chose, whose gates are clamped; their weighted outputs "
        "are added up.",
        formula=(
            "gate, up = min(even rows, limit), clamp(odd rows, -limit, limit) of w13[e] @ hidden_states[t] + b13[e]; out[t] = "
            "sum over j of topk_weights[t, j] * (w2[e] @ (gate * sigmoid(alpha * gate) * (up + 1)) + b2[e]), e = topk_ids[t, j]"
        ),
        source="openai/gpt-oss, gpt_oss/torch/model.py: swiglu, MLPBlock",
        reference=experts.fused_swiglu_oai,
        inputs=(
            of_experts.HIDDEN_STATES,
            of_experts.W13,
            Input("b13", ("num_experts", "two_intermediate_sizes"), differentiable=True),
            of_experts.W2,
            of_experts.B2,
            *of_experts.ROUTES,
        ),
        outputs=of_experts.OUTPUTS,
        options=("alpha", "limit"),
        batch="num_tokens",
        landmarks=of_experts.dealt(
            (
                *of_experts.LANDMARKS,
                sizes(17, 45, 45, 32, 4),  # gpt-oss-20b's proportions
                of_experts.MANY_TILES,
                of_experts.IDS_ABOVE_255,
            ),
            {"alpha": 1.702, "limit": 7.0},
            {"alpha": 1.702, "limit": 1.0},
            {"alpha": 1.0, "limit": 7.0},
        ),
        factors=(*of_experts.FACTORS, either("alpha", 1.702, 1.0), either("limit", 7.0, 1.0)),
        build=oai_point,
        traits=(*of_experts.TRAITS, *BIAS_TRAITS),
        regimes=(
            *of_experts.regimes(oai, down=-10),
            Regime("clamped", clamped),
            # activations are subnormal in float16: what underflows depends on where weights are applied
            Regime("constant-probing", below_the_limit, "worst element", differentiable=False),
            # where a clamp's derivative is a matter of taste
            Regime("at the limit", at_the_limit, "worst element", differentiable=False),
        ),
        flops=of_experts.flops,
        moved=oai_moved,
        workloads=(
            *of_experts.published("gpt-oss-120b", (2880, 2880, 128, 4), "openai/gpt-oss-120b config.json", oai_sizes),
            Workload("gpt-oss-20b/prefill-4096", oai_sizes(4096, 2880, 2880, 32, 4), "openai/gpt-oss-20b config.json"),
            Workload("two-cores/prefill-2048", oai_sizes(2048, 1024, 512, 32, 4), "a size for a CPU"),
        ),
        relabel=of_experts.shuffled,
        cases=0.5,
        shardings=of_experts.SHARDINGS | {"tensor_parallel": of_experts.TENSOR_PARALLEL_PAIRS},
        rejections=(
            of_experts.IDS_FOR_MORE_TOKENS,
            of_experts.ODD_ROWS,
            Rejection("limit of 0", "limit", lambda call: {"limit": 0.0}),
        ),
        implementations=(
            triton(),
            triton("experts:fused_swiglu_oai_fast", name="triton-fast", dtypes=("bfloat16", "float32"), batch_invariant=False),
            compiled("torch-grouped"),
            of_experts.EXPERT_PARALLEL,
            of_experts.tensor_parallel("fused_swiglu_oai"),
        ),
    )


UPCYCLED = "openai-community/gpt2 config.json, eight copies of its MLP: sparse upcycling (arXiv:2212.05055)"
BIAS_TRAITS = (
    Trait("0", "biases", lambda tensors: {name: 0 * each for name, each in tensors.items() if name in ("b1", "b13", "b2")}),
    Trait("large", "biases", lambda tensors: {"b2": 64 * tensors["b2"].sign() + tensors["b2"].frac()}),
)


def mlp_sizes(num_tokens: int, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """One point of the input space of `fused_gelu_mlp`, with GPT-2's GELU."""
    return sizes(num_tokens, hidden_size, intermediate_size, num_experts, top_k) | {"approximate": "tanh"}


def mlp_point(approximate: str, **values: int) -> dict[str, Any] | None:
    """The point of `fused_gelu_mlp` with these values of the factors."""
    point = of_experts.point(**values)
    return None if point is None else point | {"approximate": approximate}


def oai_sizes(num_tokens: int, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """One point of the input space of `fused_swiglu_oai`, with gpt-oss' constants."""
    return sizes(num_tokens, hidden_size, intermediate_size, num_experts, top_k) | {"alpha": 1.702, "limit": 7.0}


def oai_point(alpha: float, limit: float, **values: int) -> dict[str, Any] | None:
    """The point of `fused_swiglu_oai` with these values of the factors."""
    point = of_experts.point(**values)
    return None if point is None else point | {"alpha": alpha, "limit": limit}


def mlp_moved(parameters: Parameters, itemsize: int) -> float:
    """Two matrices and two biases of each expert in use."""
    biases = parameters["intermediate_size"] + parameters["hidden_size"]
    return of_experts.moved(parameters, itemsize, matrices=2, biases=biases)


def oai_moved(parameters: Parameters, itemsize: int) -> float:
    """The biases on top of what gated experts have."""
    return of_experts.moved(parameters, itemsize, biases=parameters["two_intermediate_sizes"] + parameters["hidden_size"])


def mlp(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens, weights and biases of unit variance."""
    tokens = draw.normal(parameters["num_tokens"], parameters["hidden_size"])
    experts, width, inner = (parameters[name] for name in ("num_experts", "hidden_size", "intermediate_size"))
    weights = {
        "w1": draw.normal(experts, inner, width) * width**-0.5,
        "b1": draw.normal(experts, inner),
        "w2": draw.normal(experts, width, inner) * inner**-0.5,
        "b2": draw.normal(experts, width),
    }
    return {"hidden_states": tokens, **weights, **of_experts.routing(draw, parameters)}


def mlp_by_sums(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    approximate: str,
) -> torch.Tensor:
    """`fused_gelu_mlp` with the GELU of libraries."""

    def gelu_experts(rows: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
        inner = experts.grouped_linear(rows, w1, b1, group_sizes)
        return experts.grouped_linear(of_experts.gelu_by_sums(inner, approximate), w2, b2, group_sizes)

    return experts.sum_of_experts(gelu_experts, hidden_states, topk_weights, topk_ids, num_experts=len(w2))


def in_the_tail(draw: Draw, parameters: Parameters) -> Tensors:
    """Hidden values about -3 to -2.5, where the two GELUs lie 3 to 10 % apart."""
    tensors = mlp(draw, parameters)
    between = {"b1": -3 + draw.uniform(*tensors["b1"].shape) / 2, "b2": 0 * tensors["b2"]}
    return tensors | between | {"hidden_states": tensors["hidden_states"] / 16}


def mlp_lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Integers of which every partial sum is exact: hidden values of 41 to 247, which a GELU returns as they are."""
    experts, width, inner = (parameters[name] for name in ("num_experts", "hidden_size", "intermediate_size"))
    return {
        "hidden_states": of_experts.lattice_tokens(draw, parameters),
        "w1": of_experts.sparse(draw, experts * inner, width, 6).view(experts, inner, width),
        "b1": draw.integers(41, 242, experts, inner).to(torch.float64),
        "w2": of_experts.lattice_down(draw, experts, width, inner),
        "b2": draw.integers(-64, 65, experts, width).to(torch.float64),
        **of_experts.lattice_routing(draw, parameters),
    }


def oai(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens, weights and biases, of unit variance where the limit is 7: few values are clamped."""
    tensors, experts = of_experts.dithered(draw, parameters), parameters["num_experts"]
    scale = parameters["limit"] / 7
    biases = {
        "b13": draw.normal(experts, parameters["two_intermediate_sizes"]) * scale,
        "b2": draw.normal(experts, parameters["hidden_size"]),
    }
    return tensors | biases | {"hidden_states": tensors["hidden_states"] * scale}


def clamped(draw: Draw, parameters: Parameters) -> Tensors:
    """Half of the gates and up values lie outside the limit, on either side; all lie a half of it away."""
    tensors, limit = oai(draw, parameters), parameters["limit"]
    outside = draw.integers(0, 4, *tensors["b13"].shape) - 1.5
    return tensors | {"b13": outside * limit, "hidden_states": tensors["hidden_states"] / 4}


def below_the_limit(draw: Draw, parameters: Parameters) -> Tensors:
    """Gates from -1.35 to -1.05 times the limit: clamped from below, they would return several times as much."""
    tensors, limit = oai(draw, parameters), parameters["limit"]
    b13 = tensors["b13"].clone()
    b13[:, 0::2] = -(1.1 + draw.uniform(*b13[:, 0::2].shape) / 5) * limit
    return tensors | {"b13": b13, "b2": 0 * tensors["b2"], "hidden_states": tensors["hidden_states"] / 16}


def at_the_limit(draw: Draw, parameters: Parameters) -> Tensors:
    """Integers: gates and up values of the limit and a little more or less, of either sign."""
    tensors, limit = oai(draw, parameters), parameters["limit"]
    experts, rows, width = tensors["w13"].shape
    signs = 1 - 2 * draw.integers(0, 2, experts, rows)
    return tensors | {
        "hidden_states": of_experts.lattice_tokens(draw, parameters),
        "w13": of_experts.sparse(draw, experts * rows, width, 2).view(experts, rows, width),
        "b13": signs * (limit - draw.integers(0, 3, experts, rows).to(torch.float64)),
    }
