"""What the contracts of training steps have in common: options of runs, their states, and where in a run a case stands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args
from unittest import mock

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.engine.contract import Input, Regime
from gaugeblock.conformance.engine.factors import Factor, edges, either
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import EMAConfig, ImageDiffusionConfig, ImageModelConfig, Optimizer, TimestepSampling
from gaugeblock.reference.configs.image_diffusion import PREDICTION_TYPES
from gaugeblock.reference.torch import image_models, train_image_diffusion, training

OF_RUN = """optimizer learning_rate beta1 beta2 adam_epsilon momentum weight_decay max_gradient_norm label_dropout prediction_type
    velocity timestep_sampling bias_multiplier min_snr_gamma snr accumulation_steps activation_checkpointing loss_scale""".split()
# what an average keeps of itself: as much as the updates made so far say, and as much as it ever does
EMAS = {"none": None, "growing": EMAConfig(warmup=True, update_after_step=1, inv_gamma=2.0), "capped": EMAConfig(decay=0.75)}
# learning rates that rise, stay and fall where the regimes below stand: at the beginning, and in the first thousand steps
RATES: dict[str, dict[str, Any]] = {
    "constant": {},
    "warming": {"num_warmup_steps": 1000},
    "linear": {"learning_rate_schedule": "linear", "num_training_steps": 1500},
    "cosine": {"learning_rate_schedule": "cosine", "num_warmup_steps": 2, "num_training_steps": 1200},
}
SAMPLINGS, OPTIMIZERS = get_args(TimestepSampling), get_args(Optimizer)
USUAL = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.01}
GRADIENT_SIZE = 0.03  # of one element, in the regimes below: moments have it, and adam_epsilon is not far from it
# adam_epsilon is of the gradients' size: with the usual 1e-8, Adam's first update is the gradient's sign, without its magnitude
ORDINARY: dict[str, Any] = {
    "accumulation_steps": 1,
    "loss_scale": 1.0,
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
    "rates": "constant",
    "activation_checkpointing": False,
    "prediction_type": "flow_prediction",
    "velocity": "noise - data",
    "timestep_sampling": "uniform",
    "bias_multiplier": 4.0,
    "min_snr_gamma": None,
    "snr": "data over noise",
}


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Few steps, batches that microbatches divide unevenly; every option of a run at its ends and between."""
    drawn = {
        "num_steps": draw(st.integers(1, 3)),
        "batch_size": draw(st.integers(1, 6)),
        "accumulation_steps": draw(st.integers(1, 3)),
        "loss_scale": draw(st.sampled_from([1.0, 2.0**7])),
        "run_seed": draw(st.sampled_from([0, 2**40 + 5])),
        "adam_epsilon": draw(st.sampled_from([2**-8, 2**-5])),
        "weight_decay": draw(st.sampled_from([0.0, 2**-3])),
        "max_gradient_norm": draw(st.sampled_from([2**-10, 0.25, 100.0])),
        "label_dropout": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "velocity": draw(st.sampled_from(["noise - data", "data - noise"])),
        "timestep_sampling": draw(st.sampled_from(SAMPLINGS)),
        "optimizer": draw(st.sampled_from(OPTIMIZERS)),
        "ema": draw(st.sampled_from(list(EMAS))),
        "rates": draw(st.sampled_from(list(RATES))),
        "activation_checkpointing": draw(st.booleans()),
        "prediction_type": draw(st.sampled_from(PREDICTION_TYPES)),
        "min_snr_gamma": draw(st.sampled_from([None, 0.5, 5.0])),
        "snr": draw(st.sampled_from(["data over noise", "noise over data"])),
    }
    return drawn | draw(st.sampled_from([{}, {}, {}, USUAL]))


