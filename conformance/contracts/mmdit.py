"""The contract of MMDiT."""

from collections.abc import Callable
from dataclasses import fields, replace
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
from gaugeblock.reference.configs import MMDIT_PRESETS, MMDiTConfig
from gaugeblock.reference.torch import mmdit as model


@row
def mmdit() -> Contract:
    """The row of `mmdit.mmdit`."""
    return Contract(
        name="mmdit.mmdit",
        summary="A transformer on the tokens of an image and of a text, each with weights of its own, that attend jointly.",
        formula=(
            "x = patches, embedded, + middle of the position table; y = linear(text); c = time embedding + pooled embedding; "
            "x, y = block(x, y, c), num_layers times; "
            "out = unpatchify(linear(layer_norm_modulate(x, shift, scale))), scale, shift = linear(silu(c))"
        ),
        source="Esser et al. 2024 (arXiv:2403.03206), section 4 and figure 2; diffusers SD3Transformer2DModel",
        reference=model.mmdit,
        inputs=(
            Input("state", leaves=state_leaves, differentiable=True, buffers=frozenset({model.POSITIONS})),
            Input("latents", ("batch_size", "in_channels", "height", "width"), differentiable=True),
            Input("encoder_hidden_states", ("batch_size", "num_text_tokens", "joint_attention_dim"), differentiable=True),
            Input("pooled_projections", ("batch_size", "pooled_projection_dim"), differentiable=True),
            Input("timesteps", ("batch_size",), dtype="float32"),
        ),
        outputs=(Output("out", ("batch_size", "out_channels", "height", "width"), differentiable=True),),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            # of both, four ranks can share the heads, but not all streams of tokens
            sizes(
                3, 3, (3, 1), tiny_model(8, 4, 2, qk_norm="rms_norm", dual_attention_layers=(0,))
            ),  # Stable Diffusion 3.5 medium
            sizes(2, 5, (3, 2), tiny_model(8, 4, 2, patch_size=1, in_channels=4, out_channels=2)),  # Stable Diffusion 3
            sizes(1, 4, (1, 3), tiny_model(64, 1, 1, qk_norm="rms_norm")),  # heads as wide as the published ones
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
        rounded_as=flash_attention.of(model.mmdit, model),
        cases=0.15,  # a budget with the gradients of all parameters takes seconds
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("sd3-medium/1024px", published("sd3-medium", 64), "stabilityai/stable-diffusion-3-medium, config.json"),
            Workload(
                "sd3.5-medium/1024px", published("sd3.5-medium", 64), "stabilityai/stable-diffusion-3.5-medium, config.json"
            ),
            Workload("two-cores/two-blocks-of-sd3", two_blocks(), "a size for a CPU; half of the heads of sd3-medium"),
        ),
        shardings=model_states.SHARDINGS,
        rejections=REJECTIONS,
        implementations=(
            *model_states.on_one_device("mmdit"),
            distributed("tensor-parallel", "mmdit_tensor_parallel:mmdit", only=HEADS_FIT, **model_states.ON_RANKS),
            distributed("sequence-parallel", "mmdit_sequence_parallel:mmdit", only=HEADS_FIT, **model_states.ON_RANKS),
            model_states.fsdp2("mmdit"),
            model_states.jax_sharded("sharded_mmdit:mmdit", only=HEADS_FIT),
        ),
    )


HEADS_FIT = "num_attention_heads % 4 == 0"


def configuration(parameters: Parameters) -> MMDiTConfig:
    """The model at given parameters."""
    return MMDiTConfig(**{field.name: parameters[field.name] for field in fields(MMDiTConfig)})


def state_leaves(parameters: Parameters) -> dict[str, Input]:
    """The model's parameters."""
    return model_states.leaves(model.state_shapes(configuration(parameters)))


