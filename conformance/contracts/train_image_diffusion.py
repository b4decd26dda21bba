"""Contract of the image-diffusion training step: state and batch in, state and metrics out."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import training_runs
from gaugeblock.conformance.contracts.training_runs import USUAL, one_element
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Recurrence, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch import dit, train_image_diffusion


@row
def train_step() -> Contract:
    """The row of `train_image_diffusion.train_step`."""
    return Contract(
        name="train_image_diffusion.train_step",
        summary="One update of a class-conditional diffusion transformer on rectified flow: draws, loss, clipping, AdamW.",
        formula=(
            "loss = mean over b of mean of (dit(state, (1 - t) images[b] + t noise, 1000 t, label) - velocity)**2, where noise, "
            "t and whether the label is dropped are drawn by (seed, step, example_ids[b]); gradients are clipped by "
            "min(1, max_gradient_norm / (gradient_norm + 1e-6)); AdamW"
        ),
        source=(
            "Esser et al. 2024 (arXiv:2403.03206) section 2; Ho and Salimans 2022 (arXiv:2207.12598) algorithm 1; Loshchilov and "
            "Hutter 2017 (arXiv:1711.05101) algorithm 2, as in torch.optim.AdamW"
        ),
        reference=train_image_diffusion.train_step,
        formulas=(training_runs.with_weighted_averages(train_image_diffusion.train_step),),
        inputs=(
            Input("state", leaves=RUNS.state_leaves),
            Input("images", ("num_steps", "batch_size", "in_channels", "input_size", "input_size")),
            Input("labels", ("num_steps", "batch_size"), dtype="int64"),
            Input("example_ids", ("num_steps", "batch_size"), dtype="int64"),
        ),
        outputs=(Output("new_state", leaves=RUNS.state_leaves), Output("metrics", leaves=training_runs.metrics_leaves)),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(1, 5, velocity="data - noise", timestep_sampling="logit-normal", label_dropout=0.5),  # no option's default
            sizes(1, 3, label_dropout=1.0, max_gradient_norm=2**-10),  # so small that the 1e-6 of the clipping shows
            sizes(2, 1, accumulation_steps=2, weight_decay=0.0, label_dropout=0.0, run_seed=2**40 + 5, ema="capped"),
            sizes(2, 4, optimizer="sgd", prediction_type="epsilon", timestep_sampling="mode", min_snr_gamma=0.5, rates="cosine"),
            sizes(
                1, 4, optimizer="adam", prediction_type="sample", timestep_sampling="later", min_snr_gamma=2.0, ema="growing",
                activation_checkpointing=True, rates="warming",
            ),
            sizes(1, 4, **USUAL),  # what people train with; none of it is exact in float32
        ),
        factors=FACTORS,
        build=sizes,
        traits=TRAITS,
        regimes=RUNS.regimes(),
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload(
                "dit-s-2/train-256",
                sizes(1, 256, input_size=32, in_channels=4, hidden_size=384, depth=12, num_heads=6, num_classes=1000,
                      frequency_embedding_size=256),
                "Peebles and Xie 2022 (arXiv:2212.09748), table 1 and section 4",
            ),
            Workload(
                "dit-xl-2/train-256",
                sizes(1, 256, input_size=32, in_channels=4, hidden_size=1152, depth=28, num_heads=16, num_classes=1000,
                      frequency_embedding_size=256),
                "Peebles and Xie 2022 (arXiv:2212.09748), table 1 and section 4",
            ),
            Workload(
                "two-cores/train-digits-64",
                sizes(1, 64, input_size=8, in_channels=1, hidden_size=64, depth=4, num_heads=4, num_classes=10,
                      frequency_embedding_size=64),
                "scikit-learn's digits, a size for a CPU",
            ),
        ),
        configure=lambda parameters: {"config": RUNS.config(parameters)},
        dtypes=("float32",),
        cases=0.25,
        recurrence=Recurrence(steps="num_steps", carried={"state": "new_state"}),
        microbatches="accumulation_steps",
        shardings={"data_parallel": {"batch_size": "uneven"}},
        rejections=REJECTIONS,
        implementations=(
            distributed("fsdp2", devices=DEVICES, world_sizes=(1, 2, 4)),
            # each number of devices takes a compilation: tests/test_jax_sharding.py has 1 and 2
            distributed("jax-sharded", framework="jax", world_sizes=(4,)),
        ),
        without=training_runs.WITHOUT,
    )  # fmt: skip


OF_MODEL = "input_size patch_size in_channels hidden_size depth num_heads num_classes frequency_embedding_size".split()


def sizes(num_steps: int, batch_size: int, **others: Any) -> dict[str, Any]:
    """One point of the input space; all that is not given has an ordinary value."""
    model = {
        "input_size": 4,
        "patch_size": 2,
        "in_channels": 2,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 3,
        "frequency_embedding_size": 8,
    }
    return {"num_steps": num_steps, "batch_size": batch_size} | model | training_runs.ORDINARY | others


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Small models, with and without what a batch may do to them."""
    return sizes(
        **draw(training_runs.runs()),
        depth=draw(st.sampled_from([1, 1, 2])),
        in_channels=draw(st.sampled_from([1, 2])),
        num_classes=draw(st.sampled_from([1, 3])),
    )