FACTORS: tuple[Factor, ...] = (
    edges("num_steps", 1, 2),
    edges("batch_size", 1, 2, 3, 5),
    edges("accumulation_steps", 1, 2, 3, option=True),
    either("loss_scale", 1.0, 2.0**7),
    either("run_seed", 0, 2**40 + 5),
    either("adam_epsilon", 2**-8, 2**-5),
    either("weight_decay", 0.0, 2**-3),
    either("max_gradient_norm", 2**-10, 0.25, 100.0),
    either("label_dropout", 0.0, 0.5, 1.0),
    either("velocity", "noise - data", "data - noise"),
    either("timestep_sampling", *SAMPLINGS),
    either("optimizer", *OPTIMIZERS),
    either("ema", *EMAS),
    either("rates", *RATES),
    either("activation_checkpointing", False, True),
    either("prediction_type", *PREDICTION_TYPES),
    either("min_snr_gamma", None, 0.5, 5.0),
    either("snr", "data over noise", "noise over data"),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Runs:
    """Training runs of a kind of model: their states, and the regimes of their cases."""

    model_config: Callable[[Parameters], ImageModelConfig]
    """The model that the parameters describe."""
    draw_model: Callable[[Draw, Parameters], Tensors]
    """Parameters of a model that has been trained, by name."""
    draw_batches: Callable[[Draw, Parameters], Tensors]
    """The other arguments, with images and example_ids."""
    ends: tuple[str, ...]
    """Names of the parameters of the last layer."""

    def config(self, parameters: Parameters) -> ImageDiffusionConfig:
        """The run that the parameters describe."""
        of_run = {name: parameters[name] for name in OF_RUN} | RATES[parameters["rates"]]
        ema = EMAS[parameters["ema"]]
        return ImageDiffusionConfig(self.model_config(parameters), seed=parameters["run_seed"], ema=ema, **of_run)

    def parts(self, parameters: Parameters) -> dict[str, list[str]]:
        """The names that each part of a state has."""
        names = list(image_models.state_shapes(self.model_config(parameters)))
        frozen = image_models.frozen_names(self.model_config(parameters))
        trained = [name for name in names if name not in frozen]
        return {part: names if part in ("model", "ema") else trained for part in self.config(parameters).parts}

    def state_leaves(self, parameters: Parameters) -> Mapping[str, Input]:
        """The tensors of a run's state."""
        shapes = image_models.state_shapes(self.model_config(parameters))
        names = {f"{part}.{name}": shapes[name] for part, of_part in self.parts(parameters).items() for name in of_part}
        return {name: Input(name, shape) for name, shape in names.items()} | {"step": Input("step", dtype="int64")}

    def regimes(self) -> tuple[Regime, ...]:
        """Where in a run a case stands."""
        return (
            Regime("under way", self.under_way, differentiable=False),
            Regime("fresh", self.fresh, differentiable=False),
            Regime("constant-probing", self.converged, differentiable=False),
        )

    def under_way(self, draw: Draw, parameters: Parameters) -> Tensors:
        """The middle of a run: moments as large as gradients, all second ones positive; the average is near."""
        model = self.draw_model(draw, parameters)
        exp_avg = {name: GRADIENT_SIZE * draw.normal(*tensor.shape) for name, tensor in model.items()}
        exp_avg_sq = {name: GRADIENT_SIZE**2 * (0.5 + draw.uniform(*tensor.shape)) for name, tensor in model.items()}
        moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "momentum_buffer": exp_avg}
        step = int(draw.integers(2, 1000, 1))
        return self._call(draw, parameters, model, moments, step)

    def fresh(self, draw: Draw, parameters: Parameters) -> Tensors:
        """The first steps of a run, where the corrections of Adam's moments are largest.

        They are the first in which a parameter moves and the average is no copy, which is exact or not by how it is written.
        """
        model = self.draw_model(draw, parameters)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq", "momentum_buffer"), zeros)
        warming = min(1, RATES[parameters["rates"]].get("num_warmup_steps", 0))
        return self._call(draw, parameters, model, moments, warming if parameters["ema"] == "none" else 2)

    def converged(self, draw: Draw, parameters: Parameters) -> Tensors:
        """Images that are nearly the noise drawn for them, and a model that says so: gradients are small, perhaps too small to be
        clipped; moments are 0, so that they show what the clipping adds to the norm.
        """
        tensors = self.fresh(draw, parameters)
        for name in self.ends:
            tensors[f"state/model.{name}"] = tensors[f"state/model.{name}"] * 2**-6
        for index, (images, example_ids) in enumerate(zip(tensors["images"], tensors["example_ids"], strict=True)):
            step = int(tensors["state/step"]) + index
            noise, _, _ = train_image_diffusion.draws(images, example_ids, step, config=self.config(parameters))
            tensors["images"][index] = noise + 2**-6 * images
        return tensors

    def _call(self, draw: Draw, parameters: Parameters, model: Tensors, moments: Mapping[str, Tensors], step: int) -> Tensors:
        ema = {name: tensor * (1 + 2**-4 * draw.normal(*tensor.shape)) for name, tensor in model.items()}
        whole = {"model": model, "ema": ema, **moments}
        parts = {part: {name: whole[part][name] for name in names} for part, names in self.parts(parameters).items()}
        state = training.join_state(parts, torch.tensor(step))
        return {f"state/{name}": tensor for name, tensor in state.items()} | self.draw_batches(draw, parameters)


