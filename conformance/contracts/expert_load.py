"""Contracts of how many tokens the experts have, and of what a router's biases become of it."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import auxiliary_losses as of_losses
from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import auxiliary_losses


@row
def expert_load() -> Contract:
    """The row of `auxiliary_losses.expert_load`."""
    return Contract(
        name="auxiliary_losses.expert_load",
        summary="How often each expert is chosen.",
        formula="load[e] = number of (t, j) with attention_mask[t] and topk_ids[t, j] = e",
        source="DeepSeek-V3 (arXiv:2412.19437) section 2.1.2: the expert load of each step",
        reference=auxiliary_losses.expert_load,
        inputs=(of_losses.IDS, of_losses.MASK),
        outputs=(Output("load", ("num_experts",), dtype="int64"),),
        options=("num_experts",),
        batch="num_tokens",
        parameters=of_losses.loss_parameters,
        landmarks=(
            of_losses.loss_sizes(100, 5, 3),
            of_losses.loss_sizes(33, 8, 2),  # Mixtral
            of_losses.loss_sizes(17, 300, 8),  # ids above 255
            of_losses.loss_sizes(513, 513, 1),  # each of 512 programs goes on to a second tile of a token
            of_losses.loss_sizes(1100, 3, 1),  # more than bfloat16 can count, or a byte
            of_losses.loss_sizes(17, 128, 8),  # Qwen3
        ),
        factors=of_losses.LOSS_FACTORS,
        build=of_losses.loss_point,
        traits=(*of_losses.MASK_TRAITS, of_experts.INT32, of_experts.UINT8),
        regimes=(Regime("dithered", chosen), Regime("skew", at_the_ends), Regime("repeated ids", repeated)),
        dtypes=("float32",),
        cases=0.5,
        flops=lambda parameters: float(parameters["num_tokens"] * parameters["top_k"]),
        workloads=of_losses.LOSS_WORKLOADS,
        relabel=of_experts.shuffled,
        rejections=(
            Rejection("no ids", "topk_ids", changed("topk_ids", lambda each: each[:, :0])),
            Rejection("no experts", "num_experts", lambda call: {"num_experts": 0}),
        ),
        without={"batch_invariance": "a count is of all of its batch", "nan_containment": "ids are no floating numbers"},
        implementations=(triton("expert_load:expert_load", dtypes=("float32",)),),
    )


@row
def correction_bias_update() -> Contract:
    """The row of `auxiliary_losses.correction_bias_update`."""
    return Contract(
        name="auxiliary_losses.correction_bias_update",
        summary="Experts of more than the mean load are chosen less from now on, those of less are chosen more.",
        formula="bias[e] + update_rate * sign(mean of tokens_per_expert - tokens_per_expert[e])",
        source="Wang et al. 2024 (arXiv:2408.15664) algorithm 1; DeepSeek-V3 (arXiv:2412.19437) section 2.1.2",
        reference=auxiliary_losses.correction_bias_update,
        inputs=(
            Input("e_score_correction_bias", ("num_experts",), dtype="float32"),
            Input("tokens_per_expert", ("num_experts",), dtype="int64"),
        ),
        outputs=(Output("bias", ("num_experts",), dtype="float32"),),
        options=("update_rate",),
        batch="num_experts",
        landmarks=(
            bias_sizes(60, 1e-3),  # Qwen1.5-MoE's 60 experts: no power of two
            bias_sizes(256, 1e-3),  # DeepSeek-V3
            bias_sizes(8, 0.0),
            bias_sizes(1, 1e-3),
        ),
        factors=(
            kinds("num_experts", kind_of_count, 1, 2, 8, 32, 5, 13, 257),
            Factor("update_rate", lambda rate: "positive" if rate else "0", values=(1e-3, 0.0, 0.5), option=True),
        ),
        build=bias_sizes,
        traits=(Trait("int32", "dtype of tokens_per_expert", dtypes={"tokens_per_expert": "int32"}),),
        regimes=(Regime("dithered", loads), Regime("ties", balanced), Regime("large", counted_by_millions)),
        dtypes=("float32",),
        cases=0.5,
        flops=lambda parameters: 3.0 * parameters["num_experts"],
        workloads=(
            Workload("deepseek-v3/layer", bias_sizes(256, 1e-3), "deepseek-ai/DeepSeek-V3 config.json; arXiv:2412.19437, 4.2"),
        ),
        rejections=(
            Rejection("a negative rate", "update_rate", lambda call: {"update_rate": -1e-3}),
            Rejection(
                "no experts",
                "e_score_correction_bias",
                lambda call: {name: call[name][:0] for name in ("e_score_correction_bias", "tokens_per_expert")},
            ),
            Rejection("biases of bfloat16", "e_score_correction_bias", changed("e_score_correction_bias", torch.Tensor.bfloat16)),
        ),
        without={
            "batch_invariance": "a mean depends on all experts",
            "empty_and_one": "no experts are no router: they are rejected; one is a landmark",
        },
    )


def _masked(draw: Draw, ids: torch.Tensor) -> Tensors:
    """A quarter of the tokens are padding."""
    return {"topk_ids": ids, "attention_mask": draw.uniform(len(ids)) < 0.75}


def chosen(draw: Draw, parameters: Parameters) -> Tensors:
    """Distinct experts for each token."""
    return _masked(draw, draw.distinct_rows(parameters["num_tokens"], parameters["top_k"], parameters["num_experts"]))


def at_the_ends(draw: Draw, parameters: Parameters) -> Tensors:
    """All tokens choose the first experts, or all choose the last ones."""
    experts, top_k = parameters["num_experts"], parameters["top_k"]
    first = (experts - top_k) * draw.integers(0, 2, 1)
    return _masked(draw, (first + draw.permutation(top_k)).repeat(parameters["num_tokens"], 1))


def repeated(draw: Draw, parameters: Parameters) -> Tensors:
    """Any ids, often twice in a row."""
    return _masked(draw, draw.integers(0, min(3, parameters["num_experts"]), parameters["num_tokens"], parameters["top_k"]))


def bias_sizes(num_experts: int, update_rate: float) -> dict[str, Any]:
    """One point of the input space."""
    return {"num_experts": num_experts, "update_rate": update_rate}


def _biases(draw: Draw, tokens_per_expert: torch.Tensor) -> Tensors:
    return {"e_score_correction_bias": 0.1 * draw.normal(*tokens_per_expert.shape), "tokens_per_expert": tokens_per_expert}


def loads(draw: Draw, parameters: Parameters) -> Tensors:
    """Any loads; some experts have none."""
    experts = parameters["num_experts"]
    return _biases(draw, draw.integers(0, 100, experts) * (draw.uniform(experts) < 0.8))


def balanced(draw: Draw, parameters: Parameters) -> Tensors:
    """Most experts have the same load; the mean is that load, or up to one more, or up to one less."""
    experts = parameters["num_experts"]
    steps = draw.integers(-1, 2, 1) * (draw.uniform(experts) < 0.3)
    pair = draw.permutation(experts) < 2
    return _biases(draw, 7 + (steps if draw.uniform(1).item() < 0.7 else pair * (1 - 2 * (pair.cumsum(0) % 2))))


def counted_by_millions(draw: Draw, parameters: Parameters) -> Tensors:
    """Loads differ by one where float32 cannot tell them apart; all together are below 2^31."""
    experts = parameters["num_experts"]
    return _biases(draw, 2**30 // experts + draw.integers(-1, 2, experts))
