"""The contracts of the UNets of Stable Diffusion: 1 and 2, and XL, which is steered by sizes and a pooled text as well."""

from dataclasses import fields, replace
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import flash_attention, model_states
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import UNET_PRESETS, UNetConfig
from gaugeblock.reference.torch import unet as model
from gaugeblock.reference.unet_states import state_shapes


@row
def unet() -> Contract:
    """The row of `unet.unet`."""
    return Contract(
        name="unet.unet",
        summary="ResNet blocks on latents of several sizes, between them transformers that look at a text.",
        formula=(
            "x = conv(latents); down: x = transformer(resnet(x, time)), kept, then conv(x) of stride 2, kept; "
            "x = resnet(transformer(resnet(x))); up: x = transformer(resnet([x, kept last])), then conv(x doubled); "
            "out = conv(silu(group_norm(x)))"
        ),
        source="Rombach et al. 2021 (arXiv:2112.10752), section 3.3, figure 3; diffusers' UNet2DConditionModel",
        reference=model.unet,
        inputs=(*INPUTS, MASK),
        outputs=OUTPUTS,
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(3, 3, 5, 4, tiny_model(THREE_LEVELS)),
            sizes(2, 4, 2, 3, tiny_model(LAST_LOOKS, use_linear_projection=True, norm_eps=1e-2)),
            sizes(1, 2, 3, 5, tiny_model(AS_WIDE_AS_SD, in_channels=4, transformer_layers_per_block=(2,))),
        ),
        factors=(
            *FACTORS,
            edges("layers_per_block", 1, 2),
            edges("in_channels", 1, 3, 4),
            either("use_linear_projection", False, True),
            either("norm_eps", 1e-5, 1e-2),
        ),
        build=point,
        traits=TRAITS,
        regimes=REGIMES,
        rounded_as=flash_attention.of(model.unet, model),
        cases=0.1,  # a budget with the gradients of all parameters takes about a second
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("sd-1.5/512px-batch-2", sizes(2, 64, 64, 77, UNET_PRESETS["SD-1.5"]), SD_1),
            Workload("sd-2.1/768px-batch-2", sizes(2, 96, 96, 77, UNET_PRESETS["SD-2.1"]), SD_2),
            Workload("two-cores/part-of-sd-1.5-128px", sizes(1, 16, 16, 77, PART_OF_SD), "a size for a CPU; heads as published"),
        ),
        rejections=REJECTIONS,
        shardings=model_states.SHARDINGS,
        implementations=ours("unet"),
    )


@row
def unet_text_time() -> Contract:
    """The row of `unet.unet_text_time`."""
    return Contract(
        name="unet.unet_text_time",
        summary="The UNet of SDXL, which is steered by a pooled text and the sizes and crop of an image, too.",
        formula="as unet.unet, with time + linear(silu(linear([text_embeds, cosines and sines of each of time_ids])))",
        source="Podell et al. 2023 (arXiv:2307.01952), sections 2.1 and 2.2; diffusers' UNet2DConditionModel, text_time",
        reference=model.unet_text_time,
        inputs=(
            *INPUTS,
            Input("text_embeds", ("batch_size", "text_embed_dim"), differentiable=True),
            Input("time_ids", ("batch_size", "num_time_ids"), dtype="float32"),
            MASK,
        ),
        outputs=OUTPUTS,
        options=("config",),
        batch="batch_size",
        parameters=parameters_with_sizes,
        landmarks=(
            with_sizes(sizes(3, 3, 2, 7, tiny_model(MIDDLE_ALONE, use_linear_projection=True)), 7, 3),
            with_sizes(sizes(1, 2, 3, 4, tiny_model(AS_WIDE_AS_SD, use_linear_projection=True, norm_eps=1e-2)), 5, 6),
        ),
        factors=(*FACTORS, edges("text_embed_dim", 1, 2), edges("num_time_ids", 1, 5, 6)),
        build=point_with_sizes,
        traits=TRAITS,
        regimes=REGIMES,
        rounded_as=flash_attention.of(model.unet_text_time, model),
        cases=0.05,  # as unet.unet, from which it differs in what steers the blocks alone
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("sdxl-base/1024px-batch-2", with_sizes(sizes(2, 128, 128, 77, UNET_PRESETS["SDXL-base"]), 1280, 6), SDXL),
            Workload("sdxl-refiner/1024px", with_sizes(sizes(1, 128, 128, 77, UNET_PRESETS["SDXL-refiner"]), 1280, 5), SDXL),
            Workload(
                "two-cores/part-of-sdxl-128px",
                with_sizes(sizes(1, 16, 16, 77, PART_OF_SDXL), 1280, 6),
                "a size for a CPU; heads as published",
            ),
        ),
        rejections=(
            *REJECTIONS,
            Rejection("a size too few", "time_ids", changed("time_ids", lambda each: each[:, 1:])),
            Rejection("sizes that cannot tell 1024 from 1023", "time_ids", changed("time_ids", lambda each: each.bfloat16())),
        ),
        shardings=model_states.SHARDINGS,
        implementations=ours("unet_text_time"),
    )


