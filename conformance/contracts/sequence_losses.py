"""Contracts of auxiliary losses that are taken for each sequence by itself."""

from collections.abc import Callable
from typing import Any

import torch

from gaugeblock.conformance.contracts import auxiliary_losses as of_losses
from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import auxiliary_losses


@row
def sequence_balance_loss() -> Contract:
    """The row of `auxiliary_losses.sequence_balance_loss`."""
    return Contract(
        name="auxiliary_losses.sequence_balance_loss",
        summary="How uneven the load of the experts is within a sequence: 1 where it is even in each.",
        formula=(
            "mean over sequences of sum over e of load[e] * probability[e], over the tokens of the mask; load[e] = num_experts / "
            "(top_k * tokens) * assignments of e; probability[e] = mean of s[e] / sum of s, s = scores(router_logits)"
        ),
        source="DeepSeek-V3 (arXiv:2412.19437) equations 17 to 20; with the softmax, feizc/DiT-MoE models.py",
        reference=auxiliary_losses.sequence_balance_loss,
        inputs=(
            Input("router_logits", (*TOKENS, "num_experts"), differentiable=True),
            Input("topk_ids", (*TOKENS, "top_k"), dtype="int64", indexes="num_experts"),
            Input("attention_mask", TOKENS, dtype="bool"),
        ),
        outputs=(Output("loss", (), dtype="float32", differentiable=True),),
        options=("scores",),
        batch="batch_size",
        landmarks=(
            sizes(3, 40, 5, 3, "sigmoid"),
            sizes(2, 33, 8, 2, "softmax"),  # DiT-MoE's experts
            sizes(2, 17, 300, 8, "sigmoid"),  # ids above 255
            sizes(2, 9, 256, 8, "sigmoid"),  # DeepSeek-V3
            sizes(600, 2, 3, 1, "softmax"),  # more sequences than there are programs
            sizes(5, 401, 1, 1, "softmax"),  # more tokens than bfloat16 can count, or a byte
        ),
        factors=FACTORS,
        build=point,
        traits=TRAITS,
        regimes=(
            Regime("dithered", of_each(of_losses.loss_dithered)),
            Regime("skew", of_each(of_losses.loss_skewed)),
            # where one probability is all but 1, formulas of its gradient that are equally good lose all their digits or none
            Regime("adversarial", extreme, "worst element", differentiable=False),
            Regime("special", of_each(of_losses.loss_special), "worst element"),
            Regime("lattice", lattice, "exact", differentiable=False),
        ),
        cases=0.5,
        flops=lambda parameters: parameters["batch_size"] * of_losses.flops(_one(parameters)),
        workloads=(
            Workload("deepseek-v3/train-4x4096", sizes(4, 4096, 256, 8, "sigmoid"), "deepseek-ai/DeepSeek-V3 config.json"),
            Workload("dit-moe-s/train-32x256", sizes(32, 256, 8, 2, "softmax"), "feizc/DiT-MoE models.py, DiT-S/2 of 256 x 256"),
        ),
        formulas=(_divided,),
        relabel=of_experts.shuffled,
        rejections=of_losses.BALANCE_REJECTIONS,
        without=of_losses.MEAN,
        implementations=(triton(),),
    )


TOKENS = ("batch_size", "sequence_length")


def sizes(batch_size: int, sequence_length: int, num_experts: int, top_k: int, scores: str) -> dict[str, Any]:
    """One point of the input space."""
    of_one = {"sequence_length": sequence_length, "num_experts": num_experts, "top_k": top_k, "scores": scores}
    return {"batch_size": batch_size, **of_one}


def point(batch_size: int, sequence_length: int, num_experts: int, top_k: int, scores: str) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return sizes(batch_size, sequence_length, num_experts, top_k, scores) if top_k <= num_experts else None


FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("sequence_length", 1, 2, 15, 16, 17, 33),
    kinds("num_experts", kind_of_count, 1, 2, 8, 32, 5, 13, 257),
    edges("top_k", 1, 2, 3, 4),
    either("scores", "sigmoid", "softmax"),
)


def _first_all_padding(tensors: Tensors) -> Tensors:
    mask = tensors["attention_mask"].clone()
    mask[:1] = False
    return {"attention_mask": mask}


def _in_turn(tensors: Tensors) -> Tensors:
    """Each expert is the first choice of some token of each sequence."""
    ids, experts = tensors["topk_ids"], tensors["router_logits"].shape[-1]
    return {"topk_ids": (torch.arange(ids.shape[1])[:, None] + torch.arange(ids.shape[2])).expand_as(ids) % experts}


TRAITS = (
    *of_losses.MASK_TRAITS,
    Trait("a sequence of padding", "attention_mask", _first_all_padding),
    of_experts.INT32,
    Trait(
        "each expert in turn", "values of topk_ids", _in_turn, fits=lambda sizes: sizes["sequence_length"] >= sizes["num_experts"]
    ),
)


def _one(parameters: Parameters) -> Parameters:
    """The sizes of one sequence, as those of a batch of tokens."""
    return {**parameters, "num_tokens": parameters["sequence_length"]}


def of_each(make: Callable[[Draw, Parameters], Tensors]) -> Callable[[Draw, Parameters], Tensors]:
    """Each sequence is a batch of tokens of its own."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        # an empty batch has the shapes of one sequence
        sequences = [make(draw, _one(parameters)) for _ in range(max(1, parameters["batch_size"]))]
        return {name: torch.stack([each[name] for each in sequences])[: parameters["batch_size"]] for name in sequences[0]}

    return made


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Exponentials overflow unless a maximum is subtracted; sigmoids are all but 1 or 0, and no sum of them underflows."""
    tensors = of_each(of_losses.loss_extreme)(draw, parameters)
    if parameters["scores"] == "softmax":
        return tensors
    logits = tensors["router_logits"]
    return tensors | {"router_logits": torch.where(logits < -60, -60 + 20 * draw.uniform(*logits.shape), logits)}


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """As for one batch of tokens; a power of two of sequences count."""
    tensors, batch = of_each(of_losses.loss_lattice)(draw, parameters), parameters["batch_size"]
    counts = draw.permutation(batch) < 2 ** (batch.bit_length() - 1)
    return tensors | {"attention_mask": tensors["attention_mask"] & counts[:, None]}


def _divided(router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor, *, scores: str) -> torch.Tensor:
    """The paper's own form: scores divided by their sum, each token's share added up."""
    logits = torch.where(attention_mask[..., None], router_logits, 0)
    s = torch.sigmoid(logits) if scores == "sigmoid" else torch.softmax(logits, -1)
    probs = torch.where(attention_mask[..., None], s / s.sum(-1, keepdim=True), 0)
    experts, top_k = router_logits.shape[2], topk_ids.shape[2]
    chosen = (topk_ids[..., None] == torch.arange(experts)).sum(2) * attention_mask[..., None]
    tokens = attention_mask.sum(1).clamp(min=1)[:, None]
    loads = experts * chosen.sum(1) / (top_k * tokens)
    losses = (loads * probs.sum(1) / tokens).sum(1)
    return losses.sum() / attention_mask.any(1).sum().clamp(min=1)
