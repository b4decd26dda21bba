"""Contract of the training step of an upcycled GPT-2: state and texts in, state and metrics out.

Microbatches are no part of it: the balance loss is of each of them by itself, so a step depends on how its batch is split.
"""

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import flash_attention, model_states, training_runs
from gaugeblock.conformance.contracts import upcycled_gpt2 as of_model
from gaugeblock.conformance.contracts.biased_moe_layers import EMERGENCE
from gaugeblock.conformance.contracts.training_runs import EMAS, GRADIENT_SIZE, OPTIMIZERS, one_element
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Recurrence, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either
from gaugeblock.conformance.engine.implementation import distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors
from gaugeblock.reference.configs import IGNORED_LABEL, UPCYCLED_GPT2_PRESETS, MoELMConfig, UpcycledGPT2Config
from gaugeblock.reference.torch import train_moe_lm, training, upcycled_gpt2


@row
def train_step() -> Contract:
    """The row of `train_moe_lm.train_step`."""
    return Contract(
        name="train_moe_lm.train_step",
        summary="One update of an upcycled GPT-2: annealed noise, losses of tokens, balance and z; experts without tokens stay.",
        formula=(
            "loss = lm_loss + balance_coefficient balance_loss + z_coefficient z_loss, where lm_loss is the mean over labels "
            "that count of -log softmax(logits of the token before)[label], balance_loss = mean over layers of num_experts sum "
            "over e of load[e] mean(p[e]), z_loss = mean of logsumexp(router_logits)**2, noise is noise_std (1 - step / "
            "noised_steps) times normals drawn by (seed, step, example_ids[b]); then as train_image_diffusion.train_step, but an "
            "expert without a token, its moments and its number of updates stay, and that number is the step of its corrections"
        ),
        source=(
            "sumitdotml/moe-emergence moe_emergence/train.py; Fedus et al. 2021 (arXiv:2101.03961) equations 4 to 6; Zoph et al. "
            "2022 (arXiv:2202.08906) equation 5; torch.optim.AdamW, which skips parameters without a gradient"
        ),
        reference=train_moe_lm.train_step,
        formulas=(
            of_model.with_gelu_of_libraries(
                flash_attention.of(training_runs.with_weighted_averages(train_moe_lm.train_step), upcycled_gpt2)
            ),
        ),
        inputs=(
            Input("state", leaves=state_leaves),
            Input("input_ids", ("num_steps", "batch_size", "num_tokens"), dtype="int64", indexes="vocab_size"),
            Input("labels", ("num_steps", "batch_size", "num_tokens"), dtype="int64"),
            Input("example_ids", ("num_steps", "batch_size"), dtype="int64"),
        ),
        outputs=(Output("new_state", leaves=state_leaves), Output("metrics", leaves=metrics_leaves)),
        options=("config",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(2, 3, rates="linear", z_coefficient=1.0),
            sizes(
                1,
                2,
                num_experts=9,  # of which some have no token in one layer, and others in the other
                top_k=2,
                moe_layers=(0, 1),
                num_hidden_layers=2,
                optimizer="adam",
                ema="growing",
                run_seed=2**40 + 5,
                rates="cosine",
                noise_std=4.0,
            ),
            sizes(1, 2, optimizer="sgd", rates="endless", balance_coefficient=0.0, activation_checkpointing=True),
        ),
        factors=FACTORS,
        build=sizes,
        traits=(Trait("int32", "dtype of input_ids", dtypes={"input_ids": "int32"}),),
        regimes=(
            Regime("under way", under_way, differentiable=False),
            Regime("fresh", fresh, differentiable=False),
        ),
        chooses_inside=True,
        flops=flops,
        moved=moved,
        rigid=True,
        workloads=(
            Workload("moe-main/train-2x512", published(2, 512, UPCYCLED_GPT2_PRESETS["moe-main"]), f"{EMERGENCE} moe-main"),
            Workload("top2/train-2x512", published(2, 512, UPCYCLED_GPT2_PRESETS["top2"]), f"{EMERGENCE} top2"),
            Workload(
                "two-cores/train-narrow-gpt2-64",
                published(2, 64, UpcycledGPT2Config(2048, 192, 768, 4, 3, 128, moe_layers=(2, 3))),
                "a size for a CPU: a quarter of the small GPT-2's width",
            ),
        ),
        configure=lambda parameters: {"config": config(parameters)},
        dtypes=("float32",),
        cases=0.02,  # a budget with the moments of all parameters takes a second for each step
        recurrence=Recurrence(steps="num_steps", carried={"state": "new_state"}),
        shardings={"data_parallel": {"batch_size": "uneven"}},
        rejections=REJECTIONS,
        implementations=(
            distributed("fsdp2", devices=DEVICES, world_sizes=(2,)),
            # each number of devices takes a compilation
            distributed("jax-sharded", framework="jax", world_sizes=(4,)),
        ),
        without=training_runs.WITHOUT
        | {"nan_containment": "an example has no floating numbers: it is ids"}
        | dict.fromkeys(JUDGED_ELSEWHERE, "judged of train_image_diffusion.train_step, with which what it looks at is shared"),
    )


