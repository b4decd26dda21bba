"""The contract of the upcycled GPT-2."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any
from unittest import mock

import torch

from gaugeblock.conformance.contracts import flash_attention, model_states, routed_experts
from gaugeblock.conformance.contracts.biased_moe_layers import EMERGENCE
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either
from gaugeblock.conformance.engine.implementation import compiled, jax, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import UPCYCLED_GPT2_PRESETS, DiTConfig, UpcycledGPT2Config
from gaugeblock.reference.torch import experts
from gaugeblock.reference.torch import upcycled_gpt2 as model


@row
def upcycled_gpt2() -> Contract:
    """The row of `upcycled_gpt2.upcycled_gpt2`."""
    return Contract(
        name="upcycled_gpt2.upcycled_gpt2",
        summary="GPT-2 with MoE layers for some of its MLPs: logits, and what the routers say of each token.",
        formula=(
            "x = token embedding + position embedding; in each block x = x + causal attention of ln_1(x), then x = x + "
            "mlp(ln_2(x)), or x + upcycled_gpt2_moe(ln_2(x), noise) in moe_layers; logits = ln_f(x) @ token table.T; load[b, l, "
            "e] = assignments of e / (num_tokens * top_k)"
        ),
        source=(
            "Radford et al. 2019, section 2.3; transformers models/gpt2/modeling_gpt2.py; sumitdotml/moe-emergence "
            "moe_emergence/gpt2_moe.py"
        ),
        reference=model.upcycled_gpt2,
        inputs=(
            Input("state", leaves=state_leaves, differentiable=True),
            Input("input_ids", ("batch_size", "num_tokens"), dtype="int64", indexes="vocab_size"),
            Input("noise", OF_ROUTERS, dtype="float32"),
        ),
        outputs=(
            Output("logits", ("batch_size", "num_tokens", "vocab_size"), differentiable=True),
            Output("router_logits", OF_ROUTERS, dtype="float32", differentiable=True),
            Output("router_probs", OF_ROUTERS, dtype="float32", differentiable=True),
            Output("entropy", ("batch_size", "num_tokens", "num_moe_layers"), dtype="float32", differentiable=True),
            Output("load", ("batch_size", "num_moe_layers", "num_experts"), dtype="float32"),
        ),
        options=("training", "config"),
        batch="batch_size",
        landmarks=(
            sizes(2, 5, True, tiny_model(layer_norm_eps=1e-3)),
            sizes(3, 4, True, tiny_model((24, 3), top_k=2, moe_layers=(1,))),
            sizes(1, 6, False, tiny_model((64, 1), num_hidden_layers=1, moe_layers=(0,), num_experts=3)),  # a head of GPT-2
        ),
        factors=FACTORS,
        build=point,
        traits=TRAITS,
        regimes=(
            Regime("dithered", dithered),
            Regime("constants", near_constants, "worst element"),
            Regime("adversarial", extreme, "worst element"),
        ),
        rounded_as=with_gelu_of_libraries(flash_attention.of(model.upcycled_gpt2, model)),
        chooses_inside=True,
        cases=0.05,
        configure=lambda parameters: {"training": parameters["training"], "config": configuration(parameters)},
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("moe-main/train-2x512", sizes(2, 512, True, UPCYCLED_GPT2_PRESETS["moe-main"]), f"{EMERGENCE} moe-main"),
            Workload("top2/evaluate-2x512", sizes(2, 512, False, UPCYCLED_GPT2_PRESETS["top2"]), f"{EMERGENCE} top2"),
            Workload(
                "two-cores/narrow-gpt2-64",
                sizes(1, 64, True, UpcycledGPT2Config(2048, 192, 768, 4, 3, 128, moe_layers=(2, 3))),
                "a size for a CPU: a quarter of the small GPT-2's width",
            ),
        ),
        shardings=model_states.SHARDINGS,
        rejections=REJECTIONS,
        without={"nan_containment": "an example has no floating numbers but noise: it is ids"},
        implementations=(
            compiled(
                "torch-library",
                "upcycled_gpt2:upcycled_gpt2_by_library",
                dtypes=("float32", "bfloat16"),
                **model_states.LIBRARY_PRODUCTS,
            ),
            triton(**model_states.LIBRARY_PRODUCTS),
            jax("jax-compiled"),
            model_states.fsdp2("upcycled_gpt2"),
        ),
    )


OF_ROUTERS = ("batch_size", "num_tokens", "num_moe_layers", "num_experts")
TABLES = (".wte.", ".wpe.")
NORM_SCALES = (".ln_1.weight", ".ln_2.weight", ".ln_f.weight")


def configuration(parameters: Parameters) -> UpcycledGPT2Config:
    """The model at given parameters."""
    return UpcycledGPT2Config(**{field.name: parameters[field.name] for field in fields(UpcycledGPT2Config)})


def state_leaves(parameters: Parameters) -> dict[str, Input]:
    """The model's parameters."""
    return model_states.leaves(model.state_shapes(configuration(parameters)))


