"""Contract of the block diffusion training step: state, tokens, labels and samples in, state and metrics out."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import dream, flash_attention, language_models, llada, model_states, sdar, training_runs
from gaugeblock.conformance.contracts.training_runs import EMAS, GRADIENT_SIZE, one_element
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Recurrence, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors
from gaugeblock.reference.configs import (
    IGNORED_LABEL,
    LLADA_PRESETS,
    SDAR_PRESETS,
    BlockDiffusionConfig,
    LossMean,
    MaskTimes,
    MaskWeighting,
    Optimizer,
)
from gaugeblock.reference.torch import decoder, train_block_diffusion, training
from gaugeblock.reference.torch import language_models as models


@row
def train_step() -> Contract:
    """The row of `train_block_diffusion.train_step`."""
    step = train_block_diffusion.train_step
    return Contract(
        name="train_block_diffusion.train_step",
        summary="One update of SDAR, LLaDA or Dream: times, masks, weights, losses over the batch's tokens, clipping, AdamW.",
        formula=(
            "loss = sum over masked tokens of weight(p) * -log softmax(model(noisy, clean))[label] / tokens of the batch, where "
            "p = least_share + (greatest_share - least_share) * t, a token with a label is masked with probability p, and t and "
            "masks are drawn by (seed, step, example_ids[b]); then as train_image_diffusion.train_step"
        ),
        source=(
            "Nie et al. 2025 (arXiv:2502.09992) algorithms 1 and 2; Cheng et al. 2025 (arXiv:2510.06303); Arriola et al. 2025 "
            "(arXiv:2503.09573) sections 3 to 5; Ye et al. 2025 (arXiv:2508.15487) section 3"
        ),
        reference=step,
        rounded_as=flash_attention.of(step, decoder),
        formulas=(flash_attention.of(training_runs.with_weighted_averages(step), decoder),),
        inputs=(
            Input("state", leaves=state_leaves),
            Input("input_ids", TOKENS, dtype="int64", indexes="vocab_size"),
            Input("labels", TOKENS, dtype="int64"),
            Input("sample_ids", TOKENS, dtype="int64"),
            Input("example_ids", ("num_steps", "batch_size"), dtype="int64"),
        ),
        outputs=(Output("new_state", leaves=state_leaves), Output("metrics", leaves=metrics_leaves)),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(  # JAX takes seconds to compile the step of each
            sizes(3, "sdar", times_of="block", antithetic=True, excludes_mask_token=True, accumulation_steps=2, ema="growing"),
            sizes(3, "llada", times_of="sequence", mean_over="examples", optimizer="sgd", least_share=1e-3),
            sizes(4, "dream", times_of="sample", least_share=0.0, weighting="cart", mean_over="masked", run_seed=2**40 + 5),
        ),
        factors=FACTORS,
        build=build,
        traits=TRAITS,
        regimes=(
            Regime("under way", under_way, differentiable=False),
            Regime("fresh", fresh, differentiable=False),
        ),
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("sdar-8b/train-4096", sizes(1, "SDAR-8B", num_tokens=4096), "JetAstra/SDAR, training"),
            Workload("llada-8b/train-4096", sizes(1, "LLaDA-8B", times_of="sequence", num_tokens=4096), "arXiv:2502.09992, 2.2"),
            Workload("two-cores/train-narrow-sdar", sizes(2, "narrow SDAR", num_tokens=64), "a size for a CPU"),
        ),
        configure=lambda parameters: {"config": config(parameters)},
        dtypes=("float32",),
        cases=0.02,  # a budget with the moments of all parameters takes a second for each step and microbatch
        recurrence=Recurrence(steps="num_steps", carried={"state": "new_state"}),
        microbatches="accumulation_steps",
        shardings={"data_parallel": {"batch_size": "uneven"}},
        rejections=REJECTIONS,
        implementations=(
            distributed("fsdp2", devices=DEVICES, world_sizes=(2,)),  # tests have 1 and 4
            # each number of devices takes a compilation
            distributed("jax-sharded", framework="jax", world_sizes=(4,)),
        ),
        without=training_runs.WITHOUT,
    )


TOKENS = ("num_steps", "batch_size", "num_tokens")
KINDS = {"sdar": sdar.TRAINING, "llada": llada.MODEL, "dream": dream.MODEL}
MODELS = {
    "sdar": sdar.TRAINING.tiny((2, 1), num_hidden_layers=1, block_length=2),
    "llada": llada.MODEL.tiny((2, 1), num_hidden_layers=1),
    "dream": dream.MODEL.tiny((2, 1), num_hidden_layers=1),
    "SDAR-8B": SDAR_PRESETS["SDAR-8B"],
    "LLaDA-8B": LLADA_PRESETS["LLaDA-8B"],
    "narrow SDAR": sdar.TRAINING.tiny(**sdar.FOR_A_CPU),
}
OF_RUN = """times_of antithetic least_share greatest_share weighting cart_p mean_over excludes_mask_token optimizer
    accumulation_steps learning_rate adam_epsilon weight_decay max_gradient_norm beta1 beta2 momentum""".split()


def sizes(batch_size: int = 3, model: str = "sdar", **others: Any) -> dict[str, Any]:
    """One point of the input space; all that is not given has an ordinary value.

    `adam_epsilon` is of the gradients' size: with the usual 1e-8, Adam's first update is the gradient's sign, which says
    nothing of its magnitude.
    """
    ordinary = {
        "num_steps": 1,
        "batch_size": batch_size,
        "model": model,
        "num_tokens": 7,
        "run_seed": 0,
        "times_of": "sample",
        "antithetic": False,
        "least_share": 2**-3,
        "greatest_share": 1.0,
        "weighting": "inverse",
        "cart_p": 0.25,
        "mean_over": "tokens",
        "excludes_mask_token": False,
        "optimizer": "adamw",
        "accumulation_steps": 1,
        "ema": "none",
        "learning_rate": 2**-5,
        "beta1": 1 - 2**-3,
        "beta2": 1 - 2**-10,
        "momentum": 0.75,
        "adam_epsilon": 2**-8,
        "weight_decay": 2**-3,
        "max_gradient_norm": 0.25,
    }
    return ordinary | {"vocab_size": MODELS[model].vocab_size} | others


def build(**factors: Any) -> dict[str, Any] | None:
    """The point with these values of the factors; None where the times of blocks are asked for of a model that has none."""
    return None if factors["times_of"] == "block" and factors["model"] != "sdar" else sizes(**factors)


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Small models, few steps, batches that microbatches divide unevenly; every option at its ends and between."""
    model = draw(st.sampled_from(list(KINDS)))
    return sizes(
        draw(st.integers(1, 4)),
        model,
        num_steps=draw(st.integers(1, 2)),
        num_tokens=draw(st.integers(1, 9)),
        times_of=draw(st.sampled_from([each for each in get_args(MaskTimes) if each != "block" or model == "sdar"])),
        antithetic=draw(st.booleans()),
        least_share=draw(st.sampled_from([0.0, 1e-3, 0.5])),
        greatest_share=draw(st.sampled_from([0.875, 1.0])),
        weighting=draw(st.sampled_from(get_args(MaskWeighting))),
        mean_over=draw(st.sampled_from(get_args(LossMean))),
        excludes_mask_token=draw(st.booleans()),
        optimizer=draw(st.sampled_from(get_args(Optimizer))),
        accumulation_steps=draw(st.integers(1, 2)),
        ema=draw(st.sampled_from(list(EMAS))),
    )


