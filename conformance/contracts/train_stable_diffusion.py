"""Contract of the Stable Diffusion training step: state, images and captions in, state and metrics out."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import model_states, training_runs
from gaugeblock.conformance.contracts import unet as of_unet
from gaugeblock.conformance.contracts.training_runs import EMAS, GRADIENT_SIZE, one_element
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Recurrence, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import edges, either
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors
from gaugeblock.reference.configs import (
    CLIP_TEXT_PRESETS,
    DIFFUSION_SCHEDULE_PRESETS,
    UNET_PRESETS,
    VAE_PRESETS,
    CLIPTextConfig,
    StableDiffusionConfig,
    UNetConfig,
    VAEConfig,
)
from gaugeblock.reference.torch import train_stable_diffusion, training


@row
def train_step() -> Contract:
    """The row of `train_stable_diffusion.train_step`."""
    return Contract(
        name="train_stable_diffusion.train_step",
        summary="One update of Stable Diffusion 1, 2 or XL: VAE, captions, noise, min-SNR weights, clipping, AdamW.",
        formula=(
            "loss = mean over b of weight(t) * mean of (unet(sqrt(a) latents[b] + sqrt(1 - a) noise, t, text[b], pooled[b], "
            "time_ids[b]) - target)**2, where a = alphas_cumprod[t], latents are drawn from vae(images[b]) and scaled, text and "
            "pooled are those of the text encoders or 0, and what is random is drawn by (seed, step, example_ids[b]); then as "
            "train_image_diffusion.train_step"
        ),
        source=(
            "Rombach et al. 2022 (arXiv:2112.10752) section 3.3; Podell et al. 2023 (arXiv:2307.01952) section 2; Hang et al. "
            "2023 (arXiv:2303.09556) section 3.4"
        ),
        reference=train_stable_diffusion.train_step,
        inputs=(
            Input("state", leaves=state_leaves),
            Input("frozen", leaves=frozen_leaves),
            Input("images", ("num_steps", "batch_size", "image_channels", "height", "width")),
            Input("input_ids", ("num_steps", "batch_size", "num_encoders", "num_tokens"), dtype="int64", indexes="vocab_size"),
            Input("time_ids", ("num_steps", "batch_size", "num_time_ids")),
            Input("example_ids", ("num_steps", "batch_size"), dtype="int64"),
        ),
        outputs=(Output("new_state", leaves=state_leaves), Output("metrics", leaves=metrics_leaves)),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(1, 3, "one encoder", timestep_bias="earlier", snr_gamma=5.0, input_perturbation=0.5, accumulation_steps=2),
            sizes(1, 3, "xl", train_text_encoder=True, schedule="zero-snr", snr_gamma=0.5, noise_offset=0.5, ema="growing"),
            sizes(1, 4, "xl", schedule="sample", text_dropout=0.5, timestep_bias="range", ema="capped", run_seed=2**40 + 5),
        ),
        factors=FACTORS,
        build=sizes,
        regimes=(
            Regime("under way", under_way, differentiable=False),
            Regime("fresh", fresh, differentiable=False),
        ),
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("sd-1.5/512px-batch-4", published(4, "SD-1.5", 512), SD_1),
            Workload("sdxl-base/1024px-batch-1", published(1, "SDXL-base", 1024), SDXL),
            Workload("two-cores/part-of-sd-1.5-128px", published(1, "part of SD-1.5", 128), "a size for a CPU"),
            Workload("two-cores/part-of-sd-1.5-256px", published(2, "part of SD-1.5", 256), "activations outweigh states"),
            Workload(
                "two-cores/part-of-sd-1.5-recomputed",
                published(2, "part of SD-1.5", 256) | {"activation_checkpointing": True},
                "as above; Chen et al. 2016 (arXiv:1604.06174), section 4.1",
            ),
            Workload("two-cores/part-of-sdxl-128px", published(1, "part of SDXL", 128), "a size for a CPU"),
        ),
        configure=lambda parameters: {"config": config(parameters)},
        dtypes=("float32",),
        cases=0.05,  # a budget with the gradients of all parameters takes about a second
        formulas=(training_runs.with_weighted_averages(train_stable_diffusion.train_step),),
        recurrence=Recurrence(steps="num_steps", carried={"state": "new_state"}),
        microbatches="accumulation_steps",
        shardings={"data_parallel": {"batch_size": "uneven"}},
        rejections=REJECTIONS,
        implementations=(
            distributed("fsdp2", devices=DEVICES, world_sizes=(1, 2)),  # tests have 4
            # each number of devices takes a compilation
            distributed("jax-sharded", framework="jax", world_sizes=(4,)),
        ),
        without={
            "batch_invariance": "the loss is that of a whole batch",
            "nan_containment": "a batch with a NaN is rejected as a whole",
            "empty_and_one": "a batch without examples is rejected",
            "grad_modes": "a training step takes gradients, which inference_mode rules out",
        },
    )  # fmt: skip


SD_1, SDXL = "Stable Diffusion 1.5 and its VAE and text encoder", "Stable Diffusion XL 1.0 and its VAE and text encoders"
OF_RUN = """train_text_encoder text_dropout snr_gamma timestep_bias bias_multiplier bias_begin bias_end noise_offset
    input_perturbation accumulation_steps activation_checkpointing learning_rate adam_epsilon weight_decay max_gradient_norm beta1
    beta2""".split()
SCHEDULES = {
    "epsilon": DIFFUSION_SCHEDULE_PRESETS["stable-diffusion-1"],
    "sample": replace(DIFFUSION_SCHEDULE_PRESETS["stable-diffusion-1"], prediction_type="sample"),
    "v_prediction": DIFFUSION_SCHEDULE_PRESETS["stable-diffusion-2.1"],
    "zero-snr": DIFFUSION_SCHEDULE_PRESETS["zero-snr"],
}

_VAE = VAEConfig(
    in_channels=1, latent_channels=2, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2,
    mid_block_add_attention=False, scaling_factor=0.25,
)  # fmt: skip
_CLIP = CLIPTextConfig(
    vocab_size=12, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=6
)
_BEFORE_LAST = replace(_CLIP, returned_layer=-2, normalize_returned=False)
_UNET = UNetConfig(
    in_channels=2, out_channels=2, block_out_channels=(4,), down_block_types=("DownBlock2D",), layers_per_block=1,
    transformer_layers_per_block=(1,), attention_head_dim=(2,), cross_attention_dim=4, norm_num_groups=2,
    use_linear_projection=True,
)  # fmt: skip
_SHORT: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 4096, "eos_token_id": 5}
MODELS: dict[str, dict[str, Any]] = {
    "one encoder": {"vae": _VAE, "unet": _UNET, "text_encoders": (replace(_CLIP, eos_token_id=5),)},
    # both encoders are as wide as what either pools: whoever takes one for the other is not told so by a shape
    "xl": {
        "vae": _VAE,
        "unet": replace(
            _UNET, cross_attention_dim=8, addition_time_embed_dim=4, projection_class_embeddings_input_dim=4 + 2 * 4
        ),
        "text_encoders": (_BEFORE_LAST, replace(_BEFORE_LAST, hidden_act="gelu", eos_token_id=5, projection_dim=4)),
    },
    "SD-1.5": {
        "vae": VAE_PRESETS["stable-diffusion-1"], "unet": UNET_PRESETS["SD-1.5"], "text_encoders": (CLIP_TEXT_PRESETS["clip-l"],)
    },
    "SDXL-base": {
        "vae": VAE_PRESETS["stable-diffusion-xl"],
        "unet": UNET_PRESETS["SDXL-base"],
        "text_encoders": (
            replace(CLIP_TEXT_PRESETS["clip-l"], returned_layer=-2, normalize_returned=False), CLIP_TEXT_PRESETS["openclip-bigg"]
        ),
    },
    "part of SD-1.5": {
        "vae": replace(VAE_PRESETS["stable-diffusion-1"], block_out_channels=(32, 32, 32, 32)),
        "unet": replace(
            UNET_PRESETS["SD-1.5"], block_out_channels=(128,) * 4, attention_head_dim=(4,) * 4, layers_per_block=1
        ),
        "text_encoders": (replace(CLIP_TEXT_PRESETS["clip-l"], **_SHORT),),
    },
    "part of SDXL": {
        "vae": replace(VAE_PRESETS["stable-diffusion-xl"], block_out_channels=(32, 32, 32, 32)),
        "unet": replace(
            of_unet.PART_OF_SDXL, block_out_channels=(64, 64, 128), attention_head_dim=(1, 1, 2),
            transformer_layers_per_block=(1, 1, 2),
        ),
        "text_encoders": (
            replace(CLIP_TEXT_PRESETS["clip-l"], returned_layer=-2, normalize_returned=False, **_SHORT),
            replace(CLIP_TEXT_PRESETS["openclip-bigg"], **_SHORT),
        ),
    },
}  # fmt: skip


def sizes(num_steps: int = 1, batch_size: int = 3, model: str = "xl", **others: Any) -> dict[str, Any]:
    """One point of the input space; all that is not given has an ordinary value.

    `adam_epsilon` is of the gradients' size: with the usual 1e-8, Adam's first update is the gradient's sign, which says
    nothing of its magnitude.
    """
    ordinary = {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "model": model,
        "height": 3,
        "width": 2,
        "num_tokens": 4,
        "schedule": "epsilon",
        "train_text_encoder": False,
        "accumulation_steps": 1,
        "activation_checkpointing": False,
        "run_seed": 0,
        "text_dropout": 0.3,
        "snr_gamma": None,
        "timestep_bias": "none",
        "bias_multiplier": 8.0,
        "bias_begin": 600,
        "bias_end": 900,
        "noise_offset": 0.0,
        "input_perturbation": 0.0,
        "ema": "none",
        "learning_rate": 2**-5,
        "beta1": 1 - 2**-3,
        "beta2": 1 - 2**-10,
        "adam_epsilon": 2**-8,
        "weight_decay": 2**-3,
        "max_gradient_norm": 0.25,
    }
    of_model = StableDiffusionConfig(**MODELS[model])
    told = {
        "image_channels": MODELS[model]["vae"].in_channels,
        "num_encoders": len(of_model.text_encoders),
        "vocab_size": of_model.text_encoders[0].vocab_size,
        "num_time_ids": of_model.num_time_ids,
    }
    return ordinary | told | others


def published(batch_size: int, model: str, pixels: int) -> dict[str, Any]:
    """A step on square images and captions of CLIP's length."""
    return sizes(1, batch_size, model, height=pixels, width=pixels, num_tokens=77)


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Small models, few steps, batches that microbatches divide unevenly; every option at its ends and between."""
    schedule = draw(st.sampled_from(list(SCHEDULES)))
    return sizes(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["one encoder", "xl"])),
        schedule=schedule,
        accumulation_steps=draw(st.integers(1, 2)),
        activation_checkpointing=draw(st.booleans()),
        train_text_encoder=draw(st.booleans()),
        text_dropout=draw(st.sampled_from([0.0, 0.5, 1.0])),
        snr_gamma=draw(st.sampled_from([None, 0.5, 5.0])),
        timestep_bias=draw(st.sampled_from(["none", "earlier", "later", "range"])),
        noise_offset=draw(st.sampled_from([0.0, 0.5])),
        input_perturbation=draw(st.sampled_from([0.0, 0.5])),
        ema=draw(st.sampled_from(list(EMAS))),
    )


FACTORS = (
    edges("batch_size", 1, 3),
    either("schedule", *SCHEDULES),
    either("snr_gamma", None, 0.5, 5.0),
    either("model", "one encoder", "xl"),
    either("train_text_encoder", False, True),
)


def config(parameters: Parameters) -> StableDiffusionConfig:
    """The run that the parameters describe."""
    of_run = {name: parameters[name] for name in OF_RUN}
    of_model, schedule = MODELS[parameters["model"]], SCHEDULES[parameters["schedule"]]
    return StableDiffusionConfig(
        **of_model, **of_run, schedule=schedule, seed=parameters["run_seed"], ema=EMAS[parameters["ema"]]
    )


def state_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """The tensors of a run's state."""
    run = config(parameters)
    unused, shapes = train_stable_diffusion.unused_names(run), train_stable_diffusion.state_shapes(run)
    names = {
        f"{part}.{name}": shape
        for part in run.parts
        for name, shape in shapes.items()
        if part in ("model", "ema") or name not in unused
    }
    return model_states.leaves(names) | {"step": Input("step", dtype="int64")}


