"""What the training steps of all models share: gradients of microbatches, clipping, the optimizer, an average, saved runs.

The state of a run is a flat dict of tensors:

    model.<name>              the parameters, and what is frozen among them, which has none of the following but the last
    exp_avg.<name>            the average of their gradients that AdamW and Adam keep
    exp_avg_sq.<name>         their average of squared gradients
    momentum_buffer.<name>    in place of both, what SGD keeps
    ema.<name>                the moving average of the parameters, where the config asks for one
    num_updates.<name>        of a parameter that stacks several, as of experts, along its first axis: how many each has had
    step                      the number of updates made so far

What a run depends on is in it and in the config: what is random is drawn by (seed, step, example id, purpose).
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from gaugeblock.reference import saved_runs
from gaugeblock.reference.configs import EMAConfig, TrainingConfig
from gaugeblock.reference.torch.recomputation import blocks_recomputed

NO_ROWS: Mapping[str, torch.Tensor] = MappingProxyType({})
CLIPPING_EPSILON = 1e-6  # added to the norm by torch.nn.utils.clip_grad_norm_ (optax.clip_by_global_norm adds nothing)

Tensors = dict[str, torch.Tensor]
Shares = Callable[..., tuple[torch.Tensor, Tensors]]
RowsUsed = Callable[..., Tensors]


def all_rows(metrics: Mapping[str, torch.Tensor], *, config: TrainingConfig) -> Tensors:
    """Return no name: every parameter is updated as a whole, in every step."""
    return {}


def initial_state(
    parameters: Mapping[str, torch.Tensor],
    *,
    config: TrainingConfig,
    frozen: Container[str] = (),
    stacked: Container[str] = (),
) -> Tensors:
    """Return the state at the start of a run with these parameters: moments of 0, an average that is a copy, step 0, int64.

    Of those whose names are `frozen` there are no moments: they are not trained. Of those that are `stacked` the updates of each
    row are counted.
    """
    trained = {name: parameter for name, parameter in parameters.items() if name not in frozen}
    parts: dict[str, Tensors] = {}
    for part in config.parts:  # each with memory of its own: safetensors would refuse to write one tensor twice
        if part in ("model", "ema"):
            parts[part] = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        else:
            parts[part] = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    device = next(iter(parameters.values())).device
    rows = {name: len(parameter) for name, parameter in trained.items() if name in stacked}
    parts["num_updates"] = {name: torch.zeros(count, dtype=torch.int64, device=device) for name, count in rows.items()}
    return join_state(parts, torch.tensor(0, device=device))


def step(
    shares: Shares,
    state: Mapping[str, torch.Tensor],
    batch: Iterable[torch.Tensor | None],
    *,
    config: TrainingConfig,
    rows_used: RowsUsed = all_rows,
) -> tuple[Tensors, Tensors]:
    """Make the update of a batch that is known to be good; the given state is not written to.

    Args: as of `metrics_and_gradients` and `finish`.

    Returns:
        new_state: As state.
        metrics: Those of the batch by name, before the update, and gradient_norm.

    Raises: as `finish`.
    """
    metrics, gradients = metrics_and_gradients(shares, state, batch, config=config)
    new_state, gradient_norm = finish(state, metrics, gradients, config=config, rows_used=rows_used)
    return new_state, metrics | {"gradient_norm": gradient_norm}


def metrics_and_gradients(
    shares: Shares, state: Mapping[str, torch.Tensor], batch: Iterable[torch.Tensor | None], *, config: TrainingConfig
) -> tuple[Tensors, Tensors]:
    """Return what a step reports of a batch and the gradients, computed in microbatches whose sizes differ by one at most.

    Args:
        shares: Function of the parameters, in `compute_dtype`, and a microbatch, and by name the `batch_size` of the whole, the
            `step` and the `config`: the microbatch's share of what is minimized, [], and of each metric, by name. A mean over
            the batch's examples is the sum of such shares; the mean of the microbatches' means would favour those of small ones.
        state: As at the top of this module.
        batch: Arrays whose first axis is of the examples; None for what there is none of.
        config: Of the run.

    Returns:
        metrics: By name.
        gradients: Of what is trained, by name.
    """
    batch = list(batch)
    batch_size = next(len(each) for each in batch if each is not None)
    num_microbatches = min(config.accumulation_steps, batch_size)
    split = ([None] * num_microbatches if each is None else each.tensor_split(num_microbatches) for each in batch)
    found = (of_microbatch(shares, state, each, batch_size, config=config) for each in zip(*split, strict=True))
    return reduce(added, found)


def of_microbatch(
    shares: Shares,
    state: Mapping[str, torch.Tensor],
    microbatch: tuple[torch.Tensor | None, ...],
    batch_size: int,
    *,
    config: TrainingConfig,
) -> tuple[Tensors, Tensors]:
    """Return a microbatch's share of metrics and gradients, of a batch of that many examples."""
    model, trained = part_of_state(state, "model"), trained_names(state, config)
    leaves = {name: model[name].detach().requires_grad_() for name in trained}
    parameters = {name: in_compute_dtype(each, config) for name, each in (model | leaves).items()}
    with blocks_recomputed(config.activation_checkpointing):
        objective, some = shares(parameters, *microbatch, batch_size=batch_size, step=int(state["step"]), config=config)
    gradients = torch.autograd.grad(objective * config.loss_scale, [*leaves.values()], materialize_grads=True)
    metrics = {name: share.detach() for name, share in some.items()}
    return metrics, {name: each / config.loss_scale for name, each in zip(leaves, gradients, strict=True)}