def num_patches(parameters: Parameters) -> int:
    """Tokens of an image."""
    return int(parameters["height"] * parameters["width"] // parameters["patch_size"] ** 2)


def flops(parameters: Parameters) -> float:
    """Matrix products of tokens and of what steers them, and attention; the last block's text asks nothing."""
    config, patches, text = configuration(parameters), num_patches(parameters), parameters["num_text_tokens"]
    pairs = config.num_layers * (patches + text) ** 2 - text * (patches + text) + len(config.dual_attention_layers) * patches**2
    products = 4.0 * pairs * config.hidden_size
    for name, shape in model.state_shapes(config).items():
        if name != model.POSITIONS and not is_idle(name, config):
            is_steering = "time_text_embed" in name or "norm1" in name or "norm_out" in name
            is_of_text = any(part in name for part in ("context", ".add_", "to_add_out"))
            products += model_states.product_flops(shape, 1 if is_steering else text if is_of_text else patches)
    return float(parameters["batch_size"] * products)


def moved(parameters: Parameters, itemsize: int) -> float:
    """Parameters, what the state's table is read of, latents, text and result, once each."""
    config, shapes = configuration(parameters), model.state_shapes(configuration(parameters))
    idle = (model.POSITIONS, *(name for name in shapes if is_idle(name, config)))
    pixels = (config.in_channels + config.out_channels) * parameters["height"] * parameters["width"]
    text = parameters["num_text_tokens"] * config.joint_attention_dim + config.pooled_projection_dim
    places = num_patches(parameters) * config.hidden_size
    return itemsize * (model_states.moved(shapes, without=idle) + places + parameters["batch_size"] * (pixels + text))


def is_idle(name: str, config: MMDiTConfig) -> bool:
    """Whether a parameter changes nothing: what makes the queries of the last block's text."""
    last = f"transformer_blocks.{config.num_layers - 1}.attn"
    return name.startswith((f"{last}.add_q_proj", f"{last}.norm_added_q"))


def sizes(batch_size: int, num_text_tokens: int, patches: tuple[int, int], config: MMDiTConfig) -> dict[str, Any]:
    """One point of the input space, with so many rows and columns of patches."""
    height, width = (number * config.patch_size for number in patches)
    call = {"batch_size": batch_size, "num_text_tokens": num_text_tokens, "height": height, "width": width}
    return call | vars(config)


def tiny_model(attention_head_dim: int, num_attention_heads: int, num_layers: int, **others: Any) -> MMDiTConfig:
    """A model small enough for an interpreter."""
    small = {"patch_size": 2, "in_channels": 3, "out_channels": 3, "joint_attention_dim": 7, "pooled_projection_dim": 5}
    small["pos_embed_max_size"] = 5
    return MMDiTConfig(
        sample_size=8,
        num_layers=num_layers,
        attention_head_dim=attention_head_dim,
        num_attention_heads=num_attention_heads,
        caption_projection_dim=attention_head_dim * num_attention_heads,
        **small | others,
    )


def published(name: str, rows: int) -> dict[str, Any]:
    """Two images, with and without the text's guidance, of so many rows and columns, and a text of 77 + 256 tokens."""
    return sizes(2, 333, (rows, rows), MMDIT_PRESETS[name])


def two_blocks() -> dict[str, Any]:
    """An image of few tokens, a text of CLIP's length, two blocks with half of the published heads."""
    config = replace(
        MMDIT_PRESETS["sd3-medium"], num_layers=2, pos_embed_max_size=8, num_attention_heads=12, caption_projection_dim=768
    )
    return sizes(1, 77, (8, 8), config)


FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("num_text_tokens", 1, 2, 5),
    Factor(
        "heads",
        str,
        values=((16, 1), (8, 2), (8, 3), (16, 2)),
        of=lambda sizes: (sizes["attention_head_dim"], sizes["num_attention_heads"]),
    ),
    Factor(
        "patches",
        str,
        values=((1, 1), (1, 4), (5, 2), (3, 3)),
        of=lambda sizes: (sizes["height"] // sizes["patch_size"], sizes["width"] // sizes["patch_size"]),
    ),
    edges("num_layers", 1, 2),
    edges("patch_size", 1, 2),
    Factor(
        "channels",
        str,
        values=((3, 3), (4, 2)),
        of=lambda sizes: (sizes["in_channels"], sizes["out_channels"]),
    ),
    either("qk_norm", None, "rms_norm"),
    edges("dual_layers", 0, 1, of=lambda sizes: len(sizes["dual_attention_layers"])),
)


def point(
    batch_size: int,
    num_text_tokens: int,
    heads: tuple[int, int],
    patches: tuple[int, int],
    num_layers: int,
    channels: tuple[int, int],
    dual_layers: int,
    **others: Any,
) -> dict[str, Any]:
    """The point with these values of the factors; the first blocks have dual attention."""
    dual = tuple(range(dual_layers))
    config = tiny_model(
        *heads, num_layers, in_channels=channels[0], out_channels=channels[1], dual_attention_layers=dual, **others
    )
    return sizes(batch_size, num_text_tokens, patches, config)


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models with one to three heads, one to ten patches, and a text that may be longer or shorter."""
    drawn = {factor.name: draw(st.sampled_from(factor.values)) for factor in FACTORS}
    return point(**drawn | {"num_text_tokens": draw(st.integers(1, 7))})


def _all(value: float, name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: model_states.full(tensors, name, value)


def _padded(tensors: Tensors) -> Tensors:
    text = tensors["encoder_hidden_states"].clone()
    text[:, text.shape[1] // 2 :] = 0
    return {"encoder_hidden_states": text}


TRAITS = (
    Trait("half padding", "values of encoder_hidden_states", _padded),
    Trait("no pooled text", "values of pooled_projections", _all(0.0, "pooled_projections")),
    Trait("0", "values of timesteps", _all(0.0, "timesteps")),
    Trait("1000", "values of timesteps", _all(1000.0, "timesteps")),
)


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random latents, texts and weights scaled by fan-in, none of them 0; times up to 999, with neighbours."""
    shapes = model.state_shapes(configuration(parameters))
    batch_size = parameters["batch_size"]
    return {
        **model_states.drawn(draw, shapes, tables=(model.POSITIONS,), around_one=QK_NORMS),
        "latents": draw.normal(batch_size, parameters["in_channels"], parameters["height"], parameters["width"]),
        "encoder_hidden_states": draw.normal(batch_size, parameters["num_text_tokens"], parameters["joint_attention_dim"]),
        "pooled_projections": draw.normal(batch_size, parameters["pooled_projection_dim"]),
        "timesteps": model_states.times(draw, batch_size),
    }


QK_NORMS = (".norm_q.", ".norm_k.", ".norm_added_q.", ".norm_added_k.")


def near_constants(draw: Draw, parameters: Parameters) -> Tensors:
    """Where constants count: variances near the eps of every norm, for the first patch and all of the text.

    Inputs of GELU are near -3, where exact GELU is a tenth larger in magnitude than its tanh approximation.
    """
    tensors, config = dithered(draw, parameters), configuration(parameters)
    table = tensors[f"state/{model.POSITIONS}"]
    rows, columns = (parameters[size] // config.patch_size for size in ("height", "width"))
    numbers = torch.arange(config.pos_embed_max_size**2).reshape(1, -1, 1)
    first = model.middle_of_positions(numbers.expand_as(table), rows, columns, config=config)[0, 0]
    table[0, first] = -tensors["state/pos_embed.proj.bias"]
    for name in ("pos_embed.proj.weight", "context_embedder.weight", "context_embedder.bias"):
        tensors[f"state/{name}"] *= 2.0**-10
    for name, tensor in tensors.items():
        if ".norm1" in name and len(tensor) >= 6 * config.hidden_size:
            tensor.unflatten(0, (-1, config.hidden_size))[2::3] *= 2.0**-10  # gates
        elif config.qk_norm is not None and any(f"{each}." in name for each in ("to_q", "to_k", "add_q_proj", "add_k_proj")):
            tensor *= 2.0**-10
        elif name.endswith("net.0.proj.weight"):
            tensor *= 2.0**-4
        elif name.endswith("net.0.proj.bias"):
            tensor.div_(8).sub_(3)
        elif name.endswith("net.2.weight"):
            tensor *= 2.0**8
    return tensors


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Attention that picks single tokens; latents from 2^-4 to 2^4."""
    tensors = dithered(draw, parameters)
    scale = torch.exp2(draw.integers(-4, 5, parameters["batch_size"], 1, 1, 1).to(torch.float64))
    tensors["latents"] *= scale
    sharp = ("to_q.", "to_k.", "add_q_proj.", "add_k_proj.") if parameters["qk_norm"] is None else QK_NORMS
    for name, tensor in tensors.items():
        if any(each in name for each in sharp):
            tensor *= 3
    return tensors


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """An example with a NaN and one with an infinity."""
    tensors = dithered(draw, parameters)
    tensors["latents"][parameters["batch_size"] // 2, 0, 0, 0] = torch.nan
    tensors["latents"][-1, 0, -1, -1] = torch.inf
    return tensors


QUERY = "transformer_blocks.0.attn.to_q.weight"
TABLE = f"state/{model.POSITIONS}"
REJECTIONS = (
    Rejection(
        "a parameter too many",
        "transformer_blocks.99.attn.to_q.weight",
        lambda call: {"state/transformer_blocks.99.attn.to_q.weight": call[f"state/{QUERY}"]},
    ),
    Rejection("a parameter of another shape", QUERY, changed(f"state/{QUERY}", lambda each: each[:-1])),
    Rejection("a table of another size", model.POSITIONS, changed(TABLE, lambda each: each[:, :-1])),
    Rejection("latents larger than the table", "latents", changed("latents", lambda each: each.repeat(1, 1, 99, 1))),
    Rejection("latents without a row", "latents", changed("latents", lambda each: each[:, :, :0])),
    Rejection("times that cannot tell 998 from 999", "timesteps", changed("timesteps", lambda each: each.bfloat16())),
)
