"""The contract of DiT."""

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
from gaugeblock.reference.configs import DIT_PRESETS, DiTConfig
from gaugeblock.reference.torch import dit as model
from gaugeblock.reference.torch import layers


@row
def dit() -> Contract:
    """The row of `dit.dit`."""
    return Contract(
        name="dit.dit",
        summary="A transformer on patches of latents, steered by a time and a class through adaLN-Zero.",
        formula=(
            "x = patches, embedded, + position table; c = time embedding + class embedding; x = block(x, c), depth times; "
            "out = unpatchify(linear(layer_norm_modulate(x, shift, scale))), shift, scale = linear(silu(c))"
        ),
        source="Peebles and Xie 2022 (arXiv:2212.09748), section 3.2 and figure 3; facebookresearch/DiT models.py",
        reference=model.dit,
        inputs=(
            Input("state", leaves=state_leaves, differentiable=True),
            Input("latents", IMAGE, differentiable=True),
            Input("timesteps", ("batch_size",), dtype="float32"),
            Input("class_labels", ("batch_size",), dtype="int64"),
        ),
        outputs=(Output("out", ("batch_size", "out_channels", "input_size", "input_size"), differentiable=True),),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(3, tiny_model(norm_eps=1e-2)),
            sizes(2, tiny_model(24, 3, 1, 6, 2, in_channels=4, learn_sigma=False, frequency_shift=1, num_classes=10)),
            sizes(1, tiny_model(144, 2, 1, in_channels=4, num_classes=10)),  # heads as wide as DiT-XL's
            sizes(3, tiny_model(16, 4, 2, norm_eps=1e-2, mlp_ratio=1.5)),  # what four ranks can share
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
        rounded_as=flash_attention.of(model.dit, layers),
        cases=0.25,  # a budget with the gradients of all parameters takes about a second
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("dit-xl-2/256px-batch-8", sizes(8, DIT_PRESETS["DiT-XL/2"]), "facebookresearch/DiT models.py, DiT_XL_2"),
            Workload("dit-b-4/256px-batch-32", sizes(32, DIT_PRESETS["DiT-B/4"]), "facebookresearch/DiT models.py, DiT_B_4"),
            Workload("two-cores/dit-s-8-batch-2", sizes(2, DIT_PRESETS["DiT-S/8"]), "a size for a CPU, DiT_S_8"),
        ),
        shardings=model_states.SHARDINGS,
        rejections=REJECTIONS,
        implementations=(
            *model_states.on_one_device("dit"),
            distributed("tensor-parallel", "dit_tensor_parallel:dit", only=HEADS_FIT, **model_states.ON_RANKS),
            distributed("sequence-parallel", "dit_sequence_parallel:dit", only=TOKENS_FIT, **model_states.ON_RANKS),
            model_states.fsdp2("dit", dtypes=("float32", "bfloat16")),
            model_states.jax_sharded("sharded_dit:dit", only=HEADS_FIT),
        ),
    )


HEADS_FIT = "num_heads % 4 == 0"
TOKENS_FIT = f"{HEADS_FIT} and input_size // patch_size % 2 == 0"
IMAGE = ("batch_size", "in_channels", "input_size", "input_size")
TABLE = "y_embedder"  # of which few rows are read
LABELS = "state/y_embedder.embedding_table.weight"


def configuration(parameters: Parameters) -> DiTConfig:
    """The model at given parameters."""
    return DiTConfig(**{field.name: parameters[field.name] for field in fields(DiTConfig)})


def state_leaves(parameters: Parameters) -> dict[str, Input]:
    """The model's parameters."""
    return model_states.leaves(model.state_shapes(configuration(parameters)))


def flops(parameters: Parameters) -> float:
    """Matrix products of tokens and of what steers them, and attention."""
    config = configuration(parameters)
    attention = 4.0 * config.depth * config.num_patches**2 * config.hidden_size
    products = 0.0
    for name, shape in model.state_shapes(config).items():
        if not name.startswith(TABLE):
            is_steering = name.startswith("t_embedder") or "adaLN" in name
            products += model_states.product_flops(shape, 1 if is_steering else config.num_patches)
    return parameters["batch_size"] * (attention + products)


