"""The contracts of AutoencoderKL: its encoder and its decoder."""

from dataclasses import fields
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
from gaugeblock.reference.configs import VAE_PRESETS, VAEConfig
from gaugeblock.reference.torch import vae as model


@row
def encode() -> Contract:
    """The row of `vae.encode`."""
    return Contract(
        name="vae.encode",
        summary="Mean and log variance of the latents of images, by residual blocks of convolutions at ever lower resolution.",
        formula=(
            "x = convolution(images); x = down_block(x), one for each resolution; x = mid_block(x); "
            "mean, logvar = halves of quant_conv(convolution(silu(group_norm(x)))), logvar clamped to [-30, 20]"
        ),
        source="Rombach et al. 2021 (arXiv:2112.10752), section 3.1; diffusers models/autoencoders/autoencoder_kl.py, encode",
        reference=model.encode,
        inputs=(
            Input("state", leaves=encoder_leaves, differentiable=True),
            Input("images", ("batch_size", "in_channels", "height", "width"), differentiable=True),
        ),
        outputs=(
            Output("mean", ("batch_size", "latent_channels", "latent_height", "latent_width"), differentiable=True),
            Output("logvar", ("batch_size", "latent_channels", "latent_height", "latent_width"), differentiable=True),
        ),
        options=("config",),
        batch="batch_size",
        parameters=encoder_parameters,
        landmarks=(
            of_images(3, 6, 5, tiny_model()),
            of_images(2, 7, 4, tiny_model((4, 8, 8), 2, latent_channels=4, in_channels=1)),
            of_images(1, 2, 3, tiny_model((8,), 2, layers_per_block=2, latent_channels=5, use_quant_conv=False)),
        ),
        factors=(*FACTORS, Factor("places", str, values=PLACES, of=_places_of_images), either("use_quant_conv", True, False)),
        build=image_point,
        traits=(Trait("of one color", "values of images", lambda tensors: one_value_first(tensors, "images", -1.0)),),
        regimes=(
            Regime("dithered", lambda draw, sizes: encoder_inputs(draw, sizes)),
            Regime("constants", encoder_near_constants, "worst element"),
            Regime("adversarial", lambda draw, sizes: extreme(encoder_inputs(draw, sizes), "images"), "worst element"),
            Regime("special", lambda draw, sizes: special(encoder_inputs(draw, sizes)), "worst element", differentiable=False),
        ),
        rounded_as=flash_attention.of(model.encode, model),
        cases=CASES,
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=encoder_flops,
        moved=lambda parameters, itemsize: moved(model.encoder_shapes(configuration(parameters)), parameters, itemsize, 2),
        rigid=True,
        workloads=(
            Workload("stable-diffusion/512px", of_images(1, 512, 512, STABLE_DIFFUSION), SOURCE),
            Workload("flux/1024px", of_images(1, 1024, 1024, VAE_PRESETS["flux"]), SOURCE_OF_FLUX),
            Workload("two-cores/stable-diffusion-64px", of_images(1, 64, 64, STABLE_DIFFUSION), "a size for a CPU"),
        ),
        rejections=(
            *rejections("encoder.conv_in.weight"),
            Rejection("images of another number of channels", "images", changed("images", lambda each: each.repeat(1, 2, 1, 1))),
            Rejection("images without a row", "images", changed("images", lambda each: each[:, :, :0])),
        ),
        shardings=model_states.SHARDINGS,
        implementations=ours("encode"),
    )


