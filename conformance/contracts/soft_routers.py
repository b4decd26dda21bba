"""Contracts of the routers that balance by softmaxes over tokens."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import routers as of_routers
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import soft_routers


@row
def soft_moe() -> Contract:
    """The row of `soft_routers.soft_moe`."""
    return Contract(
        name="soft_routers.soft_moe",
        summary="Each slot of an expert is a mean of all tokens of a sequence, and each token's output a mean of all slots'.",
        formula="dispatch_weights = softmax of router_logits over tokens; combine_weights = softmax of router_logits over slots",
        source="From Sparse to Soft Mixtures of Experts (arXiv:2308.00951) section 2.1, equations 1 to 3",
        reference=soft_routers.soft_moe,
        inputs=(Input("router_logits", PER_SLOT, differentiable=True),),
        outputs=tuple(
            Output(name, PER_SLOT, dtype="float32", differentiable=True) for name in ("dispatch_weights", "combine_weights")
        ),
        options=(),
        batch="batch_size",
        landmarks=(
            soft_sizes(3, 33, 24),
            soft_sizes(2, 70, 5),  # tokens of several tiles
            soft_sizes(2, 5, 300),  # slots of several tiles
            soft_sizes(5, 1, 3),
            soft_sizes(4, 9, 1),
            soft_sizes(1, 64, 64),
        ),
        factors=(
            edges("batch_size", 1, 2, 3),
            edges("num_tokens", 1, 2, 15, 16, 17, 33, 65),
            kinds("num_slots", kind_of_count, 1, 2, 8, 32, 5, 13, 257),
        ),
        build=soft_sizes,
        traits=(
            Trait("negative", "router_logits", of_routers.negative),
            Trait("about 128", "router_logits", _about_128),
        ),
        regimes=(
            Regime("dithered", soft_dithered),
            Regime("ties", soft_tied, "worst element", differentiable=False),
            Regime("adversarial", soft_extreme, "worst element", differentiable=False),
            Regime("special", soft_special, "worst element", differentiable=False),
        ),
        cases=0.5,
        flops=lambda sizes: 20.0 * sizes["batch_size"] * sizes["num_tokens"] * sizes["num_slots"],
        workloads=(
            Workload("soft-moe-h14/train-16", soft_sizes(16, 256, 256), "arXiv:2308.00951: Soft MoE Huge/14, 128 experts"),
            Workload("soft-moe-b16/train-64", soft_sizes(64, 196, 256), "arXiv:2308.00951: Soft MoE Base/16, 128 experts"),
        ),
        formulas=(_soft_of_exponentials,),
        rejections=(
            Rejection("no tokens", "router_logits", lambda call: {"router_logits": call["router_logits"][:, :0]}),
            Rejection("no slots", "router_logits", lambda call: {"router_logits": call["router_logits"][:, :, :0]}),
        ),
        implementations=(triton(),),
    )


@row
def sinkhorn() -> Contract:
    """The row of `soft_routers.sinkhorn`."""
    return Contract(
        name="soft_routers.sinkhorn",
        summary="Each token goes to the top_k experts of its largest shares, after those of all experts have been made even.",
        formula=(
            "balanced = exp(router_logits), num_iterations times divided by the sums of its rows, then of its columns; "
            "ids = topk(balanced); weights = score_function(router_logits)[ids]"
        ),
        source="S-BASE (arXiv:2202.01169); Megatron-LM megatron/core/transformer/moe/moe_utils.py, without its 1e-8",
        reference=soft_routers.sinkhorn,
        inputs=(of_routers.LOGITS,),
        outputs=of_routers.OUTPUTS,
        options=("top_k", "num_iterations", "score_function"),
        batch="num_tokens",
        landmarks=(
            sinkhorn_sizes(64, 60, 4, 3, "softmax"),
            sinkhorn_sizes(33, 5, 1, 8, "sigmoid"),
            sinkhorn_sizes(17, 300, 8, 1, "softmax"),  # ids above 255
            sinkhorn_sizes(5, 3, 3, 0, "sigmoid"),  # every expert chosen
            sinkhorn_sizes(33, 8, 1, 3, "sigmoid"),  # Megatron-LM, one expert
            sinkhorn_sizes(33, 8, 2, 3, "softmax"),  # and two
            sinkhorn_sizes(9, 4, 2, 50, "softmax"),  # as many iterations as it takes to make shares even
        ),
        factors=(
            of_routers.TOKENS,
            kinds("num_experts", kind_of_count, 1, 2, 8, 32, 5, 13, 257),
            of_routers.CHOSEN,
            Factor("num_iterations", str, values=(0, 1, 3), option=True),
            either("score_function", "sigmoid", "softmax"),
        ),
        build=sinkhorn_point,
        traits=(Trait("negative", "router_logits", of_routers.negative), of_routers.SOFTMAX_TRAITS[2]),
        regimes=(
            Regime("dithered", of_routers.dithered),
            Regime("skew", skewed),
            *of_routers.SOFTMAX_REGIMES[1:3],
        ),
        flops=lambda sizes: (2 * sizes["num_iterations"] + 1) * of_routers.flops(sizes),
        workloads=(
            Workload("s-base/train-4096", sinkhorn_sizes(4096, 64, 1, 8, "sigmoid"), "arXiv:2202.01169: S-BASE, 64 experts"),
            Workload(
                "megatron-8/train-4096",
                sinkhorn_sizes(4096, 8, 2, 8, "softmax"),
                "NVIDIA/Megatron-LM sinkhorn routing, 8 experts",
            ),
        ),
        selection=Selection("topk_ids", _balanced_scores, "top_k"),
        relabel=of_routers.shuffled_experts,
        rejections=(
            *of_routers.SOFTMAX_REJECTIONS,
            Rejection("a negative number of iterations", "num_iterations", lambda call: {"num_iterations": -1}),
        ),
        without={
            "batch_invariance": "an expert's sum is over all tokens",
            "nan_containment": "a token of NaN makes all sums NaN",
        },
        implementations=(triton(),),
    )


PER_SLOT = ("batch_size", "num_tokens", "num_slots")


def soft_sizes(batch_size: int, num_tokens: int, num_slots: int) -> dict[str, Any]:
    """One point of the input space."""
    return {"batch_size": batch_size, "num_tokens": num_tokens, "num_slots": num_slots}


def sinkhorn_sizes(num_tokens: int, num_experts: int, top_k: int, num_iterations: int, score_function: str) -> dict[str, Any]:
    """One point of the input space."""
    sizes = {"num_tokens": num_tokens, "num_experts": num_experts, "top_k": top_k}
    return sizes | {"num_iterations": num_iterations, "score_function": score_function}


def sinkhorn_point(num_experts: int, top_k: int, **others: Any) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return {"num_experts": num_experts, "top_k": top_k, **others} if top_k <= num_experts else None


def _shape(parameters: Parameters) -> tuple[int, int, int]:
    return parameters["batch_size"], parameters["num_tokens"], parameters["num_slots"]


def _about_128(tensors: Tensors) -> Tensors:
    """Exponentials overflow unless maxima are subtracted."""
    logits = tensors["router_logits"]
    return {"router_logits": torch.where(logits < 64, logits + 128, logits)}


def soft_dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random logits; each sequence has its own scale."""
    return {"router_logits": draw.normal(*_shape(parameters)) * 3 * draw.uniform(parameters["batch_size"], 1, 1)}