def moved(parameters: Parameters, itemsize: int) -> float:
    """Parameters, latents and result, once each."""
    return moved_by(configuration(parameters), model.state_shapes, parameters["batch_size"], itemsize)


def moved_by(config: Any, shapes: Callable[[Any], model_states.Shapes], batch_size: int, itemsize: int) -> float:
    """The same of any model that takes DiT's inputs, with parameters of these shapes."""
    pixels = batch_size * (config.in_channels + config.out_channels) * config.input_size**2
    return itemsize * (model_states.moved(shapes(config), without=(TABLE,)) + pixels)


def sizes(batch_size: int, config: DiTConfig) -> dict[str, Any]:
    """One point of the input space."""
    return {"batch_size": batch_size, **vars(config), "out_channels": config.out_channels}


def tiny_model(
    hidden_size: int = 32, num_heads: int = 2, depth: int = 2, input_size: int = 4, patch_size: int = 2, **others: Any
) -> DiTConfig:
    """A model small enough for an interpreter."""
    return DiTConfig(
        input_size=input_size,
        patch_size=patch_size,
        in_channels=others.pop("in_channels", 3),
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=others.pop("num_classes", 3),
        frequency_embedding_size=others.pop("frequency_embedding_size", 32),
        **others,
    )


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models with one to three heads, all tokens in one patch or one pixel in each."""
    hidden_size, num_heads = draw(st.sampled_from([(16, 1), (16, 2), (16, 4), (24, 3), (32, 2), (32, 4), (48, 3)]))
    input_size, patch_size = draw(st.sampled_from([(4, 2), (4, 4), (4, 1), (6, 2), (8, 4)]))
    config = tiny_model(
        hidden_size,
        num_heads,
        draw(st.sampled_from([1, 2])),
        input_size,
        patch_size,
        in_channels=draw(st.sampled_from([1, 3, 4])),
        num_classes=draw(st.sampled_from([1, 3, 10])),
        mlp_ratio=draw(st.sampled_from([4.0, 1.5])),
        learn_sigma=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-1])),
        frequency_shift=draw(st.sampled_from([0, 1])),
    )
    return sizes(draw(st.sampled_from([1, 2, 3])), config)


FACTORS = (
    edges("batch_size", 1, 2, 3),
    Factor(
        "heads",
        str,
        values=((16, 1), (16, 2), (16, 4), (24, 3), (32, 2)),
        of=lambda sizes: (sizes["hidden_size"], sizes["num_heads"]),
    ),
    Factor(
        "patches",
        str,
        values=((4, 4), (4, 2), (4, 1), (6, 2)),
        of=lambda sizes: (sizes["input_size"], sizes["patch_size"]),
    ),
    edges("depth", 1, 2),
    edges("in_channels", 1, 3, 4),
    edges("num_classes", 1, 2),
    either("mlp_ratio", 4.0, 1.5),
    either("learn_sigma", False, True),
    either("norm_eps", 1e-6, 1e-2),
    either("frequency_shift", 0, 1),
)


def point(batch_size: int, heads: tuple[int, int], patches: tuple[int, int], depth: int, **others: Any) -> dict[str, Any]:
    """The point with these values of the factors."""
    return sizes(batch_size, tiny_model(*heads, depth, *patches, **others))


def _all(value: Callable[[Tensors], Any], name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: model_states.full(tensors, name, value(tensors))


TRAITS = (
    Trait("int32", "dtype of class_labels", dtypes={"class_labels": "int32"}),
    # to torch a mask, if it is an index
    Trait("uint8", "dtype of class_labels", dtypes={"class_labels": "uint8"}, fits=lambda sizes: sizes["num_classes"] < 256),
    Trait("the first class", "values of class_labels", _all(lambda tensors: 0, "class_labels")),
    Trait("all dropped", "values of class_labels", _all(lambda tensors: len(tensors[LABELS]) - 1, "class_labels")),
    Trait("0", "values of timesteps", _all(lambda tensors: 0.0, "timesteps")),
    Trait("1", "values of timesteps", _all(lambda tensors: 1.0, "timesteps")),
)


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random latents and weights scaled by fan-in, none of them 0; times up to 999, with neighbours; the dropped label."""
    return drawn(draw, parameters, model.state_shapes(configuration(parameters)))


