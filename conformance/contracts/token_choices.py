"""Contracts of what chooses tokens by a language model's logits."""

import math
from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import compiled, triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import token_choices


@row
def filter_logits() -> Contract:
    """The row of `token_choices.filter_logits`."""
    return Contract(
        name="token_choices.filter_logits",
        summary="Logits are divided by the temperature, and all tokens but the most probable ones dropped.",
        formula=(
            "z = logits / temperature; p = softmax(z), of the top_k alone if top_k_first; kept = logits >= the top_k-th highest "
            "and sum(p of those before, by logits, then ids) <= top_p; out = z where kept, else -inf"
        ),
        source="Holtzman et al. 2020 (arXiv:1904.09751) section 3.1; JetLM/SDAR generate.py; Dream generation_utils.py",
        reference=token_choices.filter_logits,
        inputs=(LOGITS,),
        outputs=(Output("filtered", PER_TOKEN, dtype="float32"), Output("kept", PER_TOKEN, dtype="bool")),
        options=("temperature", "top_k", "top_p", "top_k_first"),
        batch="num_rows",
        landmarks=(
            filter_sizes(5, 40, 0.7, 20, 0.9, True),
            filter_sizes(5, 40, 0.7, 20, 0.9, False),
            filter_sizes(3, 300, 1.0, 50, 1.0, True),  # ids above 255
            filter_sizes(4, 33, 2.0, 0, 0.5, False),
            filter_sizes(2, 7, 1.0, 7, 1.0, True),  # all of them
            filter_sizes(3, 5, 1.0, 1, 0.125, False),  # greedy
            filter_sizes(9, 40, 2.0, 3, 0.5, True),  # of few distinct logits, more than these equal the last
        ),
        factors=(
            ROWS,
            VOCABULARY,
            either("temperature", 0.5, 0.7, 1.0, 2.0),
            edges("top_k", 0, 1, 2, 5, 50, option=True),
            either("top_p", 0.125, 0.5, 0.9, 1.0),
            either("top_k_first", False, True),
        ),
        build=filter_point,
        regimes=(
            Regime("dithered", dithered),
            Regime("ties", tied, "worst element"),
            Regime("adversarial", extreme, "worst element"),
            Regime("special", special, "worst element"),
        ),
        flops=lambda parameters: 5.0 * elements(parameters),
        workloads=tuple(Workload(name, filter_sizes(*sizes, 1.0, 50, 0.95, True), where) for name, sizes, where in PUBLISHED),
        selection=Selection("kept", _room_in_top_p, None, above=0.0),
        cases=0.2,
        rejections=(
            NO_TOKENS,
            Rejection("no temperature", "temperature", lambda call: {"temperature": 0.0}),
            Rejection("more than there are", "top_k", lambda call: {"top_k": call["logits"].shape[1] + 1}),
            Rejection("no probability", "top_p", lambda call: {"top_p": 0.0}),
            Rejection("more than all", "top_p", lambda call: {"top_p": 1.5}),
            Rejection("a number for top_k_first", "top_k_first", lambda call: {"top_k_first": 1}),
        ),
        implementations=(compiled("torch-library"),),
    )


@row
def draw_tokens() -> Contract:
    """The row of `token_choices.draw_tokens`."""
    return Contract(
        name="token_choices.draw_tokens",
        summary="Draws a token of each row by given uniform numbers, and says how sure the model is, without the draw.",
        formula=(
            "id = argmax(logits / temperature - ln(-ln(uniforms))), or argmax(logits) at temperature 0; p = softmax(logits); "
            "confidence = p[id], or the highest p less the second, or sum(p * ln(p))"
        ),
        source="Maddison et al. 2014 (arXiv:1411.0030) section 2; ML-GSAI/LLaDA generate.py; Dream generation_utils.py",
        reference=token_choices.draw_tokens,
        inputs=(LOGITS, Input("uniforms", PER_TOKEN, dtype="float32")),
        outputs=(
            Output("token_ids", ("num_rows",), dtype="int64", indexes="vocabulary_size"),
            Output("confidences", ("num_rows",), dtype="float32"),
        ),
        options=("temperature", "confidence"),
        batch="num_rows",
        landmarks=(
            draw_sizes(5, 40, 0.7, "probability"),
            draw_sizes(4, 300, 0.0, "probability"),  # ids above 255
            draw_sizes(3, 33, 1.0, "margin"),
            draw_sizes(3, 8200, 2.0, "negative_entropy"),  # more than a tile, and not 2, 4, 8, ... of them
            draw_sizes(3, 8200, 1.0, "margin"),
            draw_sizes(3, 4130, 0.5, "probability"),
            draw_sizes(2, 2, 0.0, "margin"),
            draw_sizes(3, 17, 0.0, "negative_entropy"),
        ),
        factors=(
            ROWS,
            VOCABULARY,
            either("temperature", 0.0, 0.7, 1.0, 2.0),
            either("confidence", "probability", "margin", "negative_entropy"),
        ),
        build=draw_point,
        traits=(
            Trait("all low", "uniforms", _low),
            Trait("near 1", "uniforms", _near_1),
        ),
        regimes=(
            Regime("dithered", with_uniforms(dithered)),
            Regime("ties", with_uniforms(tied), "worst element"),
            Regime("adversarial", with_uniforms(extreme), "worst element"),
            Regime("special", with_uniforms(special), "worst element"),
        ),
        flops=lambda parameters: 8.0 * elements(parameters),
        workloads=tuple(Workload(name, draw_sizes(*sizes, 1.0, "probability"), where) for name, sizes, where in PUBLISHED),
        selection=Selection("token_ids", _noisy_scores, 1),
        cases=0.3,
        rejections=(
            NO_TOKENS,
            Rejection("a negative temperature", "temperature", lambda call: {"temperature": -1.0}),
            Rejection("another confidence", "confidence", lambda call: {"confidence": "entropy"}),
            Rejection("a draw of 1", "uniforms", lambda call: {"uniforms": torch.ones_like(call["uniforms"])}, by_values=True),
            Rejection(
                "a margin of one token",
                "logits",
                lambda call: {"logits": call["logits"][:, :1], "uniforms": call["uniforms"][:, :1], "confidence": "margin"},
            ),
        ),
        implementations=(triton(),),
    )