@row
def decode() -> Contract:
    """The row of `vae.decode`."""
    return Contract(
        name="vae.decode",
        summary="The images of latents, by residual blocks of convolutions at ever higher resolution.",
        formula=(
            "x = convolution(post_quant_conv(latents)); x = mid_block(x); x = up_block(x), one for each resolution; "
            "out = convolution(silu(group_norm(x)))"
        ),
        source="Rombach et al. 2021 (arXiv:2112.10752), section 3.1; diffusers models/autoencoders/autoencoder_kl.py, decode",
        reference=model.decode,
        inputs=(
            Input("state", leaves=decoder_leaves, differentiable=True),
            Input("latents", ("batch_size", "latent_channels", "latent_height", "latent_width"), differentiable=True),
        ),
        outputs=(Output("out", ("batch_size", "out_channels", "height", "width"), differentiable=True),),
        options=("config",),
        batch="batch_size",
        parameters=decoder_parameters,
        landmarks=(
            of_latents(3, 3, 2, tiny_model()),
            of_latents(2, 1, 2, tiny_model((4, 8, 8), 2, latent_channels=4, out_channels=1)),
            of_latents(1, 2, 3, tiny_model((8,), 2, layers_per_block=2, latent_channels=5, use_post_quant_conv=False)),
        ),
        factors=(*FACTORS, Factor("places", str, values=PLACES, of=_places), either("use_post_quant_conv", True, False)),
        build=latent_point,
        traits=(Trait("the same everywhere", "values of latents", lambda tensors: one_value_first(tensors, "latents", 1.0)),),
        regimes=(
            Regime("dithered", lambda draw, sizes: decoder_inputs(draw, sizes)),
            Regime("constants", lambda draw, sizes: small(decoder_inputs(draw, sizes), "latents"), "worst element"),
            Regime("adversarial", lambda draw, sizes: extreme(decoder_inputs(draw, sizes), "latents"), "worst element"),
            Regime("special", lambda draw, sizes: special(decoder_inputs(draw, sizes)), "worst element", differentiable=False),
        ),
        rounded_as=flash_attention.of(model.decode, model),
        cases=CASES,
        configure=lambda parameters: {"config": configuration(parameters)},
        flops=decoder_flops,
        moved=lambda parameters, itemsize: moved(model.decoder_shapes(configuration(parameters)), parameters, itemsize, 1),
        rigid=True,
        workloads=(
            Workload("stable-diffusion/512px", of_latents(1, 64, 64, STABLE_DIFFUSION), SOURCE),
            Workload("flux/1024px", of_latents(1, 128, 128, VAE_PRESETS["flux"]), SOURCE_OF_FLUX),
            Workload("two-cores/stable-diffusion-40px", of_latents(1, 5, 5, STABLE_DIFFUSION), "a size for a CPU"),
        ),
        rejections=(
            *rejections("decoder.conv_in.weight"),
            Rejection("latents of another number of channels", "latents", changed("latents", lambda each: each[:, :-1])),
            Rejection("latents without a row", "latents", changed("latents", lambda each: each[:, :, :0])),
        ),
        shardings=model_states.SHARDINGS,
        implementations=ours("decode"),
    )


CASES = 0.2  # a budget with the gradients of all parameters takes about a second
STABLE_DIFFUSION = VAE_PRESETS["stable-diffusion-1"]
SOURCE = "Rombach et al. 2021 (arXiv:2112.10752), Stable Diffusion 1: an f = 8 autoencoder of images of 512 pixels"
SOURCE_OF_FLUX = "black-forest-labs FLUX.1, vae/config.json"
NORM_SCALES = ("norm1.weight", "norm2.weight", "group_norm.weight", "conv_norm_out.weight")


def ours(operation: str) -> tuple[Implementation, ...]:
    """Our versions of an operation."""
    return (
        *model_states.on_one_device("vae", operation),
        model_states.fsdp2(operation),
        model_states.jax_sharded(f"sharded_vae:{operation}", only="norm_num_groups % 4 == 0"),
    )


def configuration(parameters: Parameters) -> VAEConfig:
    """The model at given parameters."""
    return VAEConfig(**{field.name: parameters[field.name] for field in fields(VAEConfig)})


def encoder_leaves(parameters: Parameters) -> dict[str, Input]:
    """The encoder's parameters."""
    return model_states.leaves(model.encoder_shapes(configuration(parameters)))


def decoder_leaves(parameters: Parameters) -> dict[str, Input]:
    """The decoder's parameters."""
    return model_states.leaves(model.decoder_shapes(configuration(parameters)))


def encoder_flops(parameters: Parameters) -> float:
    """Convolutions and matrix products at their resolutions, and attention."""
    config = configuration(parameters)
    levels = {f"encoder.down_blocks.{index}.": index for index in range(len(config.block_out_channels))} | {"encoder.conv_in": 0}
    halvings = {".downsamplers.0.": 1}  # its result has the next resolution
    return products(model.encoder_shapes(config), parameters, levels, halvings)


def decoder_flops(parameters: Parameters) -> float:
    """Convolutions and matrix products at their resolutions, and attention."""
    config = configuration(parameters)
    lowest = len(config.block_out_channels) - 1
    levels = {f"decoder.up_blocks.{index}.": lowest - index for index in range(lowest + 1)} | {"decoder.conv_out": 0}
    return products(model.decoder_shapes(config), parameters, levels, {".upsamplers.0.": -1})


