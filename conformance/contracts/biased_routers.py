"""Contracts of the routers that a bias balances, and of the one that asks no logits."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import grouped_routers as of_groups
from gaugeblock.conformance.contracts import routers as of_routers
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import routers


@row
def biased_softmax_topk() -> Contract:
    """The row of `routers.biased_softmax_topk`."""
    return Contract(
        name="routers.biased_softmax_topk",
        summary="Each token goes to top_k experts chosen by probability plus bias, weighted by probability alone.",
        formula="p = softmax(router_logits); ids = topk(p + bias); weights = p[ids] / max(sum(p[ids]), norm_min)",
        source="Ernie 4.5 (Ernie4_5_MoeTopKRouter of transformers)",
        reference=routers.biased_softmax_topk,
        inputs=(of_routers.LOGITS, of_groups.BIAS),
        outputs=of_routers.OUTPUTS,
        options=("top_k", "norm_min"),
        batch="num_tokens",
        landmarks=(
            biased_sizes(64, 60, 4, 1e-12),
            biased_sizes(17, 300, 8, 0.05),  # ids above 255; half of the sums are smaller
            biased_sizes(5, 3, 3, 1e-12),
            biased_sizes(33, 64, 6, 1e-12),  # Ernie 4.5 21B-A3B
        ),
        factors=(*of_routers.FACTORS, either("norm_min", 1e-12, 0.05)),
        build=biased_point,
        traits=TRAITS,
        regimes=REGIMES,
        flops=of_routers.flops,
        workloads=(
            Workload("ernie-4.5-21b/prefill-4096", biased_sizes(4096, 64, 6, 1e-12), "baidu/ERNIE-4.5-21B-A3B-PT config.json"),
            Workload("ernie-4.5-300b/prefill-4096", biased_sizes(4096, 64, 8, 1e-12), "baidu/ERNIE-4.5-300B-A47B-PT config.json"),
        ),
        selection=Selection("topk_ids", _biased_scores, "top_k"),
        relabel=of_routers.shuffled_experts,
        rejections=(*of_routers.SOFTMAX_REJECTIONS, Rejection("norm_min of 0", "norm_min", lambda call: {"norm_min": 0.0})),
        implementations=(triton(),),
    )


@row
def zero_expert_topk() -> Contract:
    """The row of `routers.zero_expert_topk`."""
    return Contract(
        name="routers.zero_expert_topk",
        summary="Each token goes to top_k experts, some of which give it back as it is.",
        formula=(
            "p = softmax(router_logits); ids = topk(p + bias); weights = p[ids] * routed_scaling_factor; identity_weights = sum "
            "of the weights whose ids are among the last num_zero_experts"
        ),
        source="LongCat-Flash Technical Report (arXiv:2509.01322) section 2.1; LongcatFlashTopkRouter of transformers",
        reference=routers.zero_expert_topk,
        inputs=(of_routers.LOGITS, of_groups.BIAS),
        outputs=(*of_routers.OUTPUTS, Output("identity_weights", ("num_tokens",), dtype="float32", differentiable=True)),
        options=("top_k", "num_zero_experts", "routed_scaling_factor"),
        batch="num_tokens",
        landmarks=(
            zero_sizes(64, 60, 4, 20, 6.0),
            zero_sizes(17, 300, 8, 1, 1.0),
            zero_sizes(5, 3, 3, 3, 6.0),  # identities alone
            zero_sizes(9, 8, 2, 0, 2.5),  # none
            zero_sizes(9, 768, 12, 256, 6.0),  # LongCat-Flash
        ),
        factors=(
            *of_routers.FACTORS,
            kinds("num_zero_experts", _kind_of_identities, 0, 1, 3, 256),
            either("routed_scaling_factor", 1.0, 6.0),
        ),
        build=zero_point,
        traits=TRAITS,
        regimes=REGIMES,
        flops=of_routers.flops,
        workloads=(
            Workload(
                "longcat-flash/prefill-4096",
                zero_sizes(4096, 768, 12, 256, 6.0),
                "meituan-longcat/LongCat-Flash-Chat config.json",
            ),
        ),
        selection=Selection("topk_ids", _biased_scores, "top_k"),
        relabel=shuffled_among_their_kind,
        rejections=(
            *of_routers.SOFTMAX_REJECTIONS,
            Rejection("a negative number of identities", "num_zero_experts", lambda call: {"num_zero_experts": -1}),
            Rejection("more identities than columns", "num_zero_experts", _too_many_identities),
        ),
        implementations=(triton(),),
    )


@row
def hash_router() -> Contract:
    """The row of `routers.hash_router`."""
    return Contract(
        name="routers.hash_router",
        summary="Each token goes to the expert that a table has for its word.",
        formula="id = table[token_id]; weight = 1",
        source="Hash Layers (arXiv:2106.04426) section 3",
        reference=routers.hash_router,
        inputs=(
            Input("token_ids", ("num_tokens",), dtype="int64", indexes="vocabulary_size"),
            Input("table", ("vocabulary_size",), dtype="int64"),
        ),
        outputs=(Output("weights", ("num_tokens",), dtype="float32"), Output("expert_ids", ("num_tokens",), dtype="int64")),
        options=(),
        batch="num_tokens",
        landmarks=(hash_sizes(33, 17), hash_sizes(64, 300), hash_sizes(17, 1)),
        factors=(of_routers.TOKENS, kinds("vocabulary_size", kind_of_count, 1, 2, 8, 13, 300)),
        build=hash_sizes,
        traits=HASH_TRAITS,
        regimes=(Regime("random", any_table), Regime("all experts alike", one_expert, "exact")),
        flops=lambda parameters: 0.0,
        workloads=(Workload("hash-layers/train-16384", hash_sizes(16384, 8008), "arXiv:2106.04426 section 4.1"),),
    )


HASH_TRAITS = (
    Trait("one word", "values of token_ids", lambda tensors: {"token_ids": 0 * tensors["token_ids"]}),
    Trait("int32", "dtype of token_ids", dtypes={"token_ids": "int32"}),
    # to torch a mask, if it is an index
    Trait("uint8", "dtype of token_ids", dtypes={"token_ids": "uint8"}, fits=lambda sizes: sizes["vocabulary_size"] <= 256),
    Trait("table in int32", "dtype of table", dtypes={"table": "int32"}),
)


def biased_sizes(num_tokens: int, num_experts: int, top_k: int, norm_min: float) -> dict[str, Any]:
    """One point of the input space of `biased_softmax_topk`."""
    return of_routers.sizes(num_tokens, num_experts, top_k) | {"norm_min": norm_min}


def biased_point(**values: Any) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return values if values["top_k"] <= values["num_experts"] else None


def zero_sizes(num_tokens: int, num_experts: int, top_k: int, num_zero_experts: int, factor: float) -> dict[str, Any]:
    """One point of the input space of `zero_expert_topk`."""
    zero = {"num_zero_experts": num_zero_experts, "routed_scaling_factor": factor}
    return of_routers.sizes(num_tokens, num_experts, top_k) | zero


def zero_point(**values: Any) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return values if max(values["top_k"], values["num_zero_experts"]) <= values["num_experts"] else None


def _kind_of_identities(value: int) -> str:
    return "none" if value == 0 else "some"


def _too_many_identities(call: dict[str, Any]) -> dict[str, Any]:
    return {"num_zero_experts": call["router_logits"].shape[1] + 1}


def shuffled_among_their_kind(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Any order of the experts, and of the identities behind them."""
    identities = parameters["num_zero_experts"]
    experts = parameters["num_experts"] - identities
    return torch.cat([draw.permutation(experts), experts + draw.permutation(identities)])


