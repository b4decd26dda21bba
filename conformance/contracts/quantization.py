"""Contracts of quantization to eight bits."""

from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Contract, Derived, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, kind_of_width, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import E4M3_MAX
from gaugeblock.reference.torch import quantization
from gaugeblock.reference.torch.precision import at_least_float32


@row
def quantize_token_groups() -> Contract:
    """The row of `quantization.quantize_token_groups`."""
    return Contract(
        name="quantization.quantize_token_groups",
        summary="Each token is quantized to e4m3 in groups of columns, the largest element of a group to 448.",
        formula=(
            "scales[t, c] = max of abs(hidden_states[t, h]) / 448 over group c; quantized[t, h] = e4m3(hidden_states[t, h] / "
            "scales[t, c]), or 0 where the scale is 0"
        ),
        source="DeepSeek-V3 Technical Report (arXiv:2412.19437) section 3.3.2; act_quant of its inference code",
        reference=quantization.quantize_token_groups,
        inputs=(Input("hidden_states", ("num_tokens", "hidden_size")),),
        outputs=(
            Output("quantized", ("num_tokens", "hidden_size"), dtype="float8_e4m3fn"),
            Output("scales", ("num_tokens", Derived("num_groups", num_groups)), dtype="float32"),
        ),
        options=("group_size",),
        batch="num_tokens",
        landmarks=(
            sizes(17, 100, 32),  # a last group of 4 columns
            sizes(16, 256, 128),  # DeepSeek-V3's groups
            sizes(33, 64, 64),  # one group
            sizes(5, 40, 100),  # less than one
            sizes(3, 1000, 128),
            sizes(9, 30, 1),  # each element is its own largest one
            sizes(3, 1100, 1100),  # a scale for each token, which is wider than a tile
        ),
        factors=(
            edges("num_tokens", 1, 2, 15, 16, 17, 33),
            kinds("hidden_size", kind_of_width, 1, 16, 31, 24, 100, 256),
            edges("group_size", 1, 2, 16, 17, 32, 64, 128, 129, option=True),
            Factor("the last group", str, of=_last_group),
        ),
        build=point,
        traits=(
            Trait("a token of 0", "hidden_states", lambda tensors: _some(tensors, slice(None, None, 3), slice(None))),
            Trait("the first column 0", "hidden_states", lambda tensors: _some(tensors, slice(None), slice(0, 1))),
            Trait("negative", "hidden_states", lambda tensors: {"hidden_states": -tensors["hidden_states"].abs()}),
        ),
        regimes=(
            Regime("dithered", dithered),
            Regime("outliers", outliers),
            # where a least scale, or something that is added to it, shows
            Regime("constant-probing", vanishing, "worst element"),
            Regime("special", special, "worst element"),
            Regime("lattice", lattice, "exact"),
        ),
        flops=lambda parameters: 3.0 * parameters["num_tokens"] * parameters["hidden_size"],
        workloads=(
            Workload("deepseek-v3/prefill-4096", sizes(4096, 7168, 128), "deepseek-ai/DeepSeek-V3 config.json"),
            Workload("deepseek-v3/decode-64", sizes(64, 7168, 128), "deepseek-ai/DeepSeek-V3 config.json"),
        ),
        formulas=(_times_reciprocals,),
        rejections=(Rejection("groups of no column", "group_size", lambda call: {"group_size": 0}),),
        implementations=(triton(),),
    )


def sizes(num_tokens: int, hidden_size: int, group_size: int) -> dict[str, Any]:
    """One point of the input space."""
    return {"num_tokens": num_tokens, "hidden_size": hidden_size, "group_size": group_size}


def point(num_tokens: int, hidden_size: int, group_size: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return sizes(num_tokens, hidden_size, group_size)


def num_groups(parameters: Parameters) -> int:
    """Of a token."""
    return -(-parameters["hidden_size"] // parameters["group_size"])


def _last_group(parameters: Parameters) -> str:
    """Whether it has as many columns as the others."""
    width, group = parameters["hidden_size"], parameters["group_size"]
    if width < group:
        return "the only one, and narrower"
    return "one column" if width % group == 1 < group else "narrower" if width % group else "whole"


def _some(tensors: Tensors, rows: slice, columns: slice) -> Tensors:
    """With zeros there."""
    changed = tensors["hidden_states"].clone()
    changed[rows, columns] = 0
    return {"hidden_states": changed}


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens, each of its own size."""
    tokens, width = parameters["num_tokens"], parameters["hidden_size"]
    return {"hidden_states": draw.normal(tokens, width) * torch.exp2(8 * draw.uniform(tokens, 1) - 4)}


def outliers(draw: Draw, parameters: Parameters) -> Tensors:
    """A few elements a thousand times as large as the others, which are then among the subnormal numbers of e4m3, or 0; and
    tokens that are so as a whole, which must not change the others."""
    tokens, width = parameters["num_tokens"], parameters["hidden_size"]
    large = (draw.uniform(tokens, width) < 0.02) | (draw.uniform(tokens, 1) < 0.2)
    return {"hidden_states": draw.normal(tokens, width) * torch.where(large, 1000.0, 1.0)}


def vanishing(draw: Draw, parameters: Parameters) -> Tensors:
    """Tokens near 2^-50; in float16, of its least numbers."""
    tokens, width = parameters["num_tokens"], parameters["hidden_size"]
    exponent = torch.where(draw.uniform(tokens, 1) < 0.5, -50.0, -22.0)
    return {"hidden_states": draw.normal(tokens, width) * torch.exp2(exponent)}


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """A token with a NaN, one with an infinity, one of zeros of both signs."""
    hidden = dithered(draw, parameters)["hidden_states"]
    hidden[0, -1] = torch.nan
    hidden[-1, 0] = -torch.inf
    hidden[parameters["num_tokens"] // 2] = 0 * draw.normal(parameters["hidden_size"])
    return {"hidden_states": hidden}


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Multiples of 4 that begin with a 448, in each group: all quotients are exact, and some of them ties."""
    tokens, width, group = (parameters[name] for name in ("num_tokens", "hidden_size", "group_size"))
    hidden = 4.0 * draw.integers(-112, 113, tokens, width)
    hidden[:, ::group] = 448
    return {"hidden_states": hidden * torch.exp2(draw.integers(-3, 4, tokens, 1).double())}


def _times_reciprocals(hidden_states: torch.Tensor, *, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels do that spare divisions: by 1 / 448, and by the reciprocal of the scale."""
    _, scales = quantization.quantize_token_groups(hidden_states, group_size=group_size)
    scales = scales * E4M3_MAX * (1 / E4M3_MAX)
    of_columns = scales.repeat_interleave(group_size, 1)[:, : hidden_states.shape[1]]
    quotients = at_least_float32(hidden_states) * torch.where(of_columns == 0, 0.0, 1 / of_columns)
    return quotients, scales