INPUTS = (
    Input("state", leaves=lambda parameters: model_states.leaves(state_shapes(configuration(parameters))), differentiable=True),
    Input("latents", ("batch_size", "in_channels", "height", "width"), differentiable=True),
    Input("timesteps", ("batch_size",), dtype="float32"),
    Input("encoder_hidden_states", ("batch_size", "text_length", "cross_attention_dim"), differentiable=True),
)
MASK = Input("encoder_attention_mask", ("batch_size", "text_length"), dtype="bool")
OUTPUTS = (Output("out", ("batch_size", "out_channels", "height", "width"), differentiable=True),)
SD_1, SD_2 = "Stable Diffusion 1.5, unet/config.json", "Stable Diffusion 2.1, unet/config.json"
PART_OF_SD = replace(UNET_PRESETS["SD-1.5"], block_out_channels=(160, 160, 320, 320), attention_head_dim=(4, 4, 8, 8))
PART_OF_SDXL = replace(
    UNET_PRESETS["SDXL-base"],
    block_out_channels=(64, 128, 256),
    transformer_layers_per_block=(1, 2, 4),
    attention_head_dim=(1, 2, 4),
)
SDXL = "Stable Diffusion XL 1.0, unet/config.json"

# channels, whether transformers follow, heads and groups of tiny models; groups of two channels at least, as in public models
FIRST_LOOKS = ((8, 12), (True, False), (2, 3), 4)
LAST_LOOKS = ((4, 12), (False, True), (1, 2), 2)
ONE_LEVEL = ((8,), (True,), (2,), 2)
# Their one transformer is that of the middle: the cheapest. Four ranks can share heads and groups; the middle one of three levels
# may have an odd size.
THREE_LEVELS = ((8, 12, 20), (False, False, False), (1, 1, 4), 4)
MIDDLE_ALONE = ((12,), (False,), (4,), 4)
AS_WIDE_AS_SD = ((40,), (False,), (1,), 4)  # heads of 40 features, groups of 10 channels
LEVELS = (FIRST_LOOKS, LAST_LOOKS, ONE_LEVEL)
IMAGES = ((4, 4), (3, 5), (2, 3), (4, 2))
FOUR_CAN_SHARE = "norm_num_groups % 4 == 0 and gcd_of_heads % 4 == 0"


def ours(operation: str) -> tuple[Implementation, ...]:
    """Our versions of an operation."""
    return (
        *model_states.on_one_device("unet", operation),
        model_states.fsdp2(operation),
        model_states.jax_sharded(f"sharded_unet:{operation}", only=FOUR_CAN_SHARE),
    )


def configuration(parameters: Parameters) -> UNetConfig:
    """The model at given parameters."""
    return UNetConfig(**{field.name: parameters[field.name] for field in fields(UNetConfig)})


def sizes(batch_size: int, height: int, width: int, text_length: int, config: UNetConfig) -> dict[str, Any]:
    """One point of the input space."""
    image = {"height": height, "width": width}
    return {"batch_size": batch_size, **image, "text_length": text_length, **vars(config), "gcd_of_heads": config.gcd_of_heads}


def levels_of(config: UNetConfig) -> tuple[Any, ...]:
    """Channels, whether transformers follow, heads and groups, as `tiny_model` takes them."""
    has_transformers = tuple(each == "CrossAttnDownBlock2D" for each in config.down_block_types)
    return config.block_out_channels, has_transformers, config.attention_head_dim, config.norm_num_groups


def with_sizes(point: Parameters, text_embed_dim: int, num_time_ids: int) -> dict[str, Any]:
    """A point with so many additional numbers, each embedded as wide as the config says, or else as 4."""
    each = point["addition_time_embed_dim"] or 4
    together = text_embed_dim + num_time_ids * each
    added = {"addition_time_embed_dim": each, "projection_class_embeddings_input_dim": together}
    return {**point, **added, "text_embed_dim": text_embed_dim, "num_time_ids": num_time_ids}


