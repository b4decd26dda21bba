"""The contract of Flux."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import flash_attention, model_states
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch import flux as model


@row
def flux() -> Contract:
    """The row of `flux.flux`."""
    return Contract(
        name="flux.flux",
        summary="A transformer on packed latents and text, first in two streams that attend together, then in one.",
        formula=(
            "c = time, guidance, pooled text, embedded; image, text = block(linear(image), linear(text), c), num_layers times; "
            "joint = single_block(text then image, c), num_single_layers times; "
            "out = linear(layer_norm_modulate(the image of joint, shift, scale)), scale, shift = linear(silu(c))"
        ),
        source="black-forest-labs/flux model.py; diffusers models/transformers/transformer_flux.py, FluxTransformer2DModel",
        reference=model.flux,
        inputs=(
            Input("state", leaves=state_leaves, differentiable=True),
            Input("hidden_states", ("batch_size", "num_image_tokens", "in_channels"), differentiable=True),
            Input("encoder_hidden_states", ("batch_size", "num_text_tokens", "joint_attention_dim"), differentiable=True),
            Input("pooled_projections", ("batch_size", "pooled_projection_dim"), differentiable=True),
            Input("timesteps", ("batch_size",), dtype="float32"),
            Input("guidance", ("batch_size",), dtype="float32"),
            Input("img_ids", ("num_image_tokens", "num_axes"), dtype="float32"),
            Input("txt_ids", ("num_text_tokens", "num_axes"), dtype="float32"),
        ),
        outputs=(Output("out", ("batch_size", "num_image_tokens", "out_features"), differentiable=True),),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(2, 6, 3, tiny_model(num_single_layers=2)),
            sizes(3, 5, 4, tiny_model(3, (2, 2, 4), num_layers=2, guidance_embeds=False, out_channels=2, patch_size=2)),
            sizes(1, 4, 2, tiny_model(1, (8, 28, 28))),  # the published proportions, in half a head
            sizes(3, 8, 4, tiny_model(4, (2, 2, 4))),  # what four ranks can share
        ),
        factors=FACTORS,
        build=point,
        traits=TRAITS,
        regimes=(
            Regime("dithered", dithered),
            Regime("constants", near_constants, "worst element"),
            Regime("adversarial", extreme, "worst element"),
            Regime("special", special, "worst element", differentiable=False),
        ),
        rounded_as=flash_attention.of(model.flux, model),
        cases=0.1,  # a budget with the gradients of all parameters takes about a second
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("flux.1-dev/1024px-3-of-57-blocks", sizes(1, 4096, 512, published(True, 1, 2)), PUBLISHED),
            Workload("flux.1-schnell/512px-3-of-57-blocks", sizes(4, 1024, 256, published(False, 1, 2)), PUBLISHED),
            Workload(
                "two-cores/2-heads-3-blocks",
                sizes(
                    1, 64, 32, FluxConfig(16, num_layers=1, num_single_layers=2, num_attention_heads=2, joint_attention_dim=128)
                ),
                "a size for a CPU, heads as published",
            ),
        ),
        shardings=model_states.SHARDINGS,
        rejections=REJECTIONS,
        implementations=(
            *model_states.on_one_device("flux"),
            distributed("tensor-parallel", "flux_tensor_parallel:flux", only=HEADS_FIT, **model_states.ON_RANKS),
            distributed("sequence-parallel", "flux_sequence_parallel:flux", only=TOKENS_FIT, **model_states.ON_RANKS),
            model_states.fsdp2("flux"),
            model_states.jax_sharded("sharded_flux:flux", only=HEADS_FIT),
        ),
    )


PUBLISHED = "black-forest-labs/flux util.py, at published widths and the published proportion of blocks"
HEADS_FIT = "num_attention_heads % 4 == 0"
TOKENS_FIT = f"{HEADS_FIT} and num_image_tokens % 4 == 0 and num_text_tokens % 4 == 0"
STEERING = ("time_text_embed", "norm1", "norm.linear", "norm_out")


def published(guidance_embeds: bool, num_layers: int, num_single_layers: int) -> FluxConfig:
    """The published widths, with fewer blocks."""
    return FluxConfig(guidance_embeds=guidance_embeds, num_layers=num_layers, num_single_layers=num_single_layers)


def configuration(parameters: Parameters) -> FluxConfig:
    """The model at given parameters."""
    return FluxConfig(**{field.name: parameters[field.name] for field in fields(FluxConfig)})


def state_leaves(parameters: Parameters) -> dict[str, Input]:
    """The model's parameters."""
    return model_states.leaves(model.state_shapes(configuration(parameters)))