def drawn(draw: Draw, parameters: Parameters, shapes: model_states.Shapes, *, around_one: tuple[str, ...] = ()) -> Tensors:
    """Such inputs of any model that takes DiT's, with parameters of these shapes; `around_one` as of `model_states.drawn`."""
    state = model_states.drawn(draw, shapes, tables=(TABLE,), around_one=around_one)
    batch_size = parameters["batch_size"]
    labels = draw.integers(0, parameters["num_classes"] + 1, batch_size)
    labels[:1] = parameters["num_classes"]
    size = parameters["input_size"]
    return {
        **state,
        "latents": draw.normal(batch_size, parameters["in_channels"], size, size),
        "timesteps": model_states.times(draw, batch_size),
        "class_labels": labels,
    }


def near_constants(draw: Draw, parameters: Parameters) -> Tensors:
    """Where constants count: `near_eps`; inputs of GELU are near -3, where the exact one is a tenth larger in magnitude than its
    tanh approximation."""
    tensors, config = dithered(draw, parameters), configuration(parameters)
    for index in range(config.depth):
        mlp = f"state/blocks.{index}.mlp"
        tensors[f"{mlp}.fc1.weight"] *= 2.0**-4
        tensors[f"{mlp}.fc1.bias"] = tensors[f"{mlp}.fc1.bias"] / 8 - 3
        tensors[f"{mlp}.fc2.weight"] *= 2.0**8
    return near_eps(tensors, config)


def near_eps(tensors: Tensors, config: DiTConfig) -> Tensors:
    """The first patch's variance stays near the eps of every LayerNorm.

    Its place in the table is 0 and 1. Pixels reach the features where it is 0: next to 1, bfloat16 would lose them.
    """
    width, weight, small = config.hidden_size, tensors["state/x_embedder.proj.weight"], config.norm_eps**0.5
    side = config.input_size // config.patch_size
    place = layers.sincos_position_embedding(side, like=weight.new_empty(width))[0]
    weight *= small * (place == 0)[:, None, None, None]
    tensors["state/x_embedder.proj.bias"] = -place
    for index in range(config.depth):
        for part in ("weight", "bias"):
            gates = tensors[f"state/blocks.{index}.adaLN_modulation.1.{part}"].unflatten(0, (6, width))[2::3]
            gates *= small
    return tensors


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Attention that picks single tokens; latents from 2^-4 to 2^4."""
    return picking(draw, dithered(draw, parameters), parameters)


def picking(draw: Draw, tensors: Tensors, parameters: Parameters) -> Tensors:
    """Such inputs made of others."""
    scale = torch.exp2(draw.integers(-4, 5, parameters["batch_size"], 1, 1, 1).to(torch.float64))
    tensors["latents"] *= scale
    for index in range(parameters["depth"]):
        tensors[f"state/blocks.{index}.attn.qkv.weight"][: 2 * parameters["hidden_size"]] *= 3
    return tensors


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """An example with a NaN and one with an infinity."""
    return with_bad_examples(dithered(draw, parameters))


def with_bad_examples(tensors: Tensors) -> Tensors:
    """A NaN in the latents of one example, an infinity in those of the last."""
    latents = tensors["latents"]
    latents[len(latents) // 2, 0, 0, 0] = torch.nan
    latents[-1, 0, -1, -1] = torch.inf
    return tensors


QKV = "state/blocks.0.attn.qkv.weight"
REJECTIONS = (
    Rejection("a parameter too many", "blocks.99.attn.qkv.weight", lambda call: {"state/blocks.99.attn.qkv.weight": call[QKV]}),
    Rejection("a parameter of another shape", "blocks.0.attn.qkv.weight", changed(QKV, lambda each: each[:-1])),
    Rejection("a parameter transposed", "blocks.0.attn.qkv.weight", changed(QKV, lambda each: each.T)),
    Rejection("latents of another size", "latents", changed("latents", lambda each: each[..., :-1])),
    Rejection("times that cannot tell 998 from 999", "timesteps", changed("timesteps", lambda each: each.bfloat16())),
    Rejection(
        "a label above num_classes",
        "class_labels",
        lambda call: {"class_labels": call["class_labels"] * 0 + call["config"].num_classes + 1},
        by_values=True,
    ),
)