def sizes(batch_size: int, num_tokens: int, training: bool, config: UpcycledGPT2Config) -> dict[str, Any]:
    """One point of the input space."""
    of_call = {"batch_size": batch_size, "num_tokens": num_tokens, "training": training}
    return {**of_call, **vars(config), "num_moe_layers": len(config.moe_layers)}


def tiny_model(heads: tuple[int, int] = (16, 2), **others: Any) -> UpcycledGPT2Config:
    """A model small enough for an interpreter."""
    small: dict[str, Any] = {
        "vocab_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "max_position_embeddings": 7,
        "moe_layers": (0, 1),
        "num_experts": 4,
    }
    hidden_size, num_heads = heads
    return UpcycledGPT2Config(hidden_size=hidden_size, num_attention_heads=num_heads, **small | others)


Layers = tuple[int, tuple[int, ...]]  # how many, and which of them have experts
LAYERS = ((2, (0, 1)), (2, (1,)), (1, (0,)), (3, (0, 2)))
FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("num_tokens", 1, 2, 5, 7),
    either("training", True, False),
    Factor(
        "heads",
        str,
        values=((16, 2), (16, 1), (24, 3), (64, 1)),
        of=lambda sizes: (sizes["hidden_size"], sizes["num_attention_heads"]),
    ),
    Factor("layers", str, values=LAYERS, of=lambda sizes: (sizes["num_hidden_layers"], sizes["moe_layers"])),
    edges("num_experts", 1, 3, 4),
    edges("top_k", 1, 2, option=True),
    either("layer_norm_eps", 1e-5, 1e-3),
)
TRAITS = (
    Trait("int32", "dtype of input_ids", dtypes={"input_ids": "int32"}),
    Trait("bfloat16", "dtype of noise", dtypes={"noise": "bfloat16"}),
)


def point(
    batch_size: int,
    num_tokens: int,
    training: bool,
    layers: Layers,
    num_experts: int,
    top_k: int,
    **others: Any,
) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    if top_k > num_experts:
        return None
    depth: dict[str, Any] = {"num_hidden_layers": layers[0], "moe_layers": layers[1]}
    return sizes(batch_size, num_tokens, training, tiny_model(**depth, num_experts=num_experts, top_k=top_k, **others))


def flops(parameters: Parameters) -> float:
    """Matrix products of tokens, and attention of each to those before it; each token passes `top_k` of the experts."""
    config, num_tokens = configuration(parameters), parameters["num_tokens"]
    total = 4.0 * config.num_hidden_layers * num_tokens * (num_tokens + 1) / 2 * config.hidden_size
    for name, shape in model.state_shapes(config).items():
        if ".wpe." not in name and not (".experts." in name and name.endswith("bias")):
            part = config.top_k / config.num_experts if ".experts." in name else 1.0
            total += part * model_states.product_flops(shape, num_tokens)
    return float(parameters["batch_size"] * total)


def moved(parameters: Parameters, itemsize: int) -> float:
    """Parameters and results, once each, of the table of places the rows of all tokens, and the experts that may be used."""
    config, tokens = configuration(parameters), parameters["batch_size"] * parameters["num_tokens"]
    used = min(1.0, tokens * config.top_k / config.num_experts)
    read = 0.0
    for name, shape in model.state_shapes(config).items():
        rows = min(shape[0], parameters["num_tokens"]) if ".wpe." in name else shape[0]
        read += (used if ".experts." in name else 1.0) * rows * torch.Size(shape[1:]).numel()
    of_routers = 4.0 * tokens * len(config.moe_layers) * (3 * config.num_experts + 1)
    loads = 4.0 * parameters["batch_size"] * len(config.moe_layers) * config.num_experts
    return itemsize * (read + tokens * config.vocab_size) + of_routers + loads