FACTORS = (
    either("model", *KINDS),
    edges("batch_size", 1, 3),
    edges("num_tokens", 1, 2, 7),
    either("times_of", *get_args(MaskTimes)),
    either("antithetic", False, True),
    either("weighting", *get_args(MaskWeighting)),
    either("mean_over", *get_args(LossMean)),
    either("excludes_mask_token", False, True),
)


def config(parameters: Parameters) -> BlockDiffusionConfig:
    """The run that the parameters describe."""
    of_run = {name: parameters[name] for name in OF_RUN}
    return BlockDiffusionConfig(
        model=MODELS[parameters["model"]], seed=parameters["run_seed"], ema=EMAS[parameters["ema"]], **of_run
    )


def shapes_of(parameters: Parameters) -> Mapping[str, tuple[int, ...]]:
    """Those of the model's parameters."""
    return models.state_shapes(MODELS[parameters["model"]])


def state_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """The tensors of a run's state."""
    shapes = shapes_of(parameters)
    names = {f"{part}.{name}": shape for part in config(parameters).parts for name, shape in shapes.items()}
    return model_states.leaves(names) | {"step": Input("step", dtype="int64")}


def metrics_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """What each step reports."""
    return {name: Input(name, ("num_steps",)) for name in ("loss", "gradient_norm")}


def language_model(parameters: Parameters) -> tuple[language_models.Model, Parameters]:
    """The model's part in its own row, and a case of that."""
    model = MODELS[parameters["model"]]
    kind = next(each for each in KINDS.values() if each.config_class is type(model))
    return kind, {**parameters, **{field.name: getattr(model, field.name) for field in fields(model)}}


def flops(parameters: Parameters) -> float:
    """Three forward passes a step."""
    model, of_model = language_model(parameters)
    return 3.0 * parameters["num_steps"] * model.flops(of_model)


def moved(parameters: Parameters, itemsize: int) -> float:
    """The state read and written once a step, and the ids."""
    elements = sum(math.prod(shape) for shape in shapes_of(parameters).values())
    ids = 3 * parameters["batch_size"] * parameters["num_tokens"]
    return float(parameters["num_steps"] * (6 * itemsize * elements + 8 * ids))


