"""One training step of a class-conditional image diffusion transformer on rectified flow.

The state of a run is a flat dict of tensors:

    model.<name>        the parameters, named as in `dit.dit`
    exp_avg.<name>      AdamW's average of their gradients
    exp_avg_sq.<name>   AdamW's average of their squared gradients
    step                the number of updates made so far

With it and a config goes all that a run depends on: an example's noise, time and dropped label are drawn by
(seed, step, example id, purpose), whatever batch, microbatch or rank it is in.

Shapes: B batch_size, C in_channels, H and W height and width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import ImageDiffusionConfig
from gaugeblock.reference.jax import dit, objectives, random

CLIPPING_EPSILON = 1e-6  # added to the norm by torch.nn.utils.clip_grad_norm_ (optax.clip_by_global_norm adds nothing)

Tensors = dict[str, jax.Array]


@dataclass(frozen=True)
class Metrics:
    """As `gaugeblock.reference.torch.train_image_diffusion.Metrics`."""

    loss: jax.Array
    gradient_norm: jax.Array


def initial_state(config: ImageDiffusionConfig) -> Tensors:
    """As `gaugeblock.reference.torch.train_image_diffusion.initial_state`, but step is an int32."""
    parameters = dit.initial_state(config.model, seed=config.seed)
    zeros = {name: jnp.zeros_like(parameter) for name, parameter in parameters.items()}
    return join_state(parameters, zeros, zeros, jnp.array(0))


def train_step(
    state: Mapping[str, jax.Array],
    images: jax.Array,
    labels: jax.Array,
    example_ids: jax.Array,
    *,
    config: ImageDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """As `gaugeblock.reference.torch.train_image_diffusion.train_step`."""
    validation.image_diffusion_step(state, images, labels, example_ids, config.model, dit.state_shapes(config.model))

    parameters = {name: state[f"model.{name}"] for name in dit.state_shapes(config.model)}
    loss, gradients = loss_and_gradients(parameters, images, labels, example_ids, state["step"], config=config)
    gradients = {name: gradients[name] for name in parameters}  # jit sorts them
    gradient_norm = global_norm(gradients)
    require_finite(state["step"], loss, gradients, gradient_norm)
    return adamw_update(state, gradients, gradient_norm, config=config), Metrics(loss, gradient_norm)


@partial(jax.jit, static_argnames="config")
def loss_and_gradients(
    parameters: Tensors,
    images: jax.Array,
    labels: jax.Array,
    example_ids: jax.Array,
    step: jax.Array,
    *,
    config: ImageDiffusionConfig,
) -> tuple[jax.Array, Tensors]:
    """Return the mean loss of a batch and its gradients, computed in microbatches whose sizes differ by one at most."""
    batch_size = images.shape[0]
    num_microbatches = min(config.accumulation_steps, batch_size)

    def share_of_loss(parameters: Tensors, images: jax.Array, labels: jax.Array, example_ids: jax.Array) -> jax.Array:
        # over the examples of the whole batch: a mean of the microbatches' means would favour those of small ones
        return example_losses(parameters, images, labels, example_ids, step, config=config).sum() / batch_size

    loss = jnp.zeros((), images.dtype)
    gradients = {name: jnp.zeros_like(parameter) for name, parameter in parameters.items()}
    microbatches = (jnp.array_split(each, num_microbatches) for each in (images, labels, example_ids))
    for some_images, some_labels, some_ids in zip(*microbatches, strict=True):
        share, shares = jax.value_and_grad(share_of_loss)(parameters, some_images, some_labels, some_ids)
        loss = loss + share
        gradients = {name: gradient + shares[name] for name, gradient in gradients.items()}
    return loss, gradients


def example_losses(
    parameters: Tensors,
    images: jax.Array,
    labels: jax.Array,
    example_ids: jax.Array,
    step: jax.Array,
    *,
    config: ImageDiffusionConfig,
) -> jax.Array:
    """Return the loss of each example, [batch_size], at the noise, the time and the label drawn for it in this step."""
    noise_BCHW, times_B, is_dropped_B = draws(images, example_ids, step, config=config)
    labels_B = jnp.where(is_dropped_B, config.model.num_classes, labels.astype(int))

    noised_BCHW = objectives.rectified_flow_interpolate(images, noise_BCHW, times_B)
    velocity_BCHW = dit.dit(parameters, noised_BCHW, objectives.TIMESTEPS * times_B, labels_B, config=config.model)
    return objectives.rectified_flow_loss(velocity_BCHW, images, noise_BCHW, velocity=config.velocity)


def draws(
    images: jax.Array, example_ids: jax.Array, step: jax.Array, *, config: ImageDiffusionConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.train_image_diffusion.draws`."""
    key: dict[str, Any] = {"seed": config.seed, "step": step}
    noise_BCHW = random.normal(images.shape[1:], **key, example=example_ids, purpose=purposes.TRAINING_NOISE)
    draw_time = random.uniform if config.timestep_sampling == "uniform" else random.normal
    times_B = draw_time((), **key, example=example_ids, purpose=purposes.TRAINING_TIMES).astype(images.dtype)
    if config.timestep_sampling == "logit-normal":
        times_B = jax.nn.sigmoid(times_B)
    is_dropped_B = random.uniform((), **key, example=example_ids, purpose=purposes.LABEL_DROPOUT) < config.label_dropout
    return noise_BCHW.astype(images.dtype), times_B, is_dropped_B


