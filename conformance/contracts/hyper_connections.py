"""The contract of hyper-connections."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import model_states
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, kind_of_width, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference import states
from gaugeblock.reference.torch import hyper_connections


@row
def hyper_connection() -> Contract:
    """The row of `hyper_connections.hyper_connection`."""
    return Contract(
        name="hyper_connections.hyper_connection",
        summary="What a branch reads of several residual streams, how they are mixed, and how its result is written to each.",
        formula=(
            "n = x / |x| * sqrt(hidden_size) * (1 + gamma); "
            "read = sum_s sigmoid(pre_branch_scale * n_s alpha_0 + static_s0) * x_s; "
            "mixed_t = sum_s doubly_stochastic(residual_scale * n alpha_1.. + static)_st * x_s; "
            "write_s = 2 * sigmoid(h_post_scale * n_s beta + static_beta_s)"
        ),
        source="Xie et al. 2025 (arXiv:2512.24880), section 4; hyper-connections 0.4.11 (PyPI), mHCv2.py",
        reference=hyper_connections.hyper_connection,
        inputs=(
            Input("state", leaves=lambda parameters: model_states.leaves(shapes(parameters)), differentiable=True),
            Input("streams", STREAMS, differentiable=True),
        ),
        outputs=(
            Output("read", ("batch_size", "num_tokens", "hidden_size"), differentiable=True),
            Output("mixed", STREAMS, differentiable=True),
            Output("write", STREAMS[:-1], dtype="float32", differentiable=True),
        ),
        options=(),
        batch="batch_size",
        landmarks=(
            sizes(2, 3, 3, 20),  # tails everywhere
            sizes(1, 9, 4, 64),  # more than a block of tokens
            sizes(1, 2, 2, 1100),
        ),
        factors=(
            edges("batch_size", 1, 2, 3),
            edges("num_tokens", 1, 2, 7, 17),
            edges("num_streams", 1, 2, 3, 4),
            kinds("hidden_size", kind_of_width, 2, 16, 31, 100),
        ),
        build=sizes,
        traits=(Trait("alike, as at the start", "streams", _alike),),
        regimes=(
            Regime("dithered", dithered),
            Regime("constants", near_nothing, "worst element", differentiable=False),
            Regime("adversarial", extreme, "worst element"),
            Regime("special", special, "worst element", differentiable=False),
        ),
        flops=flops,
        cases=0.05,
        workloads=(
            Workload("cluster/batch-4", sizes(4, 4096, 2, 1024), "LGDLM, configuration of the cluster"),
            Workload("two-cores/256-tokens", sizes(1, 256, 4, 1024), "a size for a CPU"),
        ),
        rejections=(
            Rejection("no streams", "streams", changed("streams", lambda each: each[:, :, :0])),
            Rejection("tokens of one stream", "streams", changed("streams", lambda each: each[:, :, 0])),
            Rejection("a parameter transposed", "dynamic_beta_fn", changed("state/dynamic_beta_fn", lambda each: each.mT)),
        ),
        implementations=(triton(),),
    )


STREAMS = ("batch_size", "num_tokens", "num_streams", "hidden_size")


def sizes(batch_size: int, num_tokens: int, num_streams: int, hidden_size: int) -> dict[str, Any]:
    """One point of the input space."""
    return {"batch_size": batch_size, "num_tokens": num_tokens, "num_streams": num_streams, "hidden_size": hidden_size}


def shapes(parameters: Parameters) -> states.Shapes:
    """Of the connection's parameters."""
    return states.connection_shapes(parameters["num_streams"], parameters["hidden_size"])


def flops(parameters: Parameters) -> float:
    """Products with what scores are made by; streams read and mixed."""
    batch_size, num_tokens, num_streams, hidden_size = (parameters[each] for each in STREAMS)
    return 2.0 * batch_size * num_tokens * num_streams * hidden_size * ((num_streams + 2) + (num_streams + 1))


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Parameters none of which is 0, so that every token is read and mixed otherwise."""
    tensors = model_states.drawn(draw, shapes(parameters))
    for name, tensor in tensors.items():
        if "dynamic_" in name:  # products of them are of the size of the static ones
            tensor.div_(tensor.square().mean().sqrt() * parameters["hidden_size"] ** 0.5)
        elif name.endswith("_scale"):
            tensor += 1
    return {**tensors, "streams": draw.normal(*(parameters[each] for each in STREAMS))}


def near_nothing(draw: Draw, parameters: Parameters) -> Tensors:
    """Streams of a tenth to ten times the least norm, and the first of each token 0."""
    tensors = dithered(draw, parameters)
    streams = tensors["streams"]
    streams /= streams.square().sum(-1, keepdim=True).sqrt()
    streams *= hyper_connections.SMALLEST_NORM * 10 ** (2 * draw.uniform(*streams.shape[:-1], 1) - 1)
    streams[:, :, 0] = 0
    return tensors


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Connections that nearly pick streams, of which one feature is far larger than the others."""
    tensors = dithered(draw, parameters)
    tensors["state/static_alpha"] *= 4
    tensors["streams"][..., -1] += 2.0**5
    return tensors


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """A stream of a token that is NaN in part, and one of another example that is infinite."""
    tensors = dithered(draw, parameters)
    streams = tensors["streams"]
    streams[len(streams) // 2, 0, -1, -1] = torch.nan
    streams[-1, -1, 0, 0] = torch.inf
    return tensors


def _alike(tensors: Tensors) -> Tensors:
    streams = tensors["streams"]
    return {"streams": streams[:, :, :1].expand_as(streams).clone()}
