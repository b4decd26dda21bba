"""Contract of the image-diffusion training step of what is told texts: Flux, and an MMDiT, whose table of positions stays.

A UNet is told no pooled text, so that its call is another one: `train_stable_diffusion` has it in a row, and tests have it here.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import flash_attention, flux, mmdit, model_states, training_runs
from gaugeblock.conformance.contracts.training_runs import one_element
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Recurrence, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import edges, either
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors
from gaugeblock.reference.configs import MMDIT_PRESETS, FluxConfig, MMDiTConfig
from gaugeblock.reference.torch import flux as flux_model
from gaugeblock.reference.torch import image_models, train_image_diffusion
from gaugeblock.reference.torch import mmdit as mmdit_model


@row
def train_step_on_texts() -> Contract:
    """The row of `train_image_diffusion.train_step_on_texts`."""
    step = train_image_diffusion.train_step_on_texts
    return Contract(
        name="train_image_diffusion.train_step_on_texts",
        summary="One update of an image diffusion model that is told texts: as train_step, but what is dropped is told 0.",
        formula=(
            "as train_image_diffusion.train_step, of mmdit(state, (1 - t) images[b] + t noise, text, pooled text, 1000 t), where "
            "both texts are 0 if they are dropped, or of flux; what is frozen has no moments and stays"
        ),
        source="Esser et al. 2024 (arXiv:2403.03206) sections 2 and 4; Ho and Salimans 2022 (arXiv:2207.12598) algorithm 1",
        reference=step,
        rounded_as=with_flash_attention(step),
        formulas=(with_flash_attention(training_runs.with_weighted_averages(step)),),
        inputs=(
            Input("state", leaves=RUNS.state_leaves),
            Input("images", ("num_steps", "batch_size", "in_channels", "height", "width")),
            Input("encoder_hidden_states", ("num_steps", "batch_size", "num_text_tokens", "joint_attention_dim")),
            Input("pooled_projections", ("num_steps", "batch_size", "pooled_projection_dim")),
            Input("example_ids", ("num_steps", "batch_size"), dtype="int64"),
        ),
        outputs=(Output("new_state", leaves=RUNS.state_leaves), Output("metrics", leaves=training_runs.metrics_leaves)),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(  # JAX takes seconds to compile the step of each
            point(
                1,
                3,
                velocity="data - noise",
                label_dropout=0.5,
                ema="growing",
                accumulation_steps=2,
                rates="cosine",
            ),
            point(1, 2, "flux", label_dropout=0.5, optimizer="sgd"),
        ),
        factors=(*training_runs.FACTORS, edges("num_text_tokens", 1, 3), either("model", *TINY)),
        build=point,
        regimes=RUNS.regimes(),
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("sd3-medium/train-512px-batch-16", published(16, 32, "sd3-medium"), SD3),
            Workload("two-cores/train-narrow-sd3", published(2, 8, "narrow sd3"), "a size for a CPU; heads as published"),
            Workload(
                "narrow-sd3/train-recomputed",
                published(2, 8, "narrow sd3") | {"activation_checkpointing": True},
                "as above; Chen et al. 2016 (arXiv:1604.06174), section 4.1",
            ),
        ),
        configure=lambda parameters: {"config": RUNS.config(parameters)},
        dtypes=("float32",),
        cases=0.02,  # a budget with the moments of all parameters takes a second for each step and microbatch
        recurrence=Recurrence(steps="num_steps", carried={"state": "new_state"}),
        microbatches="accumulation_steps",
        shardings={"data_parallel": {"batch_size": "uneven"}},
        rejections=REJECTIONS,
        implementations=(
            distributed("fsdp2", devices=DEVICES, world_sizes=(2,)),
            # each number of devices takes a compilation: tests/test_train_on_ranks.py has others
            distributed("jax-sharded", framework="jax", world_sizes=(4,)),
        ),
        without=training_runs.WITHOUT
        | dict.fromkeys(SHARED, "judged of train_step, with which all but model and texts is shared"),
    )


SHARED = ("accumulation", "hidden_state", "layout", "process_settings", "same_pointer_new_data", "resume")
SD3 = "Esser et al. 2024 (arXiv:2403.03206), section 5.3; stabilityai/stable-diffusion-3-medium, config.json"


TINY: dict[str, MMDiTConfig | FluxConfig] = {
    "mmdit": mmdit.tiny_model(8, 2, 1, in_channels=2, out_channels=2, pos_embed_max_size=2),
    "mmdit with norms": mmdit.tiny_model(8, 2, 1, in_channels=2, out_channels=2, pos_embed_max_size=2, qk_norm="rms_norm"),
    "flux": flux.tiny_model(2, (2, 2, 4), in_channels=4 * 2),
}
MODELS = {
    **TINY,
    "sd3-medium": MMDIT_PRESETS["sd3-medium"],
    "narrow sd3": replace(
        MMDIT_PRESETS["sd3-medium"], num_layers=4, num_attention_heads=2, caption_projection_dim=128, pos_embed_max_size=8,
        joint_attention_dim=256, pooled_projection_dim=256,
    ),
}  # fmt: skip
PATCH = 2  # rows and columns of pixels in a patch of all of them


def published(batch_size: int, rows: int, model: str) -> dict[str, Any]:
    """Images of so many rows and columns of patches, and texts of 77 + 77 tokens."""
    return point(1, batch_size, model, (rows, rows), 154)


def point(
    num_steps: int, batch_size: int, model: str = "mmdit", patches: tuple[int, int] = (1, 2), num_text_tokens: int = 3,
    **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """One point of the input space; what is not given of a run has an ordinary value."""
    config, (height, width) = MODELS[model], (PATCH * number for number in patches)
    call = {"batch_size": batch_size, "num_text_tokens": num_text_tokens, "height": height, "width": width}
    channels = config.in_channels // PATCH**2 if isinstance(config, FluxConfig) else config.in_channels
    texts = {"joint_attention_dim": config.joint_attention_dim, "pooled_projection_dim": config.pooled_projection_dim}
    of_model = {"model": model, "in_channels": channels, **texts}
    return {**call, **of_model, **training_runs.ORDINARY, "num_steps": num_steps, **others}


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models, with and without norms of queries and keys, and texts of few tokens."""
    few = {"num_steps": draw(st.integers(1, 2)), "accumulation_steps": draw(st.integers(1, 2))}
    own = {"num_text_tokens": draw(st.integers(1, 3)), "model": draw(st.sampled_from(list(TINY)))}
    return point(**draw(training_runs.runs()) | few | own)