def flops(parameters: Parameters) -> float:
    """Matrix products of tokens and of what steers them, and attention."""
    config = configuration(parameters)
    image, text = parameters["num_image_tokens"], parameters["num_text_tokens"]
    products = 4.0 * (config.num_layers + config.num_single_layers) * (image + text) ** 2 * config.hidden_size
    for name, shape in model.state_shapes(config).items():
        if any(each in name for each in STEERING):
            rows = 1
        elif name.startswith("single_transformer_blocks"):
            rows = image + text
        else:
            rows = text if "context" in name or "add_" in name else image
        products += model_states.product_flops(shape, rows)
    return parameters["batch_size"] * products


def moved(parameters: Parameters, itemsize: int) -> float:
    """Parameters, tokens and result, once each."""
    config = configuration(parameters)
    image = parameters["num_image_tokens"] * (config.in_channels + config.out_features)
    text = parameters["num_text_tokens"] * config.joint_attention_dim + config.pooled_projection_dim
    return itemsize * (model_states.moved(model.state_shapes(config)) + parameters["batch_size"] * (image + text))


def sizes(batch_size: int, num_image_tokens: int, num_text_tokens: int, config: FluxConfig) -> dict[str, Any]:
    """One point of the input space."""
    tokens = {"num_image_tokens": num_image_tokens, "num_text_tokens": num_text_tokens}
    own = {"out_features": config.out_features, "num_axes": len(config.axes_dims_rope)}
    return {"batch_size": batch_size, **tokens, **vars(config), **own}


def tiny_model(num_attention_heads: int = 2, axes_dims_rope: tuple[int, ...] = (2, 6, 8), **others: Any) -> FluxConfig:
    """A model small enough for an interpreter."""
    small = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 7, "pooled_projection_dim": 5}
    return FluxConfig(
        **{**small, "guidance_embeds": True, **others},
        attention_head_dim=sum(axes_dims_rope),
        num_attention_heads=num_attention_heads,
        axes_dims_rope=axes_dims_rope,
    )


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models with one to three heads, of which the axes of the tokens' places have equal or different shares."""
    config = tiny_model(
        draw(st.sampled_from([1, 2, 3, 4])),
        draw(st.sampled_from([(2, 6, 8), (2, 2, 4), (4, 2, 2), (4, 6, 6), (6, 2)])),
        num_layers=draw(st.sampled_from([1, 2])),
        num_single_layers=draw(st.sampled_from([1, 2])),
        in_channels=draw(st.sampled_from([1, 3, 4])),
        out_channels=draw(st.sampled_from([None, 1, 2])),
        patch_size=draw(st.sampled_from([1, 2])),
        joint_attention_dim=draw(st.sampled_from([1, 7, 16])),
        pooled_projection_dim=draw(st.sampled_from([1, 5, 8])),
        guidance_embeds=draw(st.booleans()),
    )
    batch_size, image, text = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    return sizes(batch_size, image, text, config)


FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("num_image_tokens", 1, 2, 8),
    edges("num_text_tokens", 1, 2, 4),
    Factor(
        "heads",
        str,
        values=((1, (2, 6, 8)), (2, (2, 6, 8)), (4, (2, 2, 4)), (2, (4, 2, 2))),
        of=lambda sizes: (sizes["num_attention_heads"], sizes["axes_dims_rope"]),
    ),
    edges("num_layers", 1, 2),
    edges("num_single_layers", 1, 2),
    edges("in_channels", 1, 4),
    either("guidance_embeds", False, True),
)


def point(
    batch_size: int, num_image_tokens: int, num_text_tokens: int, heads: tuple[int, tuple[int, ...]], **others: Any
) -> dict[str, Any]:
    """The point with these values of the factors."""
    return sizes(batch_size, num_image_tokens, num_text_tokens, tiny_model(*heads, **others))


def _all(value: Callable[[torch.Tensor], Any], name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value(tensors[name])}


