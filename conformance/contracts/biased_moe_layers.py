"""Contracts of the MoE layers whose experts have biases."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from gaugeblock.conformance.contracts import biased_experts as of_biased
from gaugeblock.conformance.contracts import noisy_routers as of_noisy
from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.contracts import routed_layers as of_layers
from gaugeblock.conformance.contracts.routed_layers import Entries, Make
from gaugeblock.conformance.engine.contract import Contract, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, either
from gaugeblock.conformance.engine.implementation import compiled, distributed, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference import moe_states
from gaugeblock.reference.torch import biased_moe_layers, noisy_routers


@row
def gpt_oss_moe() -> Contract:
    """The row of `biased_moe_layers.gpt_oss_moe`."""
    return Contract(
        name="biased_moe_layers.gpt_oss_moe",
        summary="Each token passes the clamped experts, with biases, that a linear router with a bias gives the highest logits.",
        formula=(
            "router_logits = hidden_states @ router.weight.T + router.bias; topk_weights, topk_ids = topk_softmax("
            "router_logits); hidden_states_out = fused_swiglu_oai(hidden_states, the experts' matrices transposed and their "
            "biases, topk_weights, topk_ids)"
        ),
        source="openai/gpt-oss, gpt_oss/torch/model.py: MLPBlock; names of parameters as in transformers' GptOssMLP",
        reference=biased_moe_layers.gpt_oss_moe,
        inputs=of_layers.inputs(moe_states.GPT_OSS),
        outputs=of_layers.OUTPUTS,
        options=("top_k", "alpha", "limit"),
        batch="num_tokens",
        landmarks=of_experts.dealt(
            (*of_layers.LANDMARKS, of_experts.sizes(17, 45, 45, 32, 4)),  # the last: gpt-oss-20b's proportions
            {"alpha": 1.702, "limit": 7.0},
            {"alpha": 1.702, "limit": 1.0},
            {"alpha": 1.0, "limit": 7.0},
        ),
        factors=(*of_experts.FACTORS, either("alpha", 1.702, 1.0), either("limit", 7.0, 1.0)),
        build=of_biased.oai_point,
        traits=(_gate_in_turn(), ROUTER_BIAS_OF_0),
        regimes=(
            Regime("dithered", of_layers.as_state(gpt_oss, GPT_OSS)),
            Regime("skew", of_layers.as_state(of_layers.skewed(_unbiased(gpt_oss)), GPT_OSS)),
            Regime("clamped", of_layers.as_state(clamped, GPT_OSS)),
            Regime(
                "ties", of_layers.as_state(of_layers.tied(_unbiased(gpt_oss)), GPT_OSS), "worst element", differentiable=False
            ),
            Regime("special", of_layers.as_state(of_experts.special(gpt_oss), GPT_OSS), "worst element", differentiable=False),
        ),
        cases=0.25,
        flops=of_layers.flops,
        moved=gpt_oss_moved,
        workloads=(
            *of_layers.workloads("gpt-oss-120b", (2880, 2880, 128, 4), GPT_OSS_120B, **USUAL),
            *of_layers.workloads("gpt-oss-20b", (2880, 2880, 32, 4), GPT_OSS_20B, **USUAL),
            Workload("two-cores/prefill-2048", of_biased.oai_sizes(2048, 512, 256, 32, 4), "a size for a CPU"),
        ),
        selection=Selection("topk_ids", gpt_oss_scores, "top_k"),
        relabel=of_experts.shuffled,
        shardings=of_layers.EXPERT_PARALLEL,
        rejections=(
            *of_layers.any_rejections(ROUTER, ("router.bias", GATE_UP, f"{GATE_UP}_bias", DOWN, f"{DOWN}_bias")),
            *_shorter(GATE_UP, f"{GATE_UP}_bias", DOWN, f"{DOWN}_bias"),
            Rejection("limit of 0", "limit", lambda call: {"limit": 0.0}),
        ),
        implementations=(
            triton(),
            compiled("torch-grouped"),
            distributed("expert-parallel", "moe_layers:gpt_oss_moe", **of_experts.ON_RANKS),
            distributed("jax-expert-parallel", "sharded_layers:gpt_oss_moe", framework="jax", world_sizes=(4,)),
        ),
    )


@row
def upcycled_gpt2_moe() -> Contract:
    """The row of `biased_moe_layers.upcycled_gpt2_moe`."""
    return Contract(
        name="biased_moe_layers.upcycled_gpt2_moe",
        summary="Each token passes the MLPs of GPT-2 that a noisy linear router chose; the layer tells its entropy and load.",
        formula=(
            "router_logits = hidden_states @ router.gate.weight.T; topk_weights, topk_ids, router_probs, entropy of "
            "ste_topk(router_logits, noise); hidden_states_out = fused_gelu_mlp(hidden_states, the experts' matrices transposed "
            "and their biases, topk_weights, topk_ids); load[e] = assignments of e / (num_tokens * top_k)"
        ),
        source="sumitdotml/moe-emergence moe_emergence/{moe,gpt2_moe}.py; sparse upcycling (arXiv:2212.05055) section 3",
        reference=biased_moe_layers.upcycled_gpt2_moe,
        formulas=(gpt2_by_sums,),
        inputs=(*of_layers.inputs(moe_states.UPCYCLED_GPT2), of_noisy.NOISE),
        outputs=(
            *of_layers.OUTPUTS,
            Output("router_probs", of_noisy.PER_EXPERT, dtype="float32", differentiable=True, whole=("num_experts",)),
            Output("entropy", ("num_tokens",), dtype="float32", differentiable=True),
            Output("load", ("num_experts",), dtype="float32", whole=("num_experts",)),
        ),
        options=("top_k", "noise_std", "training"),
        batch="num_tokens",
        landmarks=(
            *of_experts.dealt(of_layers.LANDMARKS, *NOISES),
            gpt2_sizes(17, 24, 96, 8, 1, 0.1, True),  # moe-emergence, moe-main, in GPT-2's proportions
            gpt2_sizes(17, 16, 64, 8, 1, 0.0, False),  # its evaluation
        ),
        factors=(*of_experts.FACTORS, either("noise_std", 0.0, 0.1, 1.0), either("training", False, True)),
        build=gpt2_point,
        traits=(of_layers.gate_in_turn("router.gate.weight"), of_noisy.IN_BFLOAT16),
        regimes=(
            Regime("dithered", _noisy(gpt2)),
            Regime("skew", _noisy(of_layers.skewed(gpt2))),
            Regime("ties", _noisy(of_layers.tied(gpt2), tied=True), "worst element", differentiable=False),
            Regime("special", _noisy(of_experts.special(gpt2)), "worst element", differentiable=False),
        ),
        cases=0.25,
        flops=gpt2_flops,
        moved=gpt2_moved,
        workloads=(
            Workload("moe-emergence/train-top1", gpt2_sizes(1024, 768, 3072, 8, 1, 0.1, True), f"{EMERGENCE} moe-main"),
            Workload("moe-emergence/train-top2", gpt2_sizes(1024, 768, 3072, 8, 2, 0.1, True), f"{EMERGENCE} top2"),
            Workload("two-cores/prefill-2048", gpt2_sizes(2048, 384, 768, 8, 2, 0.0, False), "a size for a CPU"),
        ),
        selection=Selection("topk_ids", gpt2_scores, "top_k"),
        relabel=of_experts.shuffled,
        shardings=of_layers.EXPERT_PARALLEL,
        rejections=(
            *of_layers.any_rejections("router.gate.weight", (FC, "experts.c_fc.bias", PROJ, "experts.c_proj.bias")),
            *_shorter("experts.c_fc.bias", PROJ, "experts.c_proj.bias"),
            Rejection("noise for more tokens", "noise", changed("noise", lambda each: torch.cat([each, each]))),
            Rejection("noise of fewer experts", "noise", changed("noise", lambda each: each[:, :-1])),
            Rejection("a negative deviation", "noise_std", lambda call: {"noise_std": -0.1}),
        ),
        implementations=(
            triton(),
            compiled("torch-grouped"),
            distributed("expert-parallel", "moe_layers:upcycled_gpt2_moe", **of_experts.ON_RANKS),
        ),
    )


GPT_OSS_120B, GPT_OSS_20B = "openai/gpt-oss-120b config.json", "openai/gpt-oss-20b config.json"
EMERGENCE = "openai-community/gpt2 config.json; sumitdotml/moe-emergence preset"
USUAL: dict[str, Any] = {"alpha": 1.702, "limit": 7.0}
ROUTER, GATE_UP, DOWN = "router.weight", "experts.gate_up_proj", "experts.down_proj"
FC, PROJ = "experts.c_fc.weight", "experts.c_proj.weight"
GPT_OSS: Entries = {
    ROUTER: lambda drawn: drawn["gate"],
    "router.bias": lambda drawn: drawn["router_bias"],
    GATE_UP: lambda drawn: drawn["w13"].mT,
    f"{GATE_UP}_bias": lambda drawn: drawn["b13"],
    DOWN: lambda drawn: drawn["w2"].mT,
    f"{DOWN}_bias": lambda drawn: drawn["b2"],
}
UPCYCLED_GPT2: Entries = {
    "router.gate.weight": lambda drawn: drawn["gate"],
    FC: lambda drawn: drawn["w1"].mT,
    "experts.c_fc.bias": lambda drawn: drawn["b1"],
    PROJ: lambda drawn: drawn["w2"].mT,
    "experts.c_proj.bias": lambda drawn: drawn["b2"],
}
NOISES = (
    {"noise_std": 0.1, "training": True},
    {"noise_std": 1.0, "training": False},
    {"noise_std": 1.0, "training": True},
)


def gpt2_sizes(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    noise_std: float,
    training: bool,
) -> dict[str, Any]:
    """One point of the input space of `upcycled_gpt2_moe`."""
    point = of_experts.sizes(num_tokens, hidden_size, intermediate_size, num_experts, top_k)
    return {**point, "noise_std": noise_std, "training": training}


def gpt2_point(*, noise_std: float, training: bool, **values: int) -> dict[str, Any] | None:
    """The point of `upcycled_gpt2_moe` with these values of the factors."""
    point = of_experts.point(**values)
    return None if point is None else {**point, "noise_std": noise_std, "training": training}


def gpt_oss_moved(parameters: Parameters, itemsize: int) -> float:
    """As of every layer, and the biases of the router and of the experts in use."""
    used = min(parameters["num_experts"], parameters["num_tokens"] * parameters["top_k"])
    of_expert = parameters["two_intermediate_sizes"] + parameters["hidden_size"]
    return of_layers.moved(parameters, itemsize) + itemsize * (parameters["num_experts"] + used * of_expert)


def gpt2_flops(parameters: Parameters) -> float:
    """Experts of two matrices, and the gate."""
    gate = 2.0 * parameters["num_tokens"] * parameters["num_experts"] * parameters["hidden_size"]
    return of_experts.flops(parameters, matrices=2) + gate


def gpt2_moved(parameters: Parameters, itemsize: int) -> float:
    """The experts in use with their biases, the gate and tokens; noise, logits, probabilities, entropy and load in float32."""
    tokens, experts, width = (parameters[name] for name in ("num_tokens", "num_experts", "hidden_size"))
    of_router = 4 * (3 * tokens * experts + tokens + experts - tokens * parameters["top_k"])  # whose weights stay inside
    return of_biased.mlp_moved(parameters, itemsize) + itemsize * experts * width + of_router


ROUTER_BIAS_OF_0 = Trait("0", "router.bias", lambda tensors: {"state/router.bias": 0 * tensors["state/router.bias"]})


def _gate_in_turn() -> Trait:
    """Each expert is the first choice of some token; the router's bias is too small to change that."""
    in_turn = of_layers.gate_in_turn(ROUTER)

    def change(tensors: Tensors) -> Mapping[str, torch.Tensor]:
        assert in_turn.change is not None
        return {**in_turn.change(tensors), "state/router.bias": tensors["state/router.bias"].sign() / 64}

    return replace(in_turn, change=change)