def products(shapes: model_states.Shapes, parameters: Parameters, levels: dict[str, int], changes: dict[str, int]) -> float:
    """Those of all parameters, which are multiplied at the lowest resolution if not at that of a part of their names."""
    config = configuration(parameters)
    lowest = len(config.block_out_channels) - 1
    total = 0.0
    for name, shape in shapes.items():
        level = next((level for part, level in levels.items() if name.startswith(part)), lowest)
        level += next((change for part, change in changes.items() if part in name), 0)
        places = (parameters["height"] >> level) * (parameters["width"] >> level)
        total += model_states.product_flops(shape, places)
    seen = parameters["latent_height"] * parameters["latent_width"]
    attention = 4.0 * seen**2 * config.block_out_channels[-1] * config.mid_block_add_attention
    return float(parameters["batch_size"] * (total + attention))


def moved(shapes: model_states.Shapes, parameters: Parameters, itemsize: int, latents: int) -> float:
    """Bytes of parameters, images, and latents so many times."""
    channels = parameters["in_channels"] if latents == 2 else parameters["out_channels"]
    pixels = channels * parameters["height"] * parameters["width"]
    places = latents * parameters["latent_channels"] * parameters["latent_height"] * parameters["latent_width"]
    return itemsize * (model_states.moved(shapes) + parameters["batch_size"] * (pixels + places))