def tiny_model(levels: tuple[Any, ...] = FIRST_LOOKS, **others: Any) -> UNetConfig:
    """A model small enough for a compiler."""
    channels, has_transformers, num_heads, num_groups = levels
    return UNetConfig(
        in_channels=others.pop("in_channels", 3),
        out_channels=others.pop("out_channels", 2),
        block_out_channels=channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if each else "DownBlock2D" for each in has_transformers),
        layers_per_block=others.pop("layers_per_block", 1),
        transformer_layers_per_block=others.pop("transformer_layers_per_block", (1,) * len(channels)),
        attention_head_dim=num_heads,
        cross_attention_dim=others.pop("cross_attention_dim", 6),
        norm_num_groups=num_groups,
        **others,
    )


FACTORS = (
    edges("batch_size", 1, 2, 3),
    Factor(
        "levels",
        str,
        values=LEVELS,
        of=lambda sizes: levels_of(configuration(sizes)),
    ),
    Factor("image", str, values=IMAGES, of=lambda sizes: (sizes["height"], sizes["width"])),
    edges("text_length", 2, 5),
)


def point(batch_size: int, levels: tuple[Any, ...], image: tuple[int, int], text_length: int, **others: Any) -> dict[str, Any]:
    """The point with these values of the factors."""
    return sizes(batch_size, *image, text_length, tiny_model(levels, **others))


def point_with_sizes(text_embed_dim: int, num_time_ids: int, **others: Any) -> dict[str, Any]:
    """As `point`, with additional numbers."""
    return with_sizes(point(**others, use_linear_projection=True), text_embed_dim, num_time_ids)


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models of one and two levels, images of even and odd sizes."""
    levels = draw(st.sampled_from(LEVELS))
    return point(
        draw(st.sampled_from([1, 2, 3])),
        levels,
        draw(st.sampled_from(IMAGES)),
        draw(st.sampled_from([2, 3, 5])),
        layers_per_block=draw(st.sampled_from([1, 2])),
        transformer_layers_per_block=tuple(draw(st.sampled_from([1, 2])) for _ in levels[0]),
        in_channels=draw(st.sampled_from([1, 3, 4])),
        cross_attention_dim=draw(st.sampled_from([1, 6])),
        use_linear_projection=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
    )


@st.composite
def parameters_with_sizes(draw: st.DrawFn) -> dict[str, Any]:
    """As `parameters`, with additional numbers."""
    return with_sizes(draw(parameters()), draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 5, 6])))


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random latents and weights scaled by fan-in, none of them 0; times up to 999, with neighbours; texts of some tokens."""
    batch_size, text_length = parameters["batch_size"], parameters["text_length"]
    mask = draw.uniform(batch_size, text_length) < 0.7
    mask[:, :2] = True
    tensors = {
        **model_states.drawn(draw, state_shapes(configuration(parameters)), around_one=("norm", "norm_out")),
        "latents": draw.normal(batch_size, parameters["in_channels"], parameters["height"], parameters["width"]),
        "timesteps": model_states.times(draw, batch_size),
        "encoder_hidden_states": draw.normal(batch_size, text_length, parameters["cross_attention_dim"]),
    }
    if parameters["addition_time_embed_dim"]:
        tensors["text_embeds"] = draw.normal(batch_size, parameters["text_embed_dim"])
        tensors["time_ids"] = draw.integers(0, 1025, batch_size, parameters["num_time_ids"]).to(torch.float64)
    return tensors | {"encoder_attention_mask": mask}


SMALL = ("conv1.weight", "conv2.weight", "to_out.0.weight", "proj_out.weight", "time_emb_proj.weight")