def added(one: tuple[Tensors, Tensors], other: tuple[Tensors, Tensors]) -> tuple[Tensors, Tensors]:
    """Return the shares of two microbatches together."""
    metrics, gradients = (
        {name: each + others[name] for name, each in ours.items()} for ours, others in zip(one, other, strict=True)
    )
    return metrics, gradients


def trained_names(state: Mapping[str, torch.Tensor], config: TrainingConfig) -> list[str]:
    """Return the names of what is not frozen, of which there are moments, in an order that is not that of the dict."""
    return sorted(part_of_state(state, config.moments[0]))


def finish(
    state: Mapping[str, torch.Tensor],
    metrics: Tensors,
    gradients: Tensors,
    *,
    config: TrainingConfig,
    rows_used: RowsUsed = all_rows,
) -> tuple[Tensors, torch.Tensor]:
    """Make the update of a step, once what `metrics_and_gradients` returns is known to be finite; the given state stays.

    Args:
        state, metrics, gradients: As of it.
        config: Of the run.
        rows_used: Function of the metrics, and by name the `config`: of each stacked parameter, by name, which rows a batch had
            a use for, [rows] bool. The others are left as they are, as torch.optim leaves parameters that have no gradient.

    Returns:
        new_state: As state.
        gradient_norm: [], of all gradients together, before clipping.

    Raises:
        FloatingPointError: A metric or a gradient is not finite; the message names the step and the first bad one.
    """
    gradient_norm = global_norm(gradients)
    require_finite(state["step"], metrics, gradients, gradient_norm)
    used = rows_used(metrics, config=config)
    return update(state, gradients, gradient_norm, config=config, used=used), gradient_norm


def in_compute_dtype(tensor: torch.Tensor, config: TrainingConfig) -> torch.Tensor:
    """Return it in the dtype in which losses and gradients are computed."""
    return tensor if config.compute_dtype is None else tensor.to(getattr(torch, config.compute_dtype))