PER_TOKEN = ("num_rows", "vocabulary_size")
LOGITS = Input("logits", PER_TOKEN)
ROWS = edges("num_rows", 1, 2, 3, 17)
VOCABULARY = kinds("vocabulary_size", kind_of_count, 1, 2, 8, 64, 5, 33, 300)
PUBLISHED = (
    ("sdar-8b/block-4", (4, 151936), "JetLM/SDAR-8B-Chat config.json, blocks of 4"),
    ("sdar-8b/block-32", (32, 151936), "JetLM/SDAR-8B-Chat config.json, blocks of 32"),
    ("llada-8b/block-32", (32, 126464), "GSAI-ML/LLaDA-8B-Instruct config.json, blocks of 32"),
    ("two-cores/block-4", (4, 8192), "a size for a CPU"),
)


def filter_sizes(
    num_rows: int, vocabulary_size: int, temperature: float, top_k: int, top_p: float, top_k_first: bool
) -> dict[str, Any]:
    """One point of the input space of `filter_logits`."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "top_k_first": top_k_first}
    return {"num_rows": num_rows, "vocabulary_size": vocabulary_size} | options


def filter_point(
    num_rows: int, vocabulary_size: int, temperature: float, top_k: int, top_p: float, top_k_first: bool
) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    sizes = filter_sizes(num_rows, vocabulary_size, temperature, top_k, top_p, top_k_first)
    return sizes if top_k <= vocabulary_size else None


def draw_sizes(num_rows: int, vocabulary_size: int, temperature: float, confidence: str) -> dict[str, Any]:
    """One point of the input space of `draw_tokens`."""
    options = {"temperature": temperature, "confidence": confidence}
    return {"num_rows": num_rows, "vocabulary_size": vocabulary_size} | options


def draw_point(num_rows: int, vocabulary_size: int, temperature: float, confidence: str) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    if confidence == "margin" and vocabulary_size < 2:
        return None
    return draw_sizes(num_rows, vocabulary_size, temperature, confidence)


def elements(parameters: Parameters) -> float:
    """Of the logits."""
    return float(parameters["num_rows"] * parameters["vocabulary_size"])


def _shape(parameters: Parameters) -> tuple[int, int]:
    return parameters["num_rows"], parameters["vocabulary_size"]


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random logits; each row has its own scale, from flat to peaked, and of every third all are negative."""
    rows, tokens = _shape(parameters)
    logits = draw.normal(rows, tokens) * 4 * draw.uniform(rows, 1)
    logits[2::3] -= 40
    return {"logits": logits}


def tied(draw: Draw, parameters: Parameters) -> Tensors:
    """Few distinct logits, so that many are equal."""
    return {"logits": draw.integers(-4, 5, *_shape(parameters)) * 0.25}


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Logits with a common offset: exponentials overflow unless the maximum is subtracted; most probabilities are 0."""
    rows, tokens = _shape(parameters)
    offset = torch.tensor([0.0, 1e4, -1e4, 200.0], dtype=torch.float64)[draw.integers(0, 4, rows, 1)]
    return {"logits": offset + 30 * draw.normal(rows, tokens)}


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """Some rows hold NaN, some tokens are forbidden; the other rows are ordinary."""
    rows, tokens = _shape(parameters)
    logits = draw.normal(rows, tokens)
    logits[draw.uniform(rows, tokens) < 0.2] = -math.inf
    logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)  # no row without a token
    logits[1::3, -1] = math.nan
    return {"logits": logits}


def with_uniforms(make: Any) -> Any:
    """The same logits, and draws as `random.uniform` makes them: multiples of 2^-24 below 1, 0 among them."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        uniforms = draw.integers(0, 2**24, *_shape(parameters)) * 2.0**-24
        uniforms[draw.uniform(*uniforms.shape) < 0.01] = 0.0
        return make(draw, parameters) | {"uniforms": uniforms.to(torch.float64)}

    return made


def _low(tensors: Tensors) -> Tensors:
    uniforms = tensors["uniforms"]
    return {"uniforms": torch.where(uniforms < 2.0**-10, uniforms, uniforms * 2.0**-10)}


def _near_1(tensors: Tensors) -> Tensors:
    left = 1 - tensors["uniforms"]  # of 24 digits, as `random.uniform` has them
    return {"uniforms": 1 - torch.where(left <= 2.0**-8, left, (left * 2.0**16).ceil() * 2.0**-24)}


def _room_in_top_p(logits: torch.Tensor, *, top_p: float, **options: Any) -> torch.Tensor:
    """How much of top_p is left when it is a token's turn."""
    return top_p - token_choices.probability_before(logits, top_p=top_p, **options)


def _noisy_scores(logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, **_: Any) -> torch.Tensor:
    return logits / temperature + token_choices.gumbel(uniforms) if temperature > 0 else logits


NO_TOKENS = Rejection(
    "no tokens",
    "logits",
    lambda call: {name: each[:, :0] for name, each in call.items() if getattr(each, "ndim", 0) == 2},
)
