"""Contract of the image-diffusion training step: state and batch in, state and metrics out."""

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.engine.contract import Contract, Input, Output, Recurrence, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors
from gaugeblock.reference.configs import DiTConfig, EMAConfig, ImageDiffusionConfig, Optimizer, TimestepSampling
from gaugeblock.reference.configs.image_diffusion import PREDICTION_TYPES
from gaugeblock.reference.torch import dit, train_image_diffusion, training


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
        inputs=(
            Input("state", leaves=state_leaves),
            Input("images", ("num_steps", "batch_size", "in_channels", "input_size", "input_size")),
            Input("labels", ("num_steps", "batch_size"), dtype="int64"),
            Input("example_ids", ("num_steps", "batch_size"), dtype="int64"),
        ),
        outputs=(Output("new_state", leaves=state_leaves), Output("metrics", leaves=metrics_leaves)),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(1, 5, velocity="data - noise", timestep_sampling="logit-normal", label_dropout=0.5),  # no option's default
            sizes(1, 3, label_dropout=1.0, max_gradient_norm=2**-10),  # so small that the 1e-6 of the clipping shows
            sizes(2, 1, accumulation_steps=2, weight_decay=0.0, label_dropout=0.0, run_seed=2**40 + 5, ema="capped"),
            sizes(2, 4, optimizer="sgd", prediction_type="epsilon", timestep_sampling="mode", min_snr_gamma=0.5),
            sizes(1, 4, optimizer="adam", prediction_type="sample", timestep_sampling="later", min_snr_gamma=2.0, ema="growing"),
            sizes(1, 4, **USUAL),  # what people train with; none of it is exact in float32
        ),
        factors=FACTORS,
        build=sizes,
        traits=TRAITS,
        regimes=(
            Regime("under way", under_way, differentiable=False),
            Regime("fresh", fresh, differentiable=False),
            Regime("constant-probing", converged, differentiable=False),
        ),
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
        configure=lambda parameters: {"config": config(parameters)},
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
        without={
            "batch_invariance": "the loss is that of a whole batch",
            "nan_containment": "a batch with a NaN is rejected as a whole",
            "empty_and_one": "a batch without examples is rejected",
            "grad_modes": "a training step takes gradients, which inference_mode rules out",
        },
    )  # fmt: skip


OF_MODEL = "input_size patch_size in_channels hidden_size depth num_heads num_classes frequency_embedding_size".split()
OF_RUN = """optimizer learning_rate beta1 beta2 adam_epsilon momentum weight_decay max_gradient_norm label_dropout prediction_type
    velocity timestep_sampling bias_multiplier min_snr_gamma snr accumulation_steps""".split()
# what an average keeps of itself: as much as the updates made so far say, and as much as it ever does
EMAS = {"none": None, "growing": EMAConfig(warmup=True, update_after_step=1), "capped": EMAConfig(decay=0.75)}
GRADIENT_SIZE = 0.03  # of one element, in the regimes below: moments have it, and adam_epsilon is not far from it


def sizes(num_steps: int, batch_size: int, **others: Any) -> dict[str, Any]:
    """One point of the input space; all that is not given has an ordinary value.

    `adam_epsilon` is of the gradients' size: with the usual 1e-8, Adam's first update is the gradient's sign, which says
    nothing of its magnitude.
    """
    ordinary = {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "accumulation_steps": 1,
        "input_size": 4,
        "patch_size": 2,
        "in_channels": 2,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 3,
        "frequency_embedding_size": 8,
        "run_seed": 0,
        "learning_rate": 2**-5,
        "beta1": 1 - 2**-3,
        "beta2": 1 - 2**-10,
        "adam_epsilon": 2**-8,
        "weight_decay": 2**-3,
        "max_gradient_norm": 0.25,
        "label_dropout": 0.3,
        "optimizer": "adamw",
        "momentum": 0.75,
        "ema": "none",
        "prediction_type": "flow_prediction",
        "velocity": "noise - data",
        "timestep_sampling": "uniform",
        "bias_multiplier": 4.0,
        "min_snr_gamma": None,
        "snr": "data over noise",
    }
    return ordinary | others