def global_norm(tensors: Tensors) -> jax.Array:
    """Return the norm of all tensors together, []."""
    return jnp.sqrt(jnp.stack([jnp.square(tensor).sum() for tensor in tensors.values()]).sum())


def require_finite(step: jax.Array, loss: jax.Array, gradients: Tensors, gradient_norm: jax.Array) -> None:
    """Raise FloatingPointError with the step and the first tensor that is not finite, if there is one."""
    if jnp.isfinite(jnp.stack([loss, gradient_norm])).all():
        return
    tensors = {"loss": loss, **{f"gradient of {name}": each for name, each in gradients.items()}, "gradient_norm": gradient_norm}
    bad = next(name for name, tensor in tensors.items() if not jnp.isfinite(tensor).all())
    raise FloatingPointError(f"step {int(step)}: {bad} is not finite (loss {float(loss)}, gradient_norm {float(gradient_norm)})")


@partial(jax.jit, static_argnames="config")
def adamw_update(
    state: Mapping[str, jax.Array], gradients: Tensors, gradient_norm: jax.Array, *, config: ImageDiffusionConfig
) -> Tensors:
    """As `gaugeblock.reference.torch.train_image_diffusion.adamw_update`, but by optax.adamw."""
    clipping_factor = jnp.minimum(config.max_gradient_norm / (gradient_norm + CLIPPING_EPSILON), 1)
    parameters, exp_avg, exp_avg_sq = (part_of_state(state, part) for part in ("model", "exp_avg", "exp_avg_sq"))
    optimizer = optax.adamw(
        learning_rate=config.learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    moments = optax.tree_utils.tree_set(optimizer.init(parameters), count=state["step"], mu=exp_avg, nu=exp_avg_sq)
    clipped = {name: gradient * clipping_factor for name, gradient in gradients.items()}
    with jax.enable_x64(True):  # optax's 1 - beta2**step: float32 would leave it four digits at step 1, and torch has sixteen
        updates, moments = optimizer.update(clipped, moments, parameters)
    exp_avg, exp_avg_sq = (optax.tree_utils.tree_get(moments, name) for name in ("mu", "nu"))
    return join_state(optax.apply_updates(parameters, updates), exp_avg, exp_avg_sq, state["step"] + 1)


def part_of_state(state: Mapping[str, jax.Array], part: str) -> Tensors:
    """Return the tensors of a state whose names begin with `part` and a dot, without that beginning."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


def join_state(parameters: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, step: jax.Array) -> Tensors:
    """Return the state that these are the parts of."""
    parts = {"model": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()} | {"step": step}


def save_state(state: Mapping[str, jax.Array], path: Path) -> None:
    """Write a state to a safetensors file, bit for bit; either framework reads it."""
    from safetensors.flax import save_file  # what a run needs, and the step does not

    save_file(dict(state), path)


def load_state(path: Path) -> Tensors:
    """As `gaugeblock.reference.torch.train_image_diffusion.load_state`, but int64 becomes int32 unless x64 is enabled."""
    from safetensors.flax import load_file

    return load_file(path)