def with_gelu_of_libraries(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same with the GELU of libraries, which loses digits below -6, in dense networks and in experts."""

    def formula(*arguments: Any, **options: Any) -> Any:
        gelu = routed_experts.gelu_by_sums
        with mock.patch.object(model, "gelu", gelu), mock.patch.object(experts, "gelu", gelu):
            return function(*arguments, **options)

    return formula


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Weights scaled by fan-in, none of them 0; gates of which no two experts are alike, and noise that is not small."""
    config = configuration(parameters)
    tensors = model_states.drawn(draw, model.state_shapes(config), tables=TABLES, around_one=NORM_SCALES)
    for name, tensor in tensors.items():
        if name.endswith("gate.weight"):
            tensor *= 2
        elif ".experts.c_fc.weight" in name or ".experts.c_proj.weight" in name:
            tensor *= (shape_of_matrix(name, config)[-1] / shape_of_matrix(name, config)[0]) ** 0.5  # [in, out]: by their fan-in
    batch_size, num_tokens = parameters["batch_size"], parameters["num_tokens"]
    return {
        **tensors,
        "input_ids": draw.integers(0, config.vocab_size, batch_size, num_tokens),
        "noise": 2 * draw.normal(batch_size, num_tokens, len(config.moe_layers), config.num_experts),
    }


def shape_of_matrix(name: str, config: UpcycledGPT2Config) -> tuple[int, ...]:
    """Of one expert."""
    return model.state_shapes(config)[name.removeprefix("state/")][1:]


def near_constants(draw: Draw, parameters: Parameters) -> Tensors:
    """Where constants count: variances stay near the eps of every LayerNorm; inputs of the activation are near -2.

    There the GELU by tanh differs from the exact one, and both from other activations.
    """
    tensors = dithered(draw, parameters)
    for name, tensor in tensors.items():
        if any(each in name for each in TABLES) or "c_proj." in name:
            tensor *= 2.0**-8
        elif name.endswith("c_fc.weight"):
            tensor *= 2.0**-2
        elif name.endswith("c_fc.bias"):
            tensor.mul_(0.25).sub_(2)
    return tensors


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Attention that picks single tokens; one feature of all tokens that is far larger than the others, as in trained models."""
    tensors = dithered(draw, parameters)
    for name, tensor in tensors.items():
        if name.endswith("c_attn.weight"):
            tensor[:, : 2 * parameters["hidden_size"]] *= 3
    tensors["state/transformer.wpe.weight"][:, -1] += 2.0**5
    return tensors


GATE, FC = "router.gate.weight", "experts.c_fc.weight"


def _of_layer(name: str, change: Any) -> Any:
    """A change of a parameter of the first MoE layer."""

    def made(call: dict[str, Any]) -> dict[str, Any]:
        key = f"state/transformer.h.{call['config'].moe_layers[0]}.mlp.{name}"
        return {key: change(call[key])}

    return made


REJECTIONS = (
    Rejection("an expert too many", FC, _of_layer(FC, lambda each: torch.cat([each, each]))),
    Rejection("a gate transposed", GATE, _of_layer(GATE, lambda each: each.mT)),
    Rejection("a head of its own", "lm_head.weight", lambda call: {"state/lm_head.weight": call["state/transformer.wte.weight"]}),
    Rejection("a text too long", "input_ids", lambda call: {
        name: torch.cat([call[name]] * 8, 1) for name in ("input_ids", "noise")
    }),
    Rejection("a text without tokens", "input_ids", lambda call: {name: call[name][:, :0] for name in ("input_ids", "noise")}),
    Rejection("noise for a layer more", "noise", changed("noise", lambda each: torch.cat([each, each], 2))),
    Rejection("the config of a DiT", "config", lambda call: {"config": DiTConfig()}),
)  # fmt: skip