def global_norm(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the norm of all tensors together, []."""
    return torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt()


def require_finite(step: torch.Tensor, metrics: Tensors, gradients: Tensors, gradient_norm: torch.Tensor) -> None:
    """Raise FloatingPointError with the step and the first tensor that is not finite, if there is one."""
    if torch.cat([each.flatten() for each in (*metrics.values(), gradient_norm)]).isfinite().all():
        return
    tensors = metrics | {f"gradient of {name}": each for name, each in gradients.items()} | {"gradient_norm": gradient_norm}
    bad = next(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    numbers = {name: each for name, each in (metrics | {"gradient_norm": gradient_norm}).items() if each.ndim == 0}
    told = ", ".join(f"{name} {float(each)}" for name, each in numbers.items())
    raise FloatingPointError(f"step {int(step)}: {bad} is not finite ({told})")


def update(
    state: Mapping[str, torch.Tensor],
    gradients: Tensors,
    gradient_norm: torch.Tensor,
    *,
    config: TrainingConfig,
    used: Mapping[str, torch.Tensor] = NO_ROWS,
) -> Tensors:
    """Return the state after one update by torch's optimizer with clipped gradients; the given state is not written to.

        gradients = gradients * min(1, max_gradient_norm / (gradient_norm + 1e-6))
        step      = step + 1

    AdamW, and Adam, whose gradients have weight_decay * model added:

        exp_avg    = beta1 * exp_avg + (1 - beta1) * gradients
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradients**2
        update     = exp_avg / (1 - beta1**step) / (sqrt(exp_avg_sq / (1 - beta2**step)) + adam_epsilon)
        model      = model - learning_rate * update                              (Adam)
        model      = model - learning_rate * (update + weight_decay * model)     (AdamW)

    SGD, whose gradients have weight_decay * model added:

        momentum_buffer = momentum * momentum_buffer + gradients
        model           = model - learning_rate * momentum_buffer

    where learning_rate is that of the step (`learning_rate_of`). A row of a stacked parameter is a parameter of its own, whose
    step is its number of updates; it is updated where `used` says so. Then `average` makes the moving average.

    Source: clipping: Pascanu et al. (arXiv:1211.5063), algorithm 1; Loshchilov and Hutter (arXiv:1711.05101), algorithms 1 and 2,
    whose schedule multiplier is learning_rate and whose weight decay is learning_rate * weight_decay, as in torch.optim.
    """
    parts = {
        part: {name: tensor.detach().clone() for name, tensor in part_of_state(state, part).items()}
        for part in (*config.parts, "num_updates")
    }
    parts = optimizer_step(parts, clipped(gradients, gradient_norm, config=config), int(state["step"]), config=config, used=used)
    if config.ema is not None:
        parts["ema"] = average(parts["ema"], parts["model"], int(state["step"]) + 1, config=config.ema)
    return join_state(parts, state["step"] + 1)


def clipped(gradients: Tensors, gradient_norm: torch.Tensor, *, config: TrainingConfig) -> Tensors:
    """Return gradients whose norm is `max_gradient_norm` at most, of such whose norm is given."""
    factor = (config.max_gradient_norm / (gradient_norm + CLIPPING_EPSILON)).clamp(max=1)
    return {name: gradient * factor for name, gradient in gradients.items()}


def optimizer_step(
    parts: Mapping[str, Tensors],
    gradients: Tensors,
    step: int,
    *,
    config: TrainingConfig,
    used: Mapping[str, torch.Tensor] = NO_ROWS,
) -> dict[str, Tensors]:
    """Return the parts of a state after one step of torch's optimizer, which writes to them; `step` have been made before."""
    moments = [parts[part] for part in config.moments]
    # what the optimizer takes for a parameter: a whole one, or a row
    places: list[tuple[str, Any]] = [
        (name, row) for name in gradients for row in (used[name].nonzero().flatten().tolist() if name in used else [...])
    ]
    lists: list[Any] = [[each[name][row] for name, row in places] for each in (parts["model"], gradients, *moments)]
    counts = {name: parts["num_updates"][name].tolist() for name in used}
    num_updates = [counts[name][row] if name in counts else step for name, row in places]
    for name, is_used in used.items():
        parts["num_updates"][name] += is_used
    common: dict[str, Any] = {
        "foreach": False,
        "maximize": False,
        "lr": learning_rate_of(step, config),
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "sgd":
        # what torch.optim.SGD begins with is the first gradient: as much as a buffer of 0 and no dampening
        sgd(*lists, momentum=config.momentum, dampening=0.0, nesterov=False, **common)
        return dict(parts)
    run = adamw if config.optimizer == "adamw" else adam
    steps = [torch.tensor(each, device="cpu") for each in num_updates]
    run(
        *[*lists, [], steps],  # no largest second moments
        amsgrad=False,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.adam_epsilon,
        **common,
    )
    return dict(parts)


def learning_rate_of(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of the update that is made after `step` others.

        learning_rate * (step + first_warmup_step) / num_warmup_steps        step < num_warmup_steps
        learning_rate                                                        constant
        learning_rate * (final + (1 - final) * (1 - done))                   linear
        learning_rate * (final + (1 - final) * (1 + cos(pi * done)) / 2)     cosine

        final = final_learning_rate_ratio
        done = min((step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps), 1)

    Source: Loshchilov and Hutter (arXiv:1608.03983), equation 5; diffusers' optimization.py, get_scheduler: "linear", "cosine",
    which there rises again beyond its end, and "constant_with_warmup"; with first_warmup_step 1 and final_learning_rate_ratio
    0.1, the cosine of LGDLM's utils/lr.py.
    """
    rate, schedule = config.learning_rate, config.learning_rate_schedule
    if step < config.num_warmup_steps:
        return rate * (step + config.first_warmup_step) / config.num_warmup_steps
    if schedule == "constant" or config.num_training_steps is None:
        return rate
    done = min((step - config.num_warmup_steps) / max(1, config.num_training_steps - config.num_warmup_steps), 1.0)
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return rate * (config.final_learning_rate_ratio + (1 - config.final_learning_rate_ratio) * left)


def average(averages: Tensors, parameters: Tensors, step: int, *, config: EMAConfig) -> Tensors:
    """Return the moving average after the update of that number, counted from 1, which made these parameters.

    ema = ema - (1 - d) * (ema - model), with the share d as `EMAConfig` says.
    """
    decay = decay_of(step, config)
    return {name: each - (1 - decay) * (each - parameters[name]) for name, each in averages.items()}


def decay_of(step: int, config: EMAConfig) -> float:
    """Return what the average keeps of itself at the update of that number, counted from 1."""
    since = step - config.update_after_step - 1
    if since <= 0:
        return 0.0
    decay = 1 - (1 + since / config.inv_gamma) ** -config.power if config.warmup else (1 + since) / (10 + since)
    return max(min(decay, config.decay), config.min_decay)


def part_of_state(state: Mapping[str, torch.Tensor], part: str) -> Tensors:
    """Return the tensors of a state whose names begin with `part` and a dot, without that beginning."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


def join_state(parts: Mapping[str, Mapping[str, torch.Tensor]], step: torch.Tensor) -> Tensors:
    """Return the state that these are the parts of."""
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()} | {"step": step}


def save_state(state: Mapping[str, torch.Tensor], path: Path, *, config: TrainingConfig | None = None) -> None:
    """Write a state to a safetensors file, bit for bit; either framework reads it.

    The file appears under its name when it is whole: a run that is killed while it writes leaves the one that was there. It says
    of which config the run is, where one is given.
    """
    from safetensors.torch import save  # what a run needs, and the step does not

    content = save({name: tensor.contiguous() for name, tensor in state.items()}, saved_runs.metadata_of(config))
    saved_runs.write_atomically(content, path)


def load_state(path: Path, *, config: TrainingConfig | None = None) -> Tensors:
    """Read a state that `save_state` of either framework wrote; it lies on the CPU.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is cut off, or no safetensors file with a step; or it is not of the config, where one is given.
    """
    from safetensors.torch import load_file

    with saved_runs.reading(path):
        # where they lie in the file, not at 16 bytes, products of matrices have other bits than those of the run that was saved
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
        saved_runs.require_config_of_file(path, config)
    saved_runs.require_step(state, path)
    return state