def soft_tied(draw: Draw, parameters: Parameters) -> Tensors:
    """Few distinct logits."""
    return {"router_logits": draw.integers(-1, 2, *_shape(parameters)).to(torch.float64)}


def soft_extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Logits near ±10^4 with an offset common to a sequence; for some slots the last token's is by far the highest."""
    batch_size, _, num_slots = _shape(parameters)
    offset = torch.tensor([0.0, 1e4, -1e4, 200.0], dtype=torch.float64)[draw.integers(0, 4, batch_size, 1, 1)]
    logits = offset + 30 * draw.normal(*_shape(parameters))
    logits[:, -1:] += 300 * draw.integers(0, 2, batch_size, 1, num_slots)
    return {"router_logits": logits}


def soft_special(draw: Draw, parameters: Parameters) -> Tensors:
    """Some logits are -inf, but none of the first token and slot; of every third sequence one is NaN."""
    logits = draw.normal(*_shape(parameters))
    logits[draw.uniform(*_shape(parameters)) < 0.1] = -torch.inf
    logits[:, 0], logits[:, :, 0] = logits[:, 0].nan_to_num(neginf=0.0), logits[:, :, 0].nan_to_num(neginf=0.0)
    logits[1::3, -1, -1] = torch.nan
    return {"router_logits": logits}


def _soft_of_exponentials(router_logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As kernels have it: what is wrong with a sum of exponentials is wrong with all weights that are divided by it."""

    def softmax(dim: int) -> torch.Tensor:
        exponentials = torch.exp(router_logits - router_logits.amax(dim, keepdim=True))
        return exponentials / exponentials.sum(dim, keepdim=True)

    return softmax(1), softmax(2)


def skewed(draw: Draw, parameters: Parameters) -> Tensors:
    """All tokens like some experts, which balancing takes away again."""
    tokens, experts = of_routers.logits_shape(parameters)
    return {"router_logits": 2 * draw.normal(tokens, experts) + 3 * draw.normal(1, experts)}


def _balanced_scores(router_logits: torch.Tensor, *, num_iterations: int, **_: Any) -> torch.Tensor:
    """The reference's, of exponentials and their sums: that a logarithm of a sum is near 0 makes its error no smaller."""

    def logsumexp(x: torch.Tensor, dim: int) -> torch.Tensor:
        highest = x.amax(dim, keepdim=True)
        return highest + torch.log(torch.exp(x - highest).sum(dim, keepdim=True))

    balanced = router_logits
    for _iteration in range(num_iterations if len(router_logits) else 0):
        balanced = router_logits - logsumexp(router_logits - logsumexp(balanced, 1), 0)
    return balanced