TRAITS = (
    Trait("0", "values of timesteps", _all(torch.zeros_like, "timesteps")),
    Trait("1", "values of timesteps", _all(torch.ones_like, "timesteps")),
    Trait("guidance of 1", "values of guidance", _all(torch.ones_like, "guidance")),  # as classifier-free guidance is off
    Trait("text nowhere", "places", _all(torch.zeros_like, "txt_ids")),  # as published
    Trait("between rows and columns", "places", _all(lambda ids: ids.floor() + 0.25, "img_ids")),
    Trait("far", "places", _all(lambda ids: ids % 4096 + 4096, "img_ids")),  # angles of float32 have 2^-12 of a unit there
)


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens and weights scaled by fan-in, none of them 0; times and guidances with neighbours; places of 1024 pixels.

    The text has places, too, of which the published model makes no use: who leaves them out is to be found.
    """
    shapes = model.state_shapes(configuration(parameters))
    batch_size, image, text = (parameters[each] for each in ("batch_size", "num_image_tokens", "num_text_tokens"))
    guidance = 1 + 4 * draw.uniform(batch_size)
    guidance[1:2] = guidance[:1] + 2.0**-8
    return {
        **model_states.drawn(draw, shapes, around_one=("norm_q", "norm_k", "norm_added")),
        "hidden_states": draw.normal(batch_size, image, parameters["in_channels"]),
        "encoder_hidden_states": draw.normal(batch_size, text, parameters["joint_attention_dim"]),
        "pooled_projections": draw.normal(batch_size, parameters["pooled_projection_dim"]),
        "timesteps": model_states.times(draw, batch_size) / 1000,
        "guidance": guidance,
        "img_ids": draw.integers(0, 64, image, parameters["num_axes"]).double(),
        "txt_ids": draw.integers(0, 64, text, parameters["num_axes"]).double(),
    }


def near_constants(draw: Draw, parameters: Parameters) -> Tensors:
    """Where constants count: of LayerNorms the variances, of queries and keys the squares stay near 1e-6; GELU is near -3.

    There exact GELU is a tenth larger in magnitude than its tanh approximation. Angles of times are small, as is their rounding.
    """
    tensors, width = dithered(draw, parameters), configuration(parameters).hidden_size
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix("state/").rpartition(".")
        if name in ("x_embedder", "context_embedder") or name.endswith(("to_q", "to_k", "add_q_proj", "add_k_proj")):
            tensor *= 2.0**-10
        elif name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear")):
            tensor.unflatten(0, (-1, width))[2::3] *= 2.0**-10  # the gates
        elif name.endswith(("net.0.proj", "proj_mlp")):
            tensor.copy_(tensor * 2.0**-4 if kind == "weight" else tensor / 8 - 3)
        elif name.endswith("net.2") and kind == "weight":
            tensor *= 2.0**8
        elif name.startswith("single") and name.endswith("proj_out") and kind == "weight":
            tensor[:, width:] *= 2.0**8
    return tensors | {"timesteps": tensors["timesteps"] * 2.0**-9, "guidance": tensors["guidance"] * 2.0**-10}


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Attention that picks single tokens; the image from 2^-4 to 2^4, the text the other way round."""
    tensors = dithered(draw, parameters)
    scale = torch.exp2(draw.integers(-4, 5, parameters["batch_size"], 1, 1).double())
    tensors["hidden_states"] *= scale
    tensors["encoder_hidden_states"] /= scale
    for key, tensor in tensors.items():
        if key.endswith(("norm_q.weight", "norm_added_q.weight")):
            tensor *= 4
    return tensors


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """An example with a NaN and one with an infinity."""
    tensors = dithered(draw, parameters)
    tensors["hidden_states"][parameters["batch_size"] // 2, 0, 0] = torch.nan
    tensors["encoder_hidden_states"][-1, -1, -1] = torch.inf
    return tensors


EMBEDDER = "state/x_embedder.weight"
REJECTIONS = (
    Rejection(
        "a parameter too many", "transformer_blocks.99.norm1", lambda call: {"state/transformer_blocks.99.norm1": call[EMBEDDER]}
    ),
    Rejection("a parameter of another shape", "x_embedder.weight", changed(EMBEDDER, lambda each: each[:-1])),
    Rejection("tokens of another width", "hidden_states", changed("hidden_states", lambda each: each.repeat(1, 1, 2))),
    Rejection(
        "a text of another width", "encoder_hidden_states", changed("encoder_hidden_states", lambda each: each.repeat(1, 1, 2))
    ),
    Rejection(
        "a pooled text of another width", "pooled_projections", changed("pooled_projections", lambda each: each.repeat(1, 2))
    ),
    Rejection("times that cannot tell 0.999 from 1", "timesteps", changed("timesteps", lambda each: each.bfloat16())),
    Rejection("guidances that cannot tell 3.5 from 3.504", "guidance", changed("guidance", lambda each: each.bfloat16())),
    Rejection("places that cannot tell 256 from 257", "img_ids", changed("img_ids", lambda each: each.bfloat16())),
    Rejection("places of another axis", "img_ids", changed("img_ids", lambda each: each.repeat(1, 2))),
)