def with_flash_attention(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step with that of either model."""
    return flash_attention.of(flash_attention.of(step, mmdit_model), flux_model)


def model_config(parameters: Parameters) -> MMDiTConfig | FluxConfig:
    """The model that the parameters describe."""
    return MODELS[parameters["model"]]


def flops(parameters: Parameters) -> float:
    """Three forward passes a step."""
    config, patches = model_config(parameters), (parameters["height"] // PATCH, parameters["width"] // PATCH)
    batch, text = parameters["batch_size"], parameters["num_text_tokens"]
    if isinstance(config, FluxConfig):
        forward = flux.flops(flux.sizes(batch, math.prod(patches), text, config))
    else:
        forward = mmdit.flops(mmdit.sizes(batch, text, patches, config))
    return 3.0 * parameters["num_steps"] * forward


def moved(parameters: Parameters, itemsize: int) -> float:
    """The state read and written once a step, and the batch."""
    elements = sum(math.prod(shape) for shape in image_models.state_shapes(model_config(parameters)).values())
    pixels = parameters["in_channels"] * parameters["height"] * parameters["width"]
    text = parameters["num_text_tokens"] * parameters["joint_attention_dim"] + parameters["pooled_projection_dim"]
    return float(itemsize * parameters["num_steps"] * (6 * elements + parameters["batch_size"] * (pixels + text)))


def _model(draw: Draw, parameters: Parameters) -> Tensors:
    """Parameters of a model that has been trained."""
    shapes = image_models.state_shapes(model_config(parameters))
    drawn = model_states.drawn(draw, shapes, tables=(mmdit_model.POSITIONS,), around_one=mmdit.QK_NORMS)
    return {name.removeprefix("state/"): tensor for name, tensor in drawn.items()}


def _batches(draw: Draw, parameters: Parameters) -> Tensors:
    """Random images and texts."""
    steps, batch = parameters["num_steps"], parameters["batch_size"]
    image = (parameters[name] for name in ("in_channels", "height", "width"))
    return {
        "example_ids": training_runs.example_ids(draw, parameters),
        "images": draw.normal(steps, batch, *image),
        "encoder_hidden_states": draw.normal(steps, batch, parameters["num_text_tokens"], parameters["joint_attention_dim"]),
        "pooled_projections": draw.normal(steps, batch, parameters["pooled_projection_dim"]),
    }


RUNS = training_runs.Runs(
    model_config=model_config,
    draw_model=_model,
    draw_batches=_batches,
    ends=("proj_out.weight", "proj_out.bias"),
)
NOT_FINITE = (FloatingPointError,)
REJECTIONS = (
    Rejection("a NaN in a pooled text", "loss", changed("pooled_projections", one_element(torch.nan)), raises=NOT_FINITE),
    Rejection("narrower texts", "encoder_hidden_states", changed("encoder_hidden_states", lambda each: each[..., 1:])),
    Rejection("pooled texts of one example less", "pooled_projections", changed("pooled_projections", lambda each: each[:, 1:])),
    Rejection("a batch without examples", "images", lambda call: {
        name: call[name][:, :0] for name in ("images", "encoder_hidden_states", "pooled_projections", "example_ids")
    }),
    Rejection("moments of what is not trained", "state", lambda call: {
        f"state/{call['config'].moments[0]}.{mmdit_model.POSITIONS}": torch.zeros(1, 4, 16)
    }),
)  # fmt: skip