JUDGED_ELSEWHERE = ("hidden_state", "layout", "process_settings", "same_pointer_new_data")
OF_RUN = """optimizer learning_rate beta1 beta2 adam_epsilon momentum weight_decay max_gradient_norm activation_checkpointing
    balance_coefficient z_coefficient noise_std anneal_fraction""".split()
SHARED = {name: training_runs.ORDINARY[name] for name in OF_RUN if name in training_runs.ORDINARY}
OF_MODEL = {
    "vocab_size": 7,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 4,
    "layer_norm_eps": 1e-5,
    "moe_layers": (0,),
    "num_experts": 5,
    "top_k": 1,
}
# as of `training_runs`, and a last step, without which there is no noise
RATES = {name: {"num_training_steps": 2000} | rates for name, rates in training_runs.RATES.items()} | {"endless": {}}


def sizes(num_steps: int = 1, batch_size: int = 3, **others: Any) -> dict[str, Any]:
    """One point of the input space; all that is not given has an ordinary value."""
    of_run = {"run_seed": 0, "ema": "none", "rates": "constant", "balance_coefficient": 0.5, "z_coefficient": 0.125}
    noise = {"noise_std": 1.0, "anneal_fraction": 0.75}
    point = {"num_steps": num_steps, "batch_size": batch_size, "num_tokens": 3, **OF_MODEL, **SHARED, **of_run, **noise, **others}
    return {**point, "num_moe_layers": len(point["moe_layers"])}


def published(batch_size: int, num_tokens: int, config: UpcycledGPT2Config) -> dict[str, Any]:
    """A step of a model of that size, at the learning rates and with the coefficients of the public runs."""
    usual = {"balance_coefficient": 0.01, "z_coefficient": 0.001, "noise_std": 0.1, "anneal_fraction": 0.25}
    return sizes(1, batch_size, rates="cosine", **usual, **training_runs.USUAL, **vars(config)) | {"num_tokens": num_tokens}


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Small models, few steps; every option at its ends and between."""
    return sizes(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 4)),
        num_tokens=draw(st.integers(2, 4)),
        num_experts=draw(st.sampled_from([2, 5])),
        top_k=draw(st.sampled_from([1, 2])),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        ema=draw(st.sampled_from(list(EMAS))),
        rates=draw(st.sampled_from(list(RATES))),
        run_seed=draw(st.sampled_from([0, 2**40 + 5])),
        noise_std=draw(st.sampled_from([0.0, 1.0, 4.0])),
        balance_coefficient=draw(st.sampled_from([0.0, 0.5])),
        z_coefficient=draw(st.sampled_from([0.0, 1.0])),
        activation_checkpointing=draw(st.booleans()),
    )


FACTORS = (
    edges("batch_size", 1, 3),
    edges("num_tokens", 2, 3),
    edges("top_k", 1, 2, option=True),
    either("optimizer", *OPTIMIZERS),
    either("noise_std", 0.0, 1.0, 4.0),
    either("balance_coefficient", 0.0, 0.5),
    either("z_coefficient", 0.0, 1.0),
)


def model_config(parameters: Parameters) -> UpcycledGPT2Config:
    """The model that the parameters describe."""
    return UpcycledGPT2Config(**{name: parameters[name] for name in OF_MODEL})


def config(parameters: Parameters) -> MoELMConfig:
    """The run that the parameters describe."""
    of_run = {name: parameters[name] for name in OF_RUN} | RATES[parameters["rates"]]
    return MoELMConfig(model_config(parameters), seed=parameters["run_seed"], ema=EMAS[parameters["ema"]], **of_run)


def state_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """The tensors of a run's state."""
    run = config(parameters)
    shapes = upcycled_gpt2.state_shapes(run.model)
    parts = {f"{part}.{name}": shape for part in run.parts for name, shape in shapes.items()}
    counts = [f"num_updates.{name}" for name in upcycled_gpt2.expert_names(run.model)]
    numbers = {name: Input(name, (run.model.num_experts,), dtype="int64") for name in counts}
    return model_states.leaves(parts) | numbers | {"step": Input("step", dtype="int64")}


def metrics_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """What each step reports."""
    numbers = ("lm_loss", "balance_loss", "z_loss", "gradient_norm")
    of_layers = {
        "entropy": Input("entropy", ("num_steps", "num_moe_layers")),
        "load": Input("load", ("num_steps", "num_moe_layers", "num_experts")),
    }
    return {name: Input(name, ("num_steps",)) for name in numbers} | of_layers


def flops(parameters: Parameters) -> float:
    """Three forward passes a step."""
    return 3.0 * parameters["num_steps"] * of_model.flops(parameters)


