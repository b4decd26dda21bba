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

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from gaugeblock.reference import saved_runs
from gaugeblock.reference.configs import EMAConfig, TrainingConfig
from gaugeblock.reference.jax.recomputation import blocks_recomputed

NO_ROWS: Mapping[str, jax.Array] = MappingProxyType({})
CLIPPING_EPSILON = 1e-6  # added to the norm by torch.nn.utils.clip_grad_norm_ (optax.clip_by_global_norm adds nothing)
OPTAX_MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu", "momentum_buffer": "trace"}

Tensors = dict[str, jax.Array]
Shares = Callable[..., tuple[jax.Array, Tensors]]
RowsUsed = Callable[..., Tensors]


def all_rows(metrics: Mapping[str, jax.Array], *, config: TrainingConfig) -> Tensors:
    """Return no name: every parameter is updated as a whole, in every step."""
    return {}


def initial_state(
    parameters: Mapping[str, jax.Array],
    *,
    config: TrainingConfig,
    frozen: Container[str] = (),
    stacked: Container[str] = (),
) -> Tensors:
    """As `gaugeblock.reference.torch.training.initial_state`, but step and numbers of updates are int32."""
    zeros = {name: jnp.zeros_like(parameter) for name, parameter in parameters.items() if name not in frozen}
    parts = {part: parameters if part in ("model", "ema") else zeros for part in config.parts}
    rows = {name: len(parameter) for name, parameter in zeros.items() if name in stacked}
    parts["num_updates"] = {name: jnp.zeros(count, dtype=int) for name, count in rows.items()}
    return join_state(parts, jnp.array(0))


def step(
    shares: Shares,
    state: Mapping[str, jax.Array],
    batch: Iterable[jax.Array | None],
    *,
    config: TrainingConfig,
    rows_used: RowsUsed = all_rows,
) -> tuple[Tensors, Tensors]:
    """As `gaugeblock.reference.torch.training.step`."""
    metrics, gradients = metrics_and_gradients(shares, dict(state), batch, config=config)
    new_state, gradient_norm = finish(state, metrics, gradients, config=config, rows_used=rows_used)
    return new_state, metrics | {"gradient_norm": gradient_norm}


def metrics_and_gradients(
    shares: Shares, state: Mapping[str, jax.Array], batch: Iterable[jax.Array | None], *, config: TrainingConfig
) -> tuple[Tensors, Tensors]:
    """As `gaugeblock.reference.torch.training.metrics_and_gradients`, but shares is a function of a module."""
    batch = list(batch)
    batch_size = next(len(each) for each in batch if each is not None)
    num_microbatches = min(config.accumulation_steps, batch_size)
    split = ([None] * num_microbatches if each is None else jnp.array_split(each, num_microbatches) for each in batch)
    # compiled once for each size of a microbatch, of which there are two at most, and not for each number of them
    of_one = replace(config, accumulation_steps=1)
    found = (of_microbatch(shares, state, each, jnp.array(batch_size), config=of_one) for each in zip(*split, strict=True))
    return reduce(added, found)


@partial(jax.jit, static_argnames=("shares", "config"))
def of_microbatch(
    shares: Shares,
    state: Mapping[str, jax.Array],
    microbatch: tuple[jax.Array | None, ...],
    batch_size: jax.Array,
    *,
    config: TrainingConfig,
) -> tuple[Tensors, Tensors]:
    """Return a microbatch's share of metrics and gradients, of a batch of that many examples."""
    model, trained = part_of_state(state, "model"), trained_names(state, config)

    def scaled(leaves: Tensors) -> tuple[jax.Array, Tensors]:
        parameters = {name: in_compute_dtype(each, config) for name, each in (model | leaves).items()}
        with blocks_recomputed(config.activation_checkpointing):
            objective, some = shares(parameters, *microbatch, batch_size=batch_size, step=state["step"], config=config)
        return objective * config.loss_scale, OrderedDict(some)  # jit sorts a dict

    gradients, metrics = jax.grad(scaled, has_aux=True)({name: model[name] for name in trained})
    return metrics, {name: gradient / config.loss_scale for name, gradient in gradients.items()}


@jax.jit
def added(one: tuple[Tensors, Tensors], other: tuple[Tensors, Tensors]) -> tuple[Tensors, Tensors]:
    """Return the shares of two microbatches together."""
    return jax.tree.map(jnp.add, one, other)


