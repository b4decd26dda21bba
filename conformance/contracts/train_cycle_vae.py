"""Contract of the training step of text-latent diffusion with cycles: state, texts and latents in, state and metrics out."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import flash_attention, model_states, text_latent_mmdit, training_runs
from gaugeblock.conformance.contracts.training_runs import EMAS, GRADIENT_SIZE, one_element
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Recurrence, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import edges, either
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors
from gaugeblock.reference.configs import TEXT_LATENT_MMDIT_PRESETS, CycleVAEConfig, TextLatentMMDiTConfig
from gaugeblock.reference.torch import text_latent_mmdit as model
from gaugeblock.reference.torch import train_cycle_vae, training


@row
def train_step() -> Contract:
    """The row of `train_cycle_vae.train_step`."""
    step = train_cycle_vae.train_step
    return Contract(
        name="train_cycle_vae.train_step",
        summary="One update of text-latent diffusion: text to latent, latent to text, and the cycles through both.",
        formula=(
            "loss = latent_loss_weight D(p, target) + CE(q, ids) + w_text CE(q', ids) + w_latent D(p', target'), where p = "
            "model(ids, x, 0, t), q = model(masks, latents, 1, 0), q' = model(masks, latents that p says, 1, 0), p' = "
            "model(tokens that q chooses, x', 0, t'), D(a, b) = mean of (a / |a| - b / |b|)**2, and CE is a mean over all "
            "places, 100 at most; then as train_image_diffusion.train_step"
        ),
        source="LGDLM cycle_vae_impl/trainers/cycle_vae_trainer.py; Zhu et al. 2017 (arXiv:1703.10593), section 3.2",
        reference=step,
        rounded_as=flash_attention.of(step, model),
        formulas=(flash_attention.of(training_runs.with_weighted_averages(step), model),),
        inputs=(
            Input("state", leaves=state_leaves),
            Input("input_ids", ("num_steps", "batch_size", "num_tokens"), dtype="int64", indexes="vocab_size"),
            Input("latents", ("num_steps", "batch_size", "latent_dim")),
            Input("attention_mask", ("num_steps", "batch_size", "num_tokens"), dtype="bool"),
            Input("example_ids", ("num_steps", "batch_size"), dtype="int64"),
        ),
        outputs=(Output("new_state", leaves=state_leaves), Output("metrics", leaves=metrics_leaves)),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(  # of one size, which JAX compiles once
            sizes(cycle_latent_sampling="categorical", cycle_latent_temperature=8.0, **RISING),
            sizes(prediction_type="v_prediction", cycle_stop_grad_latent=False, cycle_every=3, ema="growing", **LGDLM_RATE),
            sizes(latent_t_mode="full", prediction_type="sample", cluster_size=3, run_seed=2**40 + 5, **BEFORE, **FALLING),
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
            Workload("cluster/train-batch-4", published(4, 4096, "cluster"), "LGDLM, configuration of the cluster"),
            Workload("two-cores/train-smoke", published(1, 32, "smoke"), "LGDLM, configuration of the smoke test"),
        ),
        configure=lambda parameters: {"config": config(parameters)},
        dtypes=("float32",),
        cases=0.02,  # a budget with the gradients of all parameters, of four passes, takes seconds
        recurrence=Recurrence(steps="num_steps", carried={"state": "new_state"}),
        microbatches="accumulation_steps",
        shardings={"data_parallel": {"batch_size": "uneven"}},
        rejections=REJECTIONS,
        implementations=(
            distributed("fsdp2", devices=DEVICES, world_sizes=(2,)),  # tests have 1 and 4
            # each number of devices takes a compilation
            distributed("jax-sharded", framework="jax", world_sizes=(4,)),
        ),
        without=training_runs.WITHOUT
        | dict.fromkeys(("layout", "process_settings", "same_pointer_new_data"), "judged of train_image_diffusion.train_step"),
    )  # fmt: skip


TINY = TextLatentMMDiTConfig(vocab_size=11, latent_dim=5, hidden_size=8, n_blocks=1, cond_dim=6, max_seq_len=6)
RISING: dict[str, Any] = {
    "cycle_text_warmup_steps": 2, "cycle_text_ramp_steps": 12, "cycle_latent_warmup_steps": 1, "cycle_latent_ramp_steps": 1
}  # fmt: skip  # one still rises while a run is under way, one has risen
BEFORE: dict[str, Any] = {"cycle_text_warmup_steps": 1000, "cycle_latent_warmup_steps": 1000}
FALLING: dict[str, Any] = {"learning_rate_schedule": "cosine", "num_training_steps": 12, "final_learning_rate_ratio": 0.125}
LGDLM_RATE: dict[str, Any] = {
    "learning_rate_schedule": "cosine", "num_warmup_steps": 4, "num_training_steps": 12, "first_warmup_step": 1,
    "final_learning_rate_ratio": 0.125,
}  # fmt: skip
OF_RUN: dict[str, Any] = {
    "mode": "cycle",
    "prediction_type": "epsilon",
    "latent_t_mode": "random",
    "latent_t_min": 0.125,
    "latent_t_max": 0.875,  # the rest is noise, and 1 / alpha makes a predicted latent, and its rounding, large
    "latent_loss_weight": 0.5,
    "cycle_text_weight": 0.5,
    "cycle_text_warmup_steps": 0,
    "cycle_text_ramp_steps": 0,
    "cycle_latent_weight": 0.75,
    "cycle_latent_warmup_steps": 0,
    "cycle_latent_ramp_steps": 0,
    "cycle_every": None,
    "cycle_stop_grad_latent": True,
    "cycle_latent_sampling": "argmax",
    "cycle_latent_temperature": 1.0,
    "learning_rate_schedule": "constant",
    "num_warmup_steps": 0,
    "num_training_steps": None,
    "first_warmup_step": 0,
    "final_learning_rate_ratio": 0.0,
    "learning_rate": 2**-5,
    "beta1": 1 - 2**-3,
    "beta2": 1 - 2**-10,
    # of the gradients' size: with the usual 1e-8, Adam's first update is the gradient's sign, which says nothing of its magnitude
    "adam_epsilon": 2**-8,
    "weight_decay": 2**-3,
    "max_gradient_norm": 0.25,
    "accumulation_steps": 1,
}


def sizes(num_steps: int = 1, batch_size: int = 3, num_tokens: int = 4, cluster_size: int = 0, **others: Any) -> dict[str, Any]:
    """One point of the input space: a tiny model; what is not given of a run has an ordinary value."""
    of_model = text_latent_mmdit.sizes(batch_size, num_tokens, replace(TINY, cluster_size=cluster_size))
    return {**of_model, **OF_RUN, "num_steps": num_steps, "run_seed": 0, "ema": "none", **others}


def published(batch_size: int, num_tokens: int, name: str) -> dict[str, Any]:
    """A published model, in a run as it is recommended, after its ramps."""
    of_model = text_latent_mmdit.sizes(batch_size, num_tokens, TEXT_LATENT_MMDIT_PRESETS[name])
    return {**sizes(), **of_model, "cycle_text_weight": 0.1, "cycle_latent_weight": 0.1, "latent_loss_weight": 0.1}


FACTORS = (
    edges("batch_size", 1, 3),
    edges("num_tokens", 1, 4),
    either("mode", "cycle", "t2l", "l2t"),
    either("prediction_type", "epsilon", "sample", "v_prediction"),
    either("latent_t_mode", "random", "full"),
    either("cycle_every", None, 3),
    either("cycle_stop_grad_latent", True, False),
    either("cycle_latent_sampling", "argmax", "categorical"),
    either("cluster_size", 0, 3),
)


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Tiny models, few steps, batches that microbatches divide unevenly; every option at its ends and between."""
    values: dict[str, Any] = {factor.name: draw(st.sampled_from(factor.values)) for factor in FACTORS}
    if values["latent_t_mode"] == "full" and values["prediction_type"] == "epsilon":
        values["prediction_type"] = "sample"  # at 64,171 times its error, a predicted latent is noise and its rounding
    return sizes(
        num_steps=draw(st.integers(1, 2)),
        accumulation_steps=draw(st.integers(1, 2)),
        ema=draw(st.sampled_from(list(EMAS))),
        **values,
        **draw(st.sampled_from([{}, RISING])),
        **draw(st.sampled_from([{}, LGDLM_RATE])),
    )


