"""Contract of which masked places are decided."""

import math
from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import unmasking


@row
def choose_places() -> Contract:
    """The row of `unmasking.choose_places`. Confidences are such that no sum of them is rounded: every choice is certain."""
    return Contract(
        name="unmasking.choose_places",
        summary="Chooses the masked places whose tokens are decided now, by how sure the model is of them.",
        formula=(
            "static: the counts masks of highest confidence; dynamic: all of confidence > bound if these are counts at least, "
            "else as static; sequential: the first counts masks; entropy_bounded: by ascending entropy, -confidence, as many as "
            "add up to less than bound, and one at least"
        ),
        source="ML-GSAI/LLaDA generate.py; JetLM/SDAR generate.py; Ben-Hamu et al. 2025 (arXiv:2505.24857)",
        reference=unmasking.choose_places,
        inputs=(
            Input("confidence", PER_PLACE),
            Input("is_masked", PER_PLACE, dtype="bool"),
            Input("counts", ("batch_size",), dtype="int64"),
        ),
        outputs=(Output("accepted", PER_PLACE, dtype="bool"),),
        options=("strategy", "bound"),
        batch="batch_size",
        landmarks=(
            sizes(7, 5, "entropy_bounded", 0.125),  # one at least, beside lanes that are masked
            sizes(5, 32, "static", 0.0),
            sizes(4, 32, "dynamic", 0.75),
            sizes(3, 8, "sequential", 0.0),
            sizes(17, 4, "dynamic", 0.85),  # SDAR
            sizes(3, 33, "entropy_bounded", 0.75),
            sizes(2, 130, "static", 0.0),
        ),
        factors=(
            edges("batch_size", 1, 2, 3, 17),
            kinds("places", kind_of_count, 1, 2, 8, 64, 5, 33, 300),
            either("strategy", "static", "dynamic", "sequential", "entropy_bounded"),
            either("bound", 0.0, 0.35, 0.75, 4.0),
        ),
        build=sizes,
        traits=(
            Trait("all", "is_masked", lambda tensors: {"is_masked": torch.ones_like(tensors["is_masked"])}),
            Trait("none", "is_masked", lambda tensors: {"is_masked": torch.zeros_like(tensors["is_masked"])}),
            Trait("more than are left", "counts", _more_than_are_left),
            Trait("0", "counts", lambda tensors: {"counts": torch.zeros_like(tensors["counts"])}),
        ),
        regimes=(
            Regime("dithered", dithered),
            Regime("ties", tied, "worst element"),
            Regime("special", special, "worst element"),
        ),
        flops=lambda parameters: float(parameters["batch_size"] * parameters["places"]),
        workloads=(
            Workload("sdar-8b/block-4", sizes(64, 4, "dynamic", 0.85), "JetLM/SDAR generate.py: blocks of 4"),
            Workload("llada-8b/block-128", sizes(64, 128, "static", 0.0), "ML-GSAI/LLaDA generate.py: blocks of 128"),
            Workload("two-cores/block-32", sizes(8, 32, "static", 0.0), "a size for a CPU"),
        ),
        cases=0.3,
        rejections=(
            Rejection("another strategy", "strategy", lambda call: {"strategy": "low_confidence_static"}),
            Rejection("a bound that is none", "bound", lambda call: {"bound": math.nan}),
            Rejection("counts of places", "counts", lambda call: {"counts": call["counts"][:, None]}),
        ),
        implementations=(triton(),),
    )


PER_PLACE = ("batch_size", "places")


def sizes(batch_size: int, places: int, strategy: str, bound: float) -> dict[str, Any]:
    """One point of the input space."""
    return {"batch_size": batch_size, "places": places, "strategy": strategy, "bound": bound}


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Probabilities of more digits than a narrow dtype has, and what is next to the bound; or entropies, which are eighths."""
    confidence = draw.integers(0, 2**16 + 1, *_shape(parameters)) * 2.0**-16
    near = _next_to_bound(parameters)[draw.integers(0, 2, *_shape(parameters))]
    return _with_masks(draw, parameters, torch.where(draw.uniform(*_shape(parameters)) < 0.4, near, confidence))


def tied(draw: Draw, parameters: Parameters) -> Tensors:
    """Few distinct confidences, the bounds among them."""
    return _with_masks(draw, parameters, draw.integers(0, 5, *_shape(parameters)) / 4.0)


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """Some confidences are NaN or -inf."""
    tensors = dithered(draw, parameters)
    for value in (math.nan, -math.inf):
        tensors["confidence"][draw.uniform(*_shape(parameters)) < 0.2] = value
    return tensors


def _next_to_bound(parameters: Parameters) -> torch.Tensor:
    """Below or at it, and above or at it, in bfloat16."""
    bound = 2**8 * parameters["bound"]
    return torch.tensor([math.floor(bound), math.ceil(bound)], dtype=torch.float64) * 2.0**-8


def _with_masks(draw: Draw, parameters: Parameters, confidence: torch.Tensor) -> Tensors:
    """With masks at most places, and counts of which some are more than there are masks."""
    entropies = (8 * confidence).floor() / 8  # of which sums meet the bounds
    signed = -entropies if parameters["strategy"] == "entropy_bounded" else confidence
    masked = draw.uniform(*confidence.shape) < 0.75
    counts = draw.integers(0, parameters["places"] // 2 + 2, parameters["batch_size"])
    return {"confidence": signed.to(torch.float64), "is_masked": masked, "counts": counts}


def _more_than_are_left(tensors: Tensors) -> Tensors:
    counts, left = tensors["counts"], tensors["is_masked"].sum(1)
    return {"counts": torch.where(counts > left, counts, counts + left + 1)}


def _shape(parameters: Parameters) -> tuple[int, int]:
    return parameters["batch_size"], parameters["places"]