def frozen_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """What is not trained."""
    return model_states.leaves(train_stable_diffusion.frozen_shapes(config(parameters)))


def metrics_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """What each step reports."""
    return {name: Input(name, ("num_steps",)) for name in ("loss", "gradient_norm")}


def flops(parameters: Parameters) -> float:
    """Three forward passes of the UNet a step, whose kernels and matrices all latents' pixels meet at least once a block.

    A lower bound: that pixels are four times as many at each level above is left out.
    """
    run = config(parameters)
    assert run.vae is not None
    least = run.vae.downsampling * 2 ** (run.unet.num_levels - 1)
    places = max(1, parameters["height"] // least) * max(1, parameters["width"] // least)
    shapes = train_stable_diffusion.state_shapes(run)
    products = sum(model_states.product_flops(shape, places) for name, shape in shapes.items() if "embed" not in name)
    return 3.0 * parameters["num_steps"] * parameters["batch_size"] * products


def moved(parameters: Parameters, itemsize: int) -> float:
    """The state read and written once a step, what is frozen, and the images."""
    run = config(parameters)
    trained = model_states.moved(train_stable_diffusion.state_shapes(run))
    frozen = model_states.moved(train_stable_diffusion.frozen_shapes(run))
    pixels = parameters["batch_size"] * parameters["image_channels"] * parameters["height"] * parameters["width"]
    return float(itemsize * parameters["num_steps"] * (6 * trained + frozen + pixels))


def _drawn(draw: Draw, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Parameters of a model that has been trained."""
    drawn = model_states.drawn(draw, shapes, tables=("_embedding.weight",), around_one=("norm",))
    return {name.removeprefix("state/"): each for name, each in drawn.items()}


def _batches(draw: Draw, parameters: Parameters) -> Tensors:
    """Random images and captions; the last example of a batch has the id of the first, as when data are repeated, and so its
    draws."""
    steps, batch, tokens = (parameters[name] for name in ("num_steps", "batch_size", "num_tokens"))
    example_ids = draw.integers(0, 2**32, steps, batch)
    example_ids[:, -1] = example_ids[:, 0]
    input_ids = draw.integers(6, parameters["vocab_size"], steps, batch, parameters["num_encoders"], tokens)
    input_ids[..., tokens // 2] = 5  # ends the caption
    return {
        "images": draw.normal(steps, batch, parameters["image_channels"], parameters["height"], parameters["width"]),
        "input_ids": input_ids,
        "time_ids": draw.integers(0, 1025, steps, batch, parameters["num_time_ids"]).double(),
        "example_ids": example_ids,
    }


def _run(draw: Draw, parameters: Parameters, moments: Tensors, squares: Tensors, step: int) -> Tensors:
    """A state with these moments; the average is of other parameters."""
    run = config(parameters)
    shapes = train_stable_diffusion.state_shapes(run)
    parts = {"model": _drawn(draw, shapes), "exp_avg": moments, "exp_avg_sq": squares}
    if run.ema is not None:
        parts["ema"] = _drawn(draw, shapes)
    frozen = _drawn(draw, train_stable_diffusion.frozen_shapes(run))
    for name in ("vae.quant_conv.weight", "vae.quant_conv.bias"):  # the deviation of latents is not 1, and not far from it
        frozen[name] = frozen[name] - (0.5 if name.endswith("bias") else 0.0)
    return {
        **{f"state/{name}": tensor for name, tensor in training.join_state(parts, torch.tensor(step)).items()},
        **{f"frozen/{name}": tensor for name, tensor in frozen.items()},
        **_batches(draw, parameters),
    }


def _trained_shapes(parameters: Parameters) -> Mapping[str, tuple[int, ...]]:
    run = config(parameters)
    unused = train_stable_diffusion.unused_names(run)
    return {name: shape for name, shape in train_stable_diffusion.state_shapes(run).items() if name not in unused}


def under_way(draw: Draw, parameters: Parameters) -> Tensors:
    """The middle of a run: moments as large as gradients, all second ones positive."""
    shapes = _trained_shapes(parameters)
    moments = {name: GRADIENT_SIZE * draw.normal(*shape) for name, shape in shapes.items()}
    squares = {name: GRADIENT_SIZE**2 * (0.5 + draw.uniform(*shape)) for name, shape in shapes.items()}
    return _run(draw, parameters, moments, squares, int(draw.integers(1, 1000, 1)))


def fresh(draw: Draw, parameters: Parameters) -> Tensors:
    """The first steps of a run, where the corrections of Adam's moments are largest."""
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in _trained_shapes(parameters).items()}
    return _run(draw, parameters, zeros, {name: each.clone() for name, each in zeros.items()}, 0)


BIAS, KERNEL = "state/model.unet.conv_out.bias", "frozen/vae.encoder.conv_in.weight"
REJECTIONS = (
    Rejection("a NaN in an image", "loss", changed("images", one_element(torch.nan)), raises=(FloatingPointError,)),
    Rejection("an infinite parameter", "loss", changed(BIAS, one_element(math.inf)), raises=(FloatingPointError,)),
    Rejection("a NaN in what is frozen", "loss", changed(KERNEL, one_element(math.nan)), raises=(FloatingPointError,)),
    Rejection("images without a row", "images", changed("images", lambda each: each[..., :0, :])),
    Rejection("a batch without examples", "images", lambda call: {
        name: call[name][:, :0] for name in ("images", "input_ids", "time_ids", "example_ids")
    }),
    Rejection("a caption for an encoder more", "input_ids", changed("input_ids", lambda each: each.repeat(1, 1, 2, 1))),
    Rejection("a caption longer than its encoder knows", "input_ids", changed("input_ids", lambda each: each.repeat(1, 1, 1, 2))),
    Rejection("a caption that does not end", "input_ids", changed("input_ids", lambda each: each * 0 + 7), by_values=True),
    Rejection("a number more", "time_ids", changed("time_ids", lambda each: torch.cat([each, each[..., :1] * 0], -1)
                                                   if each.shape[-1] else each.new_zeros(*each.shape[:-1], 1))),
    Rejection("a state without its step", "step", changed("state/step", lambda each: None)),
    Rejection("a parameter of another shape", "model.unet.conv_out.bias", changed(BIAS, lambda each: each[:-1])),
    Rejection("what is frozen in half its width", "vae.encoder.conv_in.weight", changed(KERNEL, torch.Tensor.half)),
    Rejection("integer moments", "exp_avg.unet.conv_out.bias", lambda call: {
        "state/exp_avg.unet.conv_out.bias": call[BIAS].long()
    }),
)  # fmt: skip
