"""Contract of the image-diffusion training step of a mixture of experts: DiT-MoE, whose balance of load is learned too."""

import math
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import dit_moe, flash_attention, training_runs
from gaugeblock.conformance.contracts.training_runs import one_element
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Recurrence, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import edges, either
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors
from gaugeblock.reference.configs import DIT_MOE_PRESETS, DiTMoEModelConfig
from gaugeblock.reference.torch import dit_moe as model
from gaugeblock.reference.torch import train_image_diffusion


@row
def train_step_of_experts() -> Contract:
    """The row of `train_image_diffusion.train_step`, of DiT-MoE."""
    step = train_image_diffusion.train_step
    return Contract(
        name="train_image_diffusion.train_step_of_experts",
        summary="`train_step` of a mixture of experts: as of a DiT, but that the balance of their load is differentiated too.",
        formula=(
            "as train_image_diffusion.train_step, of prediction, auxiliary_loss = dit_moe(state, (1 - t) images[b] + t noise, "
            "1000 t, label), the auxiliary loss of the whole batch; the gradients are of loss + auxiliary_loss"
        ),
        source=(
            "Fei et al. 2024 (arXiv:2407.11633), section 2; feizc/DiT-MoE models.py, AddAuxiliaryLoss; else as "
            "train_image_diffusion.train_step"
        ),
        reference=step,
        twin="gaugeblock.reference.jax.train_image_diffusion:train_step",
        rounded_as=flash_attention.of(step, model),
        formulas=(flash_attention.of(training_runs.with_weighted_averages(step), model),),
        chooses_inside=True,
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
        landmarks=(  # JAX takes seconds to compile the step of each
            point(1, 4, num_experts=4, top_k=2, label_dropout=0.5, loss_scale=2.0**7, ema="growing"),
            point(1, 4, num_experts=4, top_k=1, per_sample=True, scores="sigmoid", optimizer="sgd"),
        ),
        factors=FACTORS,
        build=build,
        regimes=RUNS.regimes()[:2],
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("dit-moe-s-8e2a/train-batch-32", published(32, DIT_MOE_PRESETS["DiT-MoE-S/2-8E2A"]), PUBLIC),
            Workload("two-cores/train-dit-moe", published(8, NARROW), "a size for a CPU: half the width of DiT_MoE_S_2"),
        ),
        configure=lambda parameters: {"config": RUNS.config(parameters)},
        dtypes=("float32",),
        cases=0.02,
        recurrence=Recurrence(steps="num_steps", carried={"state": "new_state"}),
        shardings={"data_parallel": {"batch_size": "uneven"}, "without_padding": {"batch_size": "even"}},
        rejections=REJECTIONS,
        implementations=(
            distributed("fsdp2", "train_image_diffusion:train_step", devices=DEVICES, world_sizes=(2,)),
            # each number of devices takes a compilation: tests/test_train_on_ranks.py has others
            distributed(
                "jax-sharded", "train_image_diffusion:train_step", framework="jax", world_sizes=(4,), sharding="without_padding"
            ),
        ),
        without=training_runs.WITHOUT
        | {"accumulation": "each microbatch has a balance of its own: that of its examples"}
        | dict.fromkeys(SHARED, "judged of train_step, with which all but the model and its auxiliary loss is shared"),
    )


SHARED = ("hidden_state", "layout", "process_settings", "same_pointer_new_data", "resume")
PUBLIC = "feizc/DiT-MoE models.py"
NARROW = DiTMoEModelConfig(hidden_size=192, depth=2, num_heads=3, patch_size=4, learn_sigma=False)
OF_LAYER = ("num_experts", "top_k", "per_sample", "scores", "aux_loss_alpha")


def published(batch_size: int, config: DiTMoEModelConfig) -> dict[str, Any]:
    """A step of a model that predicts one image alone."""
    whole = dit_moe.sizes(batch_size, config) | {"learn_sigma": False, "out_channels": config.in_channels}
    return {**whole, **training_runs.ORDINARY, "num_steps": 1}