def moved(parameters: Parameters, itemsize: int) -> float:
    """The state read and written once a step, but for experts that have no tokens."""
    run, tokens = config(parameters), parameters["batch_size"] * parameters["num_tokens"]
    shapes = upcycled_gpt2.state_shapes(run.model)
    experts = {name: shapes[name] for name in upcycled_gpt2.expert_names(run.model)}
    used = min(1.0, tokens * run.model.top_k / run.model.num_experts)
    numbers = model_states.moved(shapes) - (1 - used) * model_states.moved(experts)
    return float(itemsize * parameters["num_steps"] * 2 * len(run.parts) * numbers)


def _batches(draw: Draw, parameters: Parameters) -> Tensors:
    """Random texts; of the labels some do not count, of the last example all but its last. Token 0 is among those that do."""
    shape = tuple(parameters[name] for name in ("num_steps", "batch_size", "num_tokens"))
    input_ids = draw.integers(0, parameters["vocab_size"], *shape)
    input_ids[:, 0, 1] = 0
    labels = torch.where(draw.uniform(*shape) < 0.2, IGNORED_LABEL, input_ids)
    labels[:, -1] = IGNORED_LABEL
    labels[:, -1, -1], labels[:, 0, 1] = input_ids[:, -1, -1], 0
    return {"input_ids": input_ids, "labels": labels, "example_ids": training_runs.example_ids(draw, parameters)}


def _call(draw: Draw, parameters: Parameters, step: int, *, is_fresh: bool) -> Tensors:
    """A state at a step, and batches; the average is near, moments are as large as gradients, or 0."""
    run = config(parameters)
    drawn = of_model.dithered(draw, {**parameters, "training": True})
    model = {name: drawn[f"state/{name}"] for name in upcycled_gpt2.state_shapes(run.model)}
    noise = {name: draw.normal(*tensor.shape) for name, tensor in model.items()}
    squares = {name: 0.5 + draw.uniform(*tensor.shape) for name, tensor in model.items()}
    size = 0.0 if is_fresh else GRADIENT_SIZE
    whole = {
        "model": model,
        "ema": {name: tensor * (1 + 2**-4 * noise[name]) for name, tensor in model.items()},
        "exp_avg": {name: size * each for name, each in noise.items()},
        "exp_avg_sq": {name: size**2 * each for name, each in squares.items()},
        "momentum_buffer": {name: size * each for name, each in noise.items()},
    }
    parts = {part: whole[part] for part in run.parts}
    numbers = {} if is_fresh else {"low": 1}
    names, count = upcycled_gpt2.expert_names(run.model), run.model.num_experts
    parts["num_updates"] = {name: draw.integers(numbers.get("low", 0), step + 1, count) for name in names}
    state = training.join_state(parts, torch.tensor(step))
    return {f"state/{name}": tensor for name, tensor in state.items()} | _batches(draw, parameters)


def under_way(draw: Draw, parameters: Parameters) -> Tensors:
    """The middle of a run; experts have had updates of different numbers."""
    return _call(draw, parameters, int(draw.integers(2, 1000, 1)), is_fresh=False)


def fresh(draw: Draw, parameters: Parameters) -> Tensors:
    """The first steps of a run, where the corrections of Adam's moments are largest; some experts have had no update."""
    return _call(draw, parameters, 2, is_fresh=True)


LAST, COUNTS = "state/model.transformer.ln_f.bias", "num_updates.transformer.h.0.mlp.experts.c_fc.bias"
BATCH = ("input_ids", "labels", "example_ids")
REJECTIONS = (
    Rejection("an infinite parameter", "lm_loss", changed(LAST, one_element(torch.inf)), raises=(FloatingPointError,)),
    Rejection("no label that counts", "lm_loss", changed("labels", lambda each: 0 * each + IGNORED_LABEL),
              raises=(FloatingPointError,), by_values=True),
    Rejection("a label that names no token", "labels", changed("labels", lambda each: 0 * each + 7), by_values=True),
    Rejection("a label of -1", "labels", changed("labels", lambda each: 0 * each - 1), by_values=True),
    Rejection("texts of one token", "input_ids", lambda call: {name: call[name][..., :1] for name in BATCH[:2]}),
    Rejection("texts that are too long", "input_ids", lambda call: {
        name: torch.cat([call[name]] * 3, -1) for name in BATCH[:2]
    }),
    Rejection("a batch without examples", "input_ids", lambda call: {name: call[name][:, :0] for name in BATCH}),
    Rejection("a state without its step", "step", changed("state/step", lambda each: None)),
    Rejection("a state without numbers of updates", COUNTS, lambda call: _without(call, COUNTS)),
    Rejection("floating numbers of updates", COUNTS, lambda call: _counts(call, torch.Tensor.float)),
    Rejection("numbers of updates of too few experts", COUNTS, lambda call: _counts(call, lambda each: each[:-1])),
    Rejection("a parameter of another shape", "model.transformer.ln_f.bias", changed(LAST, lambda each: each[:-1])),
)  # fmt: skip


def _counts(call: dict[str, Any], change: Any) -> dict[str, Any]:
    """A change of the numbers of updates, where the first block has experts."""
    return {f"state/{COUNTS}": change(call[f"state/{COUNTS}"])}


def _without(call: dict[str, Any], name: str) -> dict[str, Any]:
    return {f"state/{name}": None}