def near_constants(draw: Draw, parameters: Parameters) -> Tensors:
    """Where constants count: variances near the eps of every norm; inputs of GELU near -3.

    What enters the residual streams is small, and so is what leaves a branch. At -3 exact GELU is a tenth larger in magnitude
    than its approximation by tanh.
    """
    tensors = dithered(draw, parameters)
    tensors["latents"] *= 2.0**-10
    for name, tensor in tensors.items():
        if name.endswith(SMALL) or (name.endswith(".bias") and "norm" not in name and "embedding" not in name):
            tensor *= 2.0**-10
        if name.endswith("proj_in.weight"):
            tensor *= 2.0**-9
        if name.endswith("ff.net.0.proj.weight"):
            tensor[len(tensor) // 2 :] *= 2.0**-4
        if name.endswith("ff.net.0.proj.bias"):
            tensor[len(tensor) // 2 :] -= 3
    return tensors


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Attention that picks single pixels and words; means of GroupNorm many deviations from 0; latents from 2^-4 to 2^4."""
    tensors = dithered(draw, parameters)
    tensors["latents"] *= torch.exp2(draw.integers(-4, 5, parameters["batch_size"], 1, 1, 1).to(torch.float64))
    for name, tensor in tensors.items():
        if name.endswith(("conv_in.bias", "conv1.bias")):
            tensor += 2.0**5
        if name.endswith(("to_q.weight", "to_k.weight")):
            tensor *= 3
    return tensors


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """An example with a NaN and one with an infinity."""
    tensors = dithered(draw, parameters)
    tensors["latents"][parameters["batch_size"] // 2, 0, 0, 0] = torch.nan
    tensors["latents"][-1, 0, -1, -1] = torch.inf
    return tensors


REGIMES = (
    Regime("dithered", dithered),
    Regime("constants", near_constants, "worst element"),
    Regime("adversarial", extreme, "worst element"),
    Regime("special", special, "worst element", differentiable=False),
)


def _first_without_text(tensors: Tensors) -> Tensors:
    mask = tensors["encoder_attention_mask"].clone()
    mask[:1] = False
    return {"encoder_attention_mask": mask}


TRAITS = (
    Trait("0", "values of timesteps", lambda tensors: model_states.full(tensors, "timesteps", 0.0)),
    Trait("1", "values of timesteps", lambda tensors: model_states.full(tensors, "timesteps", 1.0)),
    Trait("all", "what may be looked at", lambda tensors: model_states.full(tensors, MASK.name, True)),
    Trait("nothing by the first", "what may be looked at", _first_without_text),
)


def extents(parameters: Parameters) -> list[tuple[int, int]]:
    """Height and width of each level, odd ones rounded up."""
    config = configuration(parameters)
    height, width = parameters["height"], parameters["width"]
    return [(-(-height >> level), -(-width >> level)) for level in range(config.num_levels)]


def flops(parameters: Parameters) -> float:
    """Convolutions and matrix products of pixels, of the text, and of what steers the blocks; and attention."""
    config = configuration(parameters)
    pixels = [height * width for height, width in extents(parameters)]
    total = 0.0
    for name, shape in state_shapes(config).items():
        level = level_of(name, config)
        places = pixels[level]
        if "embedding" in name or "time_emb_proj" in name:
            places = 1
        elif "attn2.to_k" in name or "attn2.to_v" in name:
            places = parameters["text_length"]
        elif "downsamplers" in name:
            places = pixels[level + 1]
        elif "upsamplers" in name:
            places = pixels[level - 1]
        total += model_states.product_flops(shape, places)
        if name.endswith(("attn1.to_q.weight", "attn2.to_q.weight")):
            seen = pixels[level] if "attn1" in name else parameters["text_length"]
            total += 4.0 * pixels[level] * seen * shape[0]
    return parameters["batch_size"] * total


def level_of(name: str, config: UNetConfig) -> int:
    """The level that a parameter is of."""
    part, _, rest = name.partition(".")
    if part == "mid_block":
        return config.num_levels - 1
    if part not in ("down_blocks", "up_blocks"):
        return 0
    index = int(rest.partition(".")[0])
    return index if part == "down_blocks" else config.num_levels - 1 - index


def moved(parameters: Parameters, itemsize: int) -> float:
    """Parameters, latents, text and result, once each."""
    config = configuration(parameters)
    pixels = (config.in_channels + config.out_channels) * parameters["height"] * parameters["width"]
    text = parameters["text_length"] * config.cross_attention_dim + parameters.get("text_embed_dim", 0)
    return itemsize * (model_states.moved(state_shapes(config)) + parameters["batch_size"] * (pixels + text))


RESNET = "state/mid_block.resnets.0.conv1.weight"
NAME = RESNET.removeprefix("state/")
REJECTIONS = (
    Rejection(
        "a parameter too many", "mid_block.resnets.9.conv1", lambda call: {RESNET.replace("resnets.0", "resnets.9"): call[RESNET]}
    ),
    Rejection("a parameter of another shape", NAME, changed(RESNET, lambda each: each[:-1])),
    Rejection("a matrix in place of a kernel", NAME, changed(RESNET, lambda each: each[:, :, 0, 0])),
    Rejection("latents of other channels", "latents", changed("latents", lambda each: each.repeat(1, 2, 1, 1))),
    Rejection("latents without a row", "latents", changed("latents", lambda each: each[:, :, :0])),
    Rejection("times that cannot tell 998 from 999", "timesteps", changed("timesteps", lambda each: each.bfloat16())),
    Rejection("a mask of numbers", MASK.name, changed(MASK.name, lambda each: each.float())),
)