def of_images(batch_size: int, height: int, width: int, config: VAEConfig) -> dict[str, Any]:
    """One point of the encoder's input space."""
    latents = {"latent_height": height // config.downsampling, "latent_width": width // config.downsampling}
    return {"batch_size": batch_size, **vars(config), "height": height, "width": width, **latents}


def of_latents(batch_size: int, height: int, width: int, config: VAEConfig) -> dict[str, Any]:
    """One point of the decoder's input space, with so many places of latents."""
    return of_images(batch_size, height * config.downsampling, width * config.downsampling, config)


def tiny_model(block_out_channels: tuple[int, ...] = (8, 12), norm_num_groups: int = 4, **others: Any) -> VAEConfig:
    """A model small enough for a CPU, groups of few channels as in published ones."""
    return VAEConfig(
        block_out_channels=block_out_channels,
        norm_num_groups=norm_num_groups,
        layers_per_block=others.pop("layers_per_block", 1),
        in_channels=others.pop("in_channels", 3),
        out_channels=others.pop("out_channels", 3),
        latent_channels=others.pop("latent_channels", 2),
        **others,
    )


CHANNELS = (((8, 12), 4), ((8,), 2), ((4, 8, 8), 2), ((6, 9), 3), ((4, 4), 1))
PLACES = ((2, 3), (1, 1), (3, 2), (1, 4), (2, 2))
COLORS = (3, 1, 2)
FACTORS = (
    edges("batch_size", 1, 2, 3),
    Factor(
        "channels",
        str,
        values=CHANNELS,
        of=lambda sizes: (tuple(sizes["block_out_channels"]), sizes["norm_num_groups"]),
    ),
    edges("layers_per_block", 1, 2),
    edges("latent_channels", 1, 2, 4),
    edges("colors", *sorted(COLORS), of=lambda sizes: sizes["in_channels"]),
    either("mid_block_add_attention", True, False),
)


def _places(sizes: Parameters) -> tuple[int, int]:
    return sizes["latent_height"], sizes["latent_width"]


def _places_of_images(sizes: Parameters) -> tuple[int, int]:
    downsampling = configuration(sizes).downsampling
    return sizes["height"] // downsampling, sizes["width"] // downsampling


def latent_point(
    batch_size: int, channels: tuple[tuple[int, ...], int], places: tuple[int, int], colors: int, **others: Any
) -> dict[str, Any]:
    """The decoder's point with these values of the factors."""
    return of_latents(batch_size, *places, tiny_model(*channels, in_channels=colors, out_channels=colors, **others))


def image_point(batch_size: int, places: tuple[int, int], **others: Any) -> dict[str, Any]:
    """The encoder's, whose images have a row more than they need, where there is one to lose."""
    point = latent_point(batch_size, places=places, **others)
    config = configuration(point)
    return of_images(batch_size, point["height"] + (config.downsampling > 1), point["width"], config)


@st.composite
def encoder_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models, images of odd and even sizes."""
    sizes = draw(decoder_parameters())
    config = configuration(sizes)
    rest = [draw(st.integers(0, config.downsampling - 1)) for _ in range(2)]
    config = tiny_model(**{**vars(config), "use_quant_conv": draw(st.booleans())})
    return of_images(sizes["batch_size"], sizes["height"] + rest[0], sizes["width"] + rest[1], config)


@st.composite
def decoder_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models of one to three resolutions, and latents of few places."""
    return latent_point(
        batch_size=draw(st.sampled_from([1, 2, 3])),
        channels=draw(st.sampled_from(CHANNELS)),
        places=draw(st.sampled_from(PLACES)),
        colors=draw(st.sampled_from(COLORS)),
        layers_per_block=draw(st.sampled_from([1, 2])),
        latent_channels=draw(st.sampled_from([1, 2, 3, 4])),
        mid_block_add_attention=draw(st.booleans()),
        use_post_quant_conv=draw(st.booleans()),
    )


def encoder_inputs(draw: Draw, parameters: Parameters) -> Tensors:
    """Random images and weights scaled by fan-in, none of them 0."""
    state = model_states.drawn(draw, model.encoder_shapes(configuration(parameters)), around_one=NORM_SCALES)
    shape = (parameters[name] for name in ("batch_size", "in_channels", "height", "width"))
    return {**state, "images": draw.normal(*shape)}


def decoder_inputs(draw: Draw, parameters: Parameters) -> Tensors:
    """Random latents and weights scaled by fan-in, none of them 0."""
    state = model_states.drawn(draw, model.decoder_shapes(configuration(parameters)), around_one=NORM_SCALES)
    shape = (parameters[name] for name in ("batch_size", "latent_channels", "latent_height", "latent_width"))
    return {**state, "latents": draw.normal(*shape)}


def small(tensors: Tensors, inputs: str) -> Tensors:
    """Where eps counts: the variance that every GroupNorm sees stays near it.

    What enters the residual stream is small, and so is what leaves a branch and what lies between its convolutions.
    """
    tensors[inputs] *= 2.0**-10
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix("state/").rpartition(".")
        if (kind == "bias" and "norm" not in module) or module.endswith((".conv1", ".conv2", ".to_out.0")):
            tensor *= 2.0**-10
    return tensors


def encoder_near_constants(draw: Draw, parameters: Parameters) -> Tensors:
    """As `small`, and log variances below -30, above 20, and between."""
    config = configuration(parameters)
    tensors = small(encoder_inputs(draw, parameters), "images")
    last = "quant_conv" if config.use_quant_conv else "encoder.conv_out"
    logvar = torch.tensor([-60.0, 60.0, 0.0, -25.0])[: config.latent_channels].to(torch.float64)
    tensors[f"state/{last}.bias"][config.latent_channels :][: len(logvar)] += logvar
    return tensors


def extreme(tensors: Tensors, inputs: str) -> Tensors:
    """Means of GroupNorm many deviations from 0; attention that picks single places; inputs from 2^-3 to 2^3."""
    batch_size = len(tensors[inputs])
    tensors[inputs] *= torch.exp2(torch.arange(batch_size, dtype=torch.float64) % 7 - 3)[:, None, None, None]
    for name, tensor in tensors.items():
        if name.endswith(("conv_in.bias", "conv1.bias")):
            tensor += 2.0**5
        elif name.endswith(("to_q.weight", "to_k.weight")):
            tensor *= 3
    return tensors


def special(tensors: Tensors) -> Tensors:
    """An example with a NaN and one with an infinity."""
    inputs = tensors["images" if "images" in tensors else "latents"]
    inputs[len(inputs) // 2, 0, 0, 0] = torch.nan
    inputs[-1, 0, -1, -1] = torch.inf
    return tensors


def one_value_first(tensors: Tensors, name: str, value: float) -> Tensors:
    """The first example has one value everywhere; the others are as they are."""
    changed_inputs = tensors[name].clone()
    changed_inputs[:1] = value
    return {name: changed_inputs}


def rejections(weight: str) -> tuple[Rejection, ...]:
    """States that fit another model."""
    key = f"state/{weight}"
    unknown = weight.replace("conv_in", "conv_on")
    return (
        Rejection("a parameter too many", unknown, lambda call: {f"state/{unknown}": call[key]}),
        Rejection("a kernel of another size", weight, changed(key, lambda each: each[:, :, :-1])),
        Rejection("a kernel flattened", weight, changed(key, lambda each: each.flatten(1))),
    )