def _shorter(*names: str) -> tuple[Rejection, ...]:
    """Matrices [in, out] and biases that lack their last column."""
    return tuple(
        Rejection(f"{name} lacks a column", name, changed(f"state/{name}", lambda each: each[..., :-1])) for name in names
    )


def gpt_oss(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens, weights and biases, of which the limit clamps few; the router's bias is as large as its logits."""
    tensors, experts = of_layers.gated(of_experts.dithered)(draw, parameters), parameters["num_experts"]
    scale = parameters["limit"] / 7
    return {
        **tensors,
        "w13": scale * tensors["w13"],
        "b13": scale * draw.normal(experts, parameters["two_intermediate_sizes"]),
        "b2": draw.normal(experts, parameters["hidden_size"]),
        "router_bias": draw.normal(experts),
    }


def clamped(draw: Draw, parameters: Parameters) -> Tensors:
    """Half of the gates and up values lie outside the limit, on either side; all lie a half of it away."""
    tensors = gpt_oss(draw, parameters)
    outside = draw.integers(0, 4, *tensors["b13"].shape) - 1.5
    return {**tensors, "w13": tensors["w13"] / 4, "b13": outside * parameters["limit"]}


def _unbiased(make: Make) -> Make:
    """The gate alone decides."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors = make(draw, parameters)
        return {**tensors, "router_bias": 0 * tensors["router_bias"]}

    return made


def gpt2(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens, weights and biases of unit variance."""
    return of_layers.gated(of_biased.mlp)(draw, parameters)


def _noisy(make: Make, tied: bool = False) -> Make:
    """The layer's values, and noise: where logits tie, noisy ones tie as well."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors, shape = make_state(draw, parameters), (parameters["num_tokens"], parameters["num_experts"])
        return {**tensors, "noise": draw.integers(-1, 2, *shape).to(torch.float64) if tied else draw.normal(*shape)}

    make_state = of_layers.as_state(make, UPCYCLED_GPT2)
    return made


def gpt_oss_scores(hidden_states: torch.Tensor, state: Tensors, **_: Any) -> torch.Tensor:
    """What experts are chosen by."""
    return hidden_states @ state[ROUTER].mT + state["router.bias"]


def gpt2_scores(
    hidden_states: torch.Tensor, state: Tensors, noise: torch.Tensor, *, noise_std: float, training: bool, **_: Any
) -> torch.Tensor:
    """The same."""
    logits = hidden_states @ state["router.gate.weight"].mT
    return noisy_routers.noisy_probs(logits, noise, noise_std if training else 0.0)


def gpt2_by_sums(
    hidden_states: torch.Tensor, state: Tensors, noise: torch.Tensor, *, top_k: int, noise_std: float, training: bool
) -> tuple[torch.Tensor, ...]:
    """The layer with the GELU of libraries."""
    logits = hidden_states @ state["router.gate.weight"].mT
    options: dict[str, Any] = {"top_k": top_k, "noise_std": noise_std, "training": training}
    topk_weights, topk_ids, probs, _, _, entropy = noisy_routers.ste_topk(logits, noise, **options)
    up, down = (state[FC].mT, state["experts.c_fc.bias"]), (state[PROJ].mT, state["experts.c_proj.bias"])
    out = of_biased.mlp_by_sums(hidden_states, *up, *down, topk_weights, topk_ids, approximate="tanh")
    return out, logits, topk_ids, probs, entropy, biased_moe_layers.load_fractions(topk_ids, logits)