def under_way(draw: Draw, parameters: Parameters) -> Tensors:
    """The middle of a run: moments as large as gradients, all second ones positive; the average is near."""
    shapes = shapes_of(parameters)
    first = {name: GRADIENT_SIZE * draw.normal(*shape) for name, shape in shapes.items()}
    second = {name: GRADIENT_SIZE**2 * (0.5 + draw.uniform(*shape)) for name, shape in shapes.items()}
    return _call(draw, parameters, first, second, int(draw.integers(2, 1000, 1)))


def fresh(draw: Draw, parameters: Parameters) -> Tensors:
    """The first steps of a run, where the corrections of Adam's moments are largest."""
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes_of(parameters).items()}
    return _call(draw, parameters, zeros, {name: each.clone() for name, each in zeros.items()}, 0)


def _call(draw: Draw, parameters: Parameters, first: Tensors, second: Tensors, step: int) -> Tensors:
    run, shapes = config(parameters), shapes_of(parameters)
    drawn = model_states.drawn(draw, shapes, tables=language_models.TABLES, around_one=language_models.NORM_SCALES)
    model = {name.removeprefix("state/"): each for name, each in drawn.items()}
    ema = {name: each * (1 + 2**-4 * draw.normal(*each.shape)) for name, each in model.items()}
    whole = {"model": model, "exp_avg": first, "exp_avg_sq": second, "momentum_buffer": first, "ema": ema}
    state = training.join_state({part: whole[part] for part in run.parts}, torch.tensor(step))
    return {f"state/{name}": each for name, each in state.items()} | _batches(draw, parameters)


def _batches(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens, packed, with prompts and padding; no label is the mask token, which may have no probability."""
    steps, batch, tokens = (parameters[name] for name in TOKENS)
    ids = draw.integers(0, MODELS[parameters["model"]].mask_token_id, steps, batch, tokens)
    is_prompt = torch.arange(tokens) < draw.integers(0, tokens // 2 + 1, steps, batch, 1)
    samples = [sdar.packed(draw, parameters)["sample_ids"] for _ in range(steps)]
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(is_prompt, IGNORED_LABEL),
        "sample_ids": torch.stack(samples),
        "example_ids": training_runs.example_ids(draw, parameters),
    }


def _all_of(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(tensors[name])}


def _first(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first sequence of a batch has that value everywhere."""

    def change(ids: torch.Tensor) -> torch.Tensor:
        changed = ids.clone()
        changed[:, :1] = value
        return changed

    return change


TRAITS = (
    Trait("int32", "dtype of input_ids", dtypes={"input_ids": "int32", "labels": "int32"}),
    Trait("one", "samples", _all_of("sample_ids", torch.zeros_like)),
    Trait("a sequence of padding", "samples", _all_of("sample_ids", _first(-1))),
    Trait("padding in front", "samples", _all_of("sample_ids", lambda ids: ids.where(torch.arange(ids.shape[2]) > 0, -1))),
    Trait("a token each", "samples", _all_of("sample_ids", lambda ids: torch.arange(ids.shape[2]).expand(ids.shape).clone())),
    Trait("a sequence without labels", "values of labels", _all_of("labels", _first(IGNORED_LABEL))),
)


def _of_norm(change: Callable[[torch.Tensor], torch.Tensor], part: str = "model") -> Callable[[Mapping[str, Any]], Tensors]:
    """The scale of the last norm, changed, in a part of the state."""

    def of_call(call: Mapping[str, Any]) -> Tensors:
        name = next(each for each in call if each.endswith(("model.model.norm.weight", "model.model.transformer.ln_f.weight")))
        own = name.removeprefix("state/model.")
        part_of_run = call["config"].moments[0] if part == "moments" else part
        return {f"state/{part_of_run}.{own}": change(call[name])}

    return of_call


NORMS = ("norm.weight", "ln_f.weight")
REJECTIONS = (
    Rejection("an infinite parameter", "loss", _of_norm(one_element(math.inf)), raises=(FloatingPointError,)),
    Rejection("a label that names no token", "labels", changed("labels", lambda each: each * 0 - 99), by_values=True),
    Rejection("a batch without examples", "input_ids", lambda call: {
        name: call[name][:, :0] for name in ("input_ids", "labels", "sample_ids", "example_ids")
    }),
    Rejection("sequences without tokens", "input_ids", lambda call: {
        name: call[name][..., :0] for name in ("input_ids", "labels", "sample_ids")
    }),
    Rejection("labels of fewer tokens", "labels", changed("labels", lambda each: torch.cat([each, each], -1))),
    Rejection("a state without its step", "step", changed("state/step", lambda each: None)),
    Rejection("a parameter of another shape", NORMS, _of_norm(lambda each: each[:-1])),
    Rejection("integer moments", NORMS, _of_norm(torch.Tensor.long, "moments")),
)  # fmt: skip