def config(parameters: Parameters) -> CycleVAEConfig:
    """The run that the parameters describe."""
    of_run = {name: parameters[name] for name in OF_RUN}
    of_model = text_latent_mmdit.configuration(parameters)
    mask = parameters["vocab_size"] - 1
    return CycleVAEConfig(of_model, mask, **of_run, seed=parameters["run_seed"], ema=EMAS[parameters["ema"]])


def trained_shapes(parameters: Parameters) -> Mapping[str, tuple[int, ...]]:
    """Those of what is not frozen."""
    run = config(parameters)
    frozen = train_cycle_vae.frozen_names(run)
    return {name: shape for name, shape in model.state_shapes(run.model).items() if name not in frozen}


def state_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """The tensors of a run's state."""
    run, trained = config(parameters), trained_shapes(parameters)
    whole = model.state_shapes(run.model)
    names = {
        f"{part}.{name}": shape
        for part in run.parts
        for name, shape in (whole if part in ("model", "ema") else trained).items()
    }  # fmt: skip
    return model_states.leaves(names) | {"step": Input("step", dtype="int64")}


def metrics_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """What each step reports."""
    names = vars(train_cycle_vae.Metrics)["__dataclass_fields__"]
    return {name: Input(name, ("num_steps",)) for name in names}