SAMPLINGS, OPTIMIZERS = get_args(TimestepSampling), get_args(Optimizer)
USUAL = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.01}


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Small models, few steps, batches that microbatches divide unevenly; every option at its ends and between."""
    drawn = sizes(
        num_steps=draw(st.integers(1, 3)),
        batch_size=draw(st.integers(1, 6)),
        accumulation_steps=draw(st.integers(1, 3)),
        depth=draw(st.sampled_from([1, 1, 2])),
        in_channels=draw(st.sampled_from([1, 2])),
        num_classes=draw(st.sampled_from([1, 3])),
        run_seed=draw(st.sampled_from([0, 2**40 + 5])),
        adam_epsilon=draw(st.sampled_from([2**-8, 2**-5])),
        weight_decay=draw(st.sampled_from([0.0, 2**-3])),
        max_gradient_norm=draw(st.sampled_from([2**-10, 0.25, 100.0])),
        label_dropout=draw(st.sampled_from([0.0, 0.3, 1.0])),
        velocity=draw(st.sampled_from(["noise - data", "data - noise"])),
        timestep_sampling=draw(st.sampled_from(SAMPLINGS)),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        ema=draw(st.sampled_from(list(EMAS))),
        prediction_type=draw(st.sampled_from(PREDICTION_TYPES)),
        min_snr_gamma=draw(st.sampled_from([None, 0.5, 5.0])),
        snr=draw(st.sampled_from(["data over noise", "noise over data"])),
    )
    return drawn | draw(st.sampled_from([{}, {}, {}, USUAL]))


FACTORS = (
    edges("num_steps", 1, 2),
    edges("batch_size", 1, 2, 3, 5),
    edges("accumulation_steps", 1, 2, 3, option=True),
    edges("depth", 1, 2),
    edges("in_channels", 1, 2),
    edges("num_classes", 1, 2),
    either("run_seed", 0, 2**40 + 5),
    either("adam_epsilon", 2**-8, 2**-5),
    either("weight_decay", 0.0, 2**-3),
    either("max_gradient_norm", 2**-10, 0.25, 100.0),
    either("label_dropout", 0.0, 0.5, 1.0),
    either("velocity", "noise - data", "data - noise"),
    either("timestep_sampling", *SAMPLINGS),
    either("optimizer", *OPTIMIZERS),
    either("ema", *EMAS),
    either("prediction_type", *PREDICTION_TYPES),
    either("min_snr_gamma", None, 0.5, 5.0),
    either("snr", "data over noise", "noise over data"),
)
TRAITS = (Trait("int32", "dtype of labels", dtypes={"labels": "int32"}),)


def model_config(parameters: Parameters) -> DiTConfig:
    """The model that the parameters describe."""
    return DiTConfig(learn_sigma=False, **{name: parameters[name] for name in OF_MODEL})


def config(parameters: Parameters) -> ImageDiffusionConfig:
    """The run that the parameters describe."""
    ema = EMAS[parameters["ema"]]
    of_run = {name: parameters[name] for name in OF_RUN}
    return ImageDiffusionConfig(model_config(parameters), seed=parameters["run_seed"], ema=ema, **of_run)


def state_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """The tensors of a run's state."""
    shapes = dit.state_shapes(model_config(parameters))
    names = {f"{part}.{name}": shape for part in config(parameters).parts for name, shape in shapes.items()}
    return {name: Input(name, shape) for name, shape in names.items()} | {"step": Input("step", dtype="int64")}


def metrics_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """What each step reports."""
    return {name: Input(name, ("num_steps",)) for name in ("loss", "auxiliary_loss", "gradient_norm")}


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
    """Random images; the last example of a batch has the id of the first, as when data are repeated, and so its draws."""
    steps, batch, size = (parameters[name] for name in ("num_steps", "batch_size", "input_size"))
    example_ids = draw.integers(0, 2**32, steps, batch)
    example_ids[:, -1] = example_ids[:, 0]
    return {
        "images": draw.normal(steps, batch, parameters["in_channels"], size, size),
        "labels": draw.integers(0, parameters["num_classes"], steps, batch),
        "example_ids": example_ids,
    }


def _state(parts: Mapping[str, Tensors], step: int, parameters: Parameters) -> Tensors:
    needed = {part: parts[part] for part in config(parameters).parts}
    return {f"state/{name}": tensor for name, tensor in training.join_state(needed, torch.tensor(step)).items()}


def under_way(draw: Draw, parameters: Parameters) -> Tensors:
    """The middle of a run: moments as large as gradients, all second ones positive; the average is of other parameters."""
    model = _model(draw, parameters)
    exp_avg = {name: GRADIENT_SIZE * draw.normal(*tensor.shape) for name, tensor in model.items()}
    exp_avg_sq = {name: GRADIENT_SIZE**2 * (0.5 + draw.uniform(*tensor.shape)) for name, tensor in model.items()}
    parts = {"model": model, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "momentum_buffer": exp_avg}
    step = int(draw.integers(1, 1000, 1))
    ema = {"ema": _model(draw, parameters)} if parameters["ema"] != "none" else {}
    return _state(parts | ema, step, parameters) | _batches(draw, parameters)


def fresh(draw: Draw, parameters: Parameters) -> Tensors:
    """The first steps of a run, where the corrections of Adam's moments are largest."""
    model = _model(draw, parameters)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    parts = dict.fromkeys(("exp_avg", "exp_avg_sq", "momentum_buffer"), zeros) | {"model": model, "ema": model}
    return _state(parts, 0, parameters) | _batches(draw, parameters)


def converged(draw: Draw, parameters: Parameters) -> Tensors:
    """Images that are nearly the noise drawn for them, and a model that says so: gradients are small, perhaps too small to be
    clipped; moments are 0, so that they show what the clipping adds to the norm.
    """
    tensors = fresh(draw, parameters)
    for name in ("state/model.final_layer.linear.weight", "state/model.final_layer.linear.bias"):
        tensors[name] = tensors[name] * 2**-6
    for index, (images, example_ids) in enumerate(zip(tensors["images"], tensors["example_ids"], strict=True)):
        step = int(tensors["state/step"]) + index
        noise, _, _ = train_image_diffusion.draws(images, example_ids, step, config=config(parameters))
        tensors["images"][index] = noise + 2**-6 * images
    return tensors


def one_element(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """With one element, the last, of that value."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


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