def example_ids(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Of each step; the last example of a batch has the id of the first, as when data are repeated, and so its draws."""
    ids = draw.integers(0, 2**32, parameters["num_steps"], parameters["batch_size"])
    ids[:, -1] = ids[:, 0]
    return ids


def metrics_leaves(parameters: Parameters) -> Mapping[str, Input]:
    """What each step reports."""
    return {name: Input(name, ("num_steps",)) for name in ("loss", "auxiliary_loss", "gradient_norm")}


def with_weighted_averages(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step whose averages, of parameters and of gradients, are made as many trainers make them: by two numbers of float32.

    Equal in exact arithmetic. Where an average and what it takes in are alike, this rounds more, and what such a number is off
    by, all elements share; where one is far larger, the reference's difference rounds more. Of a gradient that is 0, torch's
    difference may need no rounding at all.
    """

    def weighted(averages: Tensors, parameters: Tensors, number: int, *, config: EMAConfig) -> Tensors:
        kept = training.decay_of(number, config)
        return {name: kept * each + (1 - kept) * parameters[name] for name, each in averages.items()}

    def formula(*arguments: Any, **options: Any) -> Any:
        adams: dict[str, Any] = {
            "adam": partial(_weighted_adam, decays_beside=False),
            "adamw": partial(_weighted_adam, decays_beside=True),
        }
        with mock.patch.multiple(training, average=weighted, **adams):
            return step(*arguments, **options)

    return formula


def _weighted_adam(
    parameters: list[torch.Tensor], gradients: list[torch.Tensor], firsts: list[torch.Tensor], seconds: list[torch.Tensor],
    _: list[torch.Tensor], steps: list[torch.Tensor], *, decays_beside: bool, beta1: float, beta2: float, eps: float, lr: float,
    weight_decay: float, **others: Any,
) -> None:  # fmt: skip
    """As torch.optim's functions of Adam and AdamW."""
    for parameter, gradient, first, second, step in zip(parameters, gradients, firsts, seconds, steps, strict=True):
        decay = weight_decay * parameter
        taken = gradient if decays_beside else gradient + decay
        first.copy_(beta1 * first + (1 - beta1) * taken)
        second.copy_(beta2 * second + (1 - beta2) * taken * taken)
        number = int(step) + 1
        update = first / (1 - beta1**number) / ((second / (1 - beta2**number)).sqrt() + eps)
        parameter.sub_(lr * (update + decay if decays_beside else update))


def one_element(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor's copy whose last element has that value."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


WITHOUT = {
    "batch_invariance": "the loss is that of a whole batch",
    "nan_containment": "a batch with a NaN is rejected as a whole",
    "empty_and_one": "a batch without examples is rejected",
    "grad_modes": "a training step takes gradients, which inference_mode rules out",
}