def trained_names(state: Mapping[str, jax.Array], config: TrainingConfig) -> list[str]:
    """As `gaugeblock.reference.torch.training.trained_names`."""
    return sorted(part_of_state(state, config.moments[0]))


def finish(
    state: Mapping[str, jax.Array],
    metrics: Tensors,
    gradients: Tensors,
    *,
    config: TrainingConfig,
    rows_used: RowsUsed = all_rows,
) -> tuple[Tensors, jax.Array]:
    """As `gaugeblock.reference.torch.training.finish`."""
    gradients = {name: gradients[name] for name in trained_names(state, config)}
    gradient_norm = global_norm(gradients)
    require_finite(state["step"], metrics, gradients, gradient_norm)
    used = rows_used(metrics, config=config)
    return update(state, gradients, gradient_norm, config=config, used=used), gradient_norm


def in_compute_dtype(tensor: jax.Array, config: TrainingConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.training.in_compute_dtype`."""
    return tensor if config.compute_dtype is None else tensor.astype(config.compute_dtype)


@jax.jit
def global_norm(tensors: Mapping[str, jax.Array]) -> jax.Array:
    """Return the norm of all tensors together, []."""
    squares = jnp.stack([jnp.square(tensor).sum() for tensor in tensors.values()]).sum()
    return jnp.sqrt(jax.lax.optimization_barrier(squares))  # of one number XLA would take the magnitude, which cannot overflow


def require_finite(step: jax.Array, metrics: Tensors, gradients: Tensors, gradient_norm: jax.Array) -> None:
    """Raise FloatingPointError with the step and the first tensor that is not finite, if there is one."""
    if jnp.isfinite(jnp.concatenate([each.ravel() for each in (*metrics.values(), gradient_norm)])).all():
        return
    tensors = metrics | {f"gradient of {name}": each for name, each in gradients.items()} | {"gradient_norm": gradient_norm}
    bad = next(name for name, tensor in tensors.items() if not jnp.isfinite(tensor).all())
    numbers = {name: each for name, each in (metrics | {"gradient_norm": gradient_norm}).items() if each.ndim == 0}
    told = ", ".join(f"{name} {float(each)}" for name, each in numbers.items())
    raise FloatingPointError(f"step {int(step)}: {bad} is not finite ({told})")


@partial(jax.jit, static_argnames="config")
def update(
    state: Mapping[str, jax.Array],
    gradients: Tensors,
    gradient_norm: jax.Array,
    *,
    config: TrainingConfig,
    used: Mapping[str, jax.Array] = NO_ROWS,
) -> Tensors:
    """As `gaugeblock.reference.torch.training.update`, but by optax."""
    parts = {part: part_of_state(state, part) for part in (*config.parts, "num_updates")}
    parts = optimizer_step(parts, clipped(gradients, gradient_norm, config=config), state["step"], config=config, used=used)
    if config.ema is not None:
        parts["ema"] = average(parts["ema"], parts["model"], state["step"] + 1, config=config.ema)
    return join_state(parts, state["step"] + 1)


def clipped(gradients: Tensors, gradient_norm: jax.Array, *, config: TrainingConfig) -> Tensors:
    """Return gradients whose norm is `max_gradient_norm` at most, of such whose norm is given."""
    factor = jnp.minimum(config.max_gradient_norm / (gradient_norm + CLIPPING_EPSILON), 1)
    return {name: gradient * factor for name, gradient in gradients.items()}


def optimizer_step(
    parts: Mapping[str, Tensors],
    gradients: Tensors,
    step: jax.Array,
    *,
    config: TrainingConfig,
    used: Mapping[str, jax.Array] = NO_ROWS,
) -> dict[str, Tensors]:
    """As `gaugeblock.reference.torch.training.optimizer_step`, but of optax's, and nothing is written to."""
    adam = {"b1": config.beta1, "b2": config.beta2, "eps": config.adam_epsilon}
    rate = learning_rate_of(step, config)
    if not isinstance(rate, float):
        rate = rate.astype(next(iter(gradients.values())).dtype)
    if config.optimizer == "adamw":
        optimizer = optax.adamw(rate, weight_decay=config.weight_decay, **adam)
    else:
        is_sgd = config.optimizer == "sgd"
        plain = optax.sgd(rate, config.momentum) if is_sgd else optax.adam(rate, **adam)
        optimizer = optax.chain(optax.add_decayed_weights(config.weight_decay), plain)

    def updated(own: dict[str, Tensors], gradients: Tensors, step: jax.Array) -> dict[str, Tensors]:
        counted = {} if config.optimizer == "sgd" else {"count": step}
        moments = {OPTAX_MOMENTS[part]: own[part] for part in config.moments}
        kept = optax.tree_utils.tree_set(optimizer.init(own["model"]), **counted, **moments)
        with jax.enable_x64(True):  # optax's 1 - beta2**step: float32 would leave it four digits at step 1, and torch has sixteen
            updates, kept = optimizer.update(gradients, kept, own["model"])
        new_moments = {part: optax.tree_utils.tree_get(kept, OPTAX_MOMENTS[part]) for part in config.moments}
        return {"model": optax.apply_updates(own["model"], updates), **new_moments}

    def parts_of(names: Iterable[str]) -> dict[str, Tensors]:
        return {part: {name: parts[part][name] for name in names} for part in ("model", *config.moments)}

    whole = [name for name in gradients if name not in used]
    new = updated(parts_of(whole), {name: gradients[name] for name in whole}, step)
    num_updates = dict(parts["num_updates"])
    for name, is_used in used.items():
        rows = jax.vmap(updated)(parts_of([name]), {name: gradients[name]}, num_updates[name])
        for part, tensors in rows.items():
            is_row_used = is_used.reshape(-1, *(1 for _ in tensors[name].shape[1:]))
            new[part][name] = jnp.where(is_row_used, tensors[name], parts[part][name])
        num_updates[name] = num_updates[name] + is_used
    return {**parts, **{part: parts[part] | tensors for part, tensors in new.items()}, "num_updates": num_updates}


def learning_rate_of(step: jax.Array, config: TrainingConfig) -> jax.Array | float:
    """As `gaugeblock.reference.torch.training.learning_rate_of`, but an array, of float64, where the step matters."""
    rate, warmup, end = config.learning_rate, config.num_warmup_steps, config.num_training_steps
    if warmup == 0 and config.learning_rate_schedule == "constant":
        return rate
    with jax.enable_x64(True):
        steps = jnp.asarray(step).astype(jnp.float64)
        done = jnp.clip((steps - warmup) / max(1, (end or 0) - warmup), 0, 1)
        left = {"constant": jnp.ones_like(done), "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}
        final = config.final_learning_rate_ratio
        fallen = rate * (final + (1 - final) * left[config.learning_rate_schedule])
        return jnp.where(steps < warmup, rate * (steps + config.first_warmup_step) / max(1, warmup), fallen)


def average(averages: Tensors, parameters: Tensors, step: jax.Array, *, config: EMAConfig) -> Tensors:
    """As `gaugeblock.reference.torch.training.average`."""
    with jax.enable_x64(True):  # 1 - decay: of 1 - 0.9999 in float32 four digits would be left
        share = (1 - decay_of(step, config)).astype(next(iter(parameters.values())).dtype)
    return {name: each - share * (each - parameters[name]) for name, each in averages.items()}


def decay_of(step: jax.Array, config: EMAConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.training.decay_of`."""
    with jax.enable_x64(True):
        since = jnp.maximum(step - config.update_after_step - 1, 0).astype(jnp.float64)
        decay = 1 - (1 + since / config.inv_gamma) ** -config.power if config.warmup else (1 + since) / (10 + since)
        return jnp.where(since > 0, jnp.clip(decay, config.min_decay, config.decay), 0.0)


def part_of_state(state: Mapping[str, jax.Array], part: str) -> Tensors:
    """Return the tensors of a state whose names begin with `part` and a dot, without that beginning."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


def join_state(parts: Mapping[str, Mapping[str, jax.Array]], step: jax.Array) -> Tensors:
    """Return the state that these are the parts of."""
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()} | {"step": step}


def save_state(state: Mapping[str, jax.Array], path: Path, *, config: TrainingConfig | None = None) -> None:
    """As `gaugeblock.reference.torch.training.save_state`."""
    from safetensors.flax import save  # what a run needs, and the step does not

    saved_runs.write_atomically(save(dict(state), saved_runs.metadata_of(config)), path)


def load_state(path: Path, *, config: TrainingConfig | None = None) -> Tensors:
    """As `gaugeblock.reference.torch.training.load_state`, but int64 becomes int32 unless x64 is enabled."""
    from safetensors.flax import load_file

    with saved_runs.reading(path):
        state = load_file(path)
        saved_runs.require_config_of_file(path, config)
    saved_runs.require_step(state, path)
    return state