FACTORS = (*training_runs.FACTORS, edges("depth", 1, 2), edges("in_channels", 1, 2), edges("num_classes", 1, 2))
TRAITS = (Trait("int32", "dtype of labels", dtypes={"labels": "int32"}),)


def model_config(parameters: Parameters) -> DiTConfig:
    """The model that the parameters describe."""
    return DiTConfig(learn_sigma=False, **{name: parameters[name] for name in OF_MODEL})


def flops(parameters: Parameters) -> float:
    """Three forward passes' products a step."""
    model = model_config(parameters)
    tokens, width = model.num_patches, model.hidden_size
    products = model.depth * (12 * tokens * width**2 + 6 * width**2 + 2 * tokens**2 * width)
    return 6.0 * parameters["num_steps"] * parameters["batch_size"] * products


def moved(parameters: Parameters, itemsize: int) -> float:
    """The state read and written once a step, and the images."""
    model, steps = model_config(parameters), parameters["num_steps"]
    elements = sum(math.prod(shape) for shape in dit.state_shapes(model).values())
    pixels = parameters["batch_size"] * model.in_channels * model.input_size**2
    return float(itemsize * steps * (6 * elements + pixels))


def _model(draw: Draw, parameters: Parameters) -> Tensors:
    """Parameters of a model that has been trained: modulations and last layer are not 0 any more."""
    shapes = dit.state_shapes(model_config(parameters))
    return {
        name: draw.normal(*shape) * (0.2 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5)
        for name, shape in shapes.items()
    }


def _batches(draw: Draw, parameters: Parameters) -> Tensors:
    """Random images and classes."""
    steps, batch, size = (parameters[name] for name in ("num_steps", "batch_size", "input_size"))
    return {
        "example_ids": training_runs.example_ids(draw, parameters),
        "images": draw.normal(steps, batch, parameters["in_channels"], size, size),
        "labels": draw.integers(0, parameters["num_classes"], steps, batch),
    }


RUNS = training_runs.Runs(
    model_config=model_config,
    draw_model=_model,
    draw_batches=_batches,
    ends=("final_layer.linear.weight", "final_layer.linear.bias"),
)


def _steep(call: Mapping[str, Any]) -> Tensors:
    """A last layer with a finite loss and weights so large that a gradient is not: its modulation multiplies them by 0."""
    layer = "state/model.final_layer"
    shift, scale = call[f"{layer}.adaLN_modulation.1.bias"].chunk(2)
    return {
        f"{layer}.adaLN_modulation.1.weight": torch.zeros_like(call[f"{layer}.adaLN_modulation.1.weight"]),
        f"{layer}.adaLN_modulation.1.bias": torch.cat([0 * shift, 0 * scale - 1]),
        f"{layer}.linear.weight": torch.full_like(call[f"{layer}.linear.weight"], 2.0**127),
        f"{layer}.linear.bias": torch.full_like(call[BIAS], 2.0**40),
    }


BIAS = "state/model.final_layer.linear.bias"
REJECTIONS = (
    Rejection("a NaN in an image", "loss", changed("images", one_element(torch.nan)), raises=(FloatingPointError,)),
    Rejection("an infinite parameter", "loss", changed(BIAS, one_element(torch.inf)), raises=(FloatingPointError,)),
    Rejection("a finite loss with an infinite gradient", "gradient", _steep, raises=(FloatingPointError,)),
    Rejection("images of another size", "images", changed("images", lambda each: each[..., :-1])),
    Rejection("a batch without examples", "images", lambda call: {
        name: call[name][:, :0] for name in ("images", "labels", "example_ids")
    }),
    Rejection("a negative label", "labels", changed("labels", lambda each: each * 0 - 1), by_values=True),
    Rejection("the label that stands for none", "labels", lambda call: {
        "labels": call["labels"] * 0 + call["config"].model.num_classes
    }, by_values=True),
    Rejection("a state without its step", "step", changed("state/step", lambda each: None)),
    Rejection("a floating step", "step", changed("state/step", torch.Tensor.float)),
    Rejection("a parameter of another shape", "model.final_layer.linear.bias", changed(BIAS, lambda each: each[:-1])),
    Rejection("integer moments", ("exp_avg.final_layer.linear.bias", "momentum_buffer.final_layer.linear.bias"), lambda call: {
        f"state/{call['config'].moments[0]}.final_layer.linear.bias": call[BIAS].long()
    }),
)  # fmt: skip