def flops(parameters: Parameters) -> float:
    """Three forward passes of the model for each of the directions and cycles."""
    passes = 4 if parameters["mode"] == "cycle" and parameters["cycle_every"] is None else 2
    if parameters["mode"] != "cycle":
        passes = 1
    return 3.0 * passes * parameters["num_steps"] * text_latent_mmdit.flops(parameters)


def moved(parameters: Parameters, itemsize: int) -> float:
    """The state read and written once a step, and the batch."""
    elements = sum(math.prod(shape) for shape in trained_shapes(parameters).values())
    batch = parameters["batch_size"] * (2 * parameters["num_tokens"] + parameters["latent_dim"])
    return float(itemsize * parameters["num_steps"] * (6 * elements + batch))


def _model(draw: Draw, parameters: Parameters) -> Tensors:
    """Parameters of a model that has been trained; its tokens' logits are far apart, so that rounding chooses none."""
    drawn = text_latent_mmdit.dithered(draw, parameters)
    state = {name.removeprefix("state/"): each for name, each in drawn.items() if name.startswith("state/")}
    state["text_head.weight"] = 4 * state["text_head.weight"]
    return state


def _run(draw: Draw, parameters: Parameters, moments: Tensors, squares: Tensors, step: int) -> Tensors:
    """A state with these moments, whose average is of other parameters; and texts and latents of each step."""
    parts = {"model": _model(draw, parameters), "exp_avg": moments, "exp_avg_sq": squares}
    if EMAS[parameters["ema"]] is not None:
        parts["ema"] = _model(draw, parameters)
    steps, batch, tokens = (parameters[name] for name in ("num_steps", "batch_size", "num_tokens"))
    return {
        **{f"state/{name}": each for name, each in training.join_state(parts, torch.tensor(step)).items()},
        "input_ids": draw.integers(0, parameters["vocab_size"] - 1, steps, batch, tokens),
        "latents": draw.normal(steps, batch, parameters["latent_dim"]),
        "attention_mask": draw.uniform(steps, batch, tokens) < 0.7,
        "example_ids": training_runs.example_ids(draw, parameters),
    }


def under_way(draw: Draw, parameters: Parameters) -> Tensors:
    """The middle of warm-ups and ramps: moments as large as gradients, all second ones positive."""
    shapes = trained_shapes(parameters)
    moments = {name: GRADIENT_SIZE * draw.normal(*shape) for name, shape in shapes.items()}
    squares = {name: GRADIENT_SIZE**2 * (0.5 + draw.uniform(*shape)) for name, shape in shapes.items()}
    return _run(draw, parameters, moments, squares, int(draw.integers(3, 11, 1)))


def fresh(draw: Draw, parameters: Parameters) -> Tensors:
    """The first steps of a run, where the corrections of Adam's moments are largest and warm-ups begin."""
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in trained_shapes(parameters).items()}
    return _run(draw, parameters, zeros, {name: each.clone() for name, each in zeros.items()}, 0)


NOT_FINITE = (FloatingPointError,)
GAMMA, BIAS = "state/model.mmdit.norms.0.g", "state/model.conditioning.combine.2.bias"
EMPTY = ("input_ids", "latents", "attention_mask", "example_ids")
REJECTIONS = (
    Rejection("a NaN in a latent", "latent_norm", changed("latents", one_element(math.nan)), raises=NOT_FINITE),
    Rejection("an infinite parameter", "loss", changed(BIAS, one_element(math.inf)), raises=NOT_FINITE),
    Rejection("latents with an axis of one token", "latents", changed("latents", lambda each: each[:, :, None])),
    Rejection("latents without a number", "latents", changed("latents", lambda each: each[..., 1:])),
    Rejection("a text too long", "input_ids", lambda call: {
        name: call[name].repeat(1, 1, 8) for name in ("input_ids", "attention_mask")
    }),
    Rejection("a mask of numbers", "attention_mask", changed("attention_mask", torch.Tensor.float)),
    Rejection("a batch without examples", "latents", lambda call: {name: call[name][:, :0] for name in EMPTY}),
    Rejection("a state without its step", "step", changed("state/step", lambda each: None)),
    Rejection("a parameter of another shape", "model.mmdit.norms.0.g", changed(GAMMA, lambda each: each[:-1])),
)  # fmt: skip