def point(num_steps: int, batch_size: int, **others: Any) -> dict[str, Any]:
    """One point of the input space: a tiny model of one block, whose balance weighs as much as its loss.

    What is not given of a run has an ordinary value.
    """
    of_layer: dict[str, Any] = {name: others.pop(name) for name in OF_LAYER if name in others}
    tiny = dit_moe.tiny_model(
        heads=(16, 2), depth=1, in_channels=2, num_classes=3, frequency_embedding_size=8, learn_sigma=False,
        **{"aux_loss_alpha": 1.0} | of_layer,
    )  # fmt: skip
    return {**dit_moe.sizes(batch_size, tiny), **training_runs.ORDINARY, "num_steps": num_steps, **others}


def build(num_experts: int, top_k: int, **others: Any) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return point(1, num_experts=num_experts, top_k=top_k, **others) if top_k <= num_experts else None


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models; the whole batch is one microbatch."""
    of_run: dict[str, Any] = draw(training_runs.runs())
    few = {"num_steps": draw(st.integers(1, 2)), "accumulation_steps": 1}
    num_experts, top_k = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)]))
    return point(
        **of_run | few,
        num_experts=num_experts,
        top_k=top_k,
        per_sample=draw(st.booleans()),
        scores=draw(st.sampled_from(["softmax", "sigmoid"])),
        aux_loss_alpha=draw(st.sampled_from([0.01, 1.0])),
    )


OF_RUN = ("batch_size", "label_dropout", "loss_scale", "optimizer")  # the others are train_step's
FACTORS = (
    *(each for each in training_runs.FACTORS if each.name in OF_RUN),
    edges("num_experts", 1, 2, 4),
    edges("top_k", 1, 2, option=True),
    either("per_sample", False, True),
    either("scores", "softmax", "sigmoid"),
    either("aux_loss_alpha", 0.01, 1.0),
)


def flops(parameters: Parameters) -> float:
    """Three forward passes a step."""
    return 3.0 * parameters["num_steps"] * dit_moe.flops(parameters)


def moved(parameters: Parameters, itemsize: int) -> float:
    """The state read and written once a step, and the images."""
    elements = sum(math.prod(shape) for shape in model.state_shapes(dit_moe.configuration(parameters)).values())
    pixels = parameters["batch_size"] * parameters["in_channels"] * parameters["input_size"] ** 2
    return float(itemsize * parameters["num_steps"] * (6 * elements + pixels))


def _model(draw: Draw, parameters: Parameters) -> Tensors:
    """Parameters of a model that has been trained, whose experts differ in their load."""
    drawn = dit_moe.dithered(draw, parameters).items()
    return {name.removeprefix("state/"): tensor for name, tensor in drawn if name.startswith("state/")}


def _batches(draw: Draw, parameters: Parameters) -> Tensors:
    """Random images and classes."""
    steps, batch, size = (parameters[name] for name in ("num_steps", "batch_size", "input_size"))
    return {
        "example_ids": training_runs.example_ids(draw, parameters),
        "images": draw.normal(steps, batch, parameters["in_channels"], size, size),
        "labels": draw.integers(0, parameters["num_classes"], steps, batch),
    }


RUNS = training_runs.Runs(
    model_config=dit_moe.configuration,
    draw_model=_model,
    draw_batches=_batches,
    ends=("final_layer.linear.weight", "final_layer.linear.bias"),
)
GATE, EXPERTS = "state/model.blocks.0.moe.gate.weight", "state/model.blocks.0.moe.experts.down_proj"
REJECTIONS = (
    Rejection("a NaN in a router", "loss", changed(GATE, one_element(torch.nan)), raises=(FloatingPointError,)),
    Rejection(
        "an expert too many", EXPERTS.removeprefix("state/"), changed(EXPERTS, lambda each: torch.cat([each, each[:1]]))
    ),
    Rejection("a batch without examples", "images", lambda call: {
        name: call[name][:, :0] for name in ("images", "labels", "example_ids")
    }),
    Rejection("the label that stands for none", "labels", lambda call: {
        "labels": call["labels"] * 0 + call["config"].model.num_classes
    }, by_values=True),
)  # fmt: skip