def in_turn(tensors: Tensors) -> Tensors:
    """Each expert has the highest score of some token: its bias is as small as the others'."""
    return of_groups.in_turn(tensors) | {"e_score_correction_bias": tensors["e_score_correction_bias"].fmod(2.0**-13)}


TRAITS = (Trait("each expert in turn", "router_logits", in_turn, fits=of_routers.each_expert), *of_routers.SOFTMAX_TRAITS[1:])


def biases(draw: Draw, experts: int) -> torch.Tensor:
    """As large as probabilities are."""
    return draw.normal(experts) / experts


def _centered(regime: Regime, noise: Any) -> Regime:
    return of_groups.with_bias(regime, lambda draw, experts: noise(draw, experts) + 0.5)


REGIMES = (
    *(_centered(regime, of_groups.few_biases if regime.name == "ties" else biases) for regime in of_routers.SOFTMAX_REGIMES),
    of_groups.with_bias(
        Regime("lattice", of_routers.lattice, "exact", differentiable=False), lambda draw, experts: torch.full((experts,), 0.25)
    ),
)


def _biased_scores(router_logits: torch.Tensor, e_score_correction_bias: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.softmax(router_logits, -1) + e_score_correction_bias


def hash_sizes(num_tokens: int, vocabulary_size: int) -> dict[str, Any]:
    """One point of the input space of `hash_router`."""
    return {"num_tokens": num_tokens, "vocabulary_size": vocabulary_size}


def any_table(draw: Draw, parameters: Parameters) -> Tensors:
    """Any of 300 experts for each word."""
    words = parameters["vocabulary_size"]
    return {"token_ids": draw.integers(0, words, parameters["num_tokens"]), "table": draw.integers(0, 300, words)}


def one_expert(draw: Draw, parameters: Parameters) -> Tensors:
    """The same expert for all words."""
    tensors = any_table(draw, parameters)
    return tensors | {"table": torch.full_like(tensors["table"], 7)}
