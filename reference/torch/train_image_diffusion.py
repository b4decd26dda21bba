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
from pathlib import Path

import torch
from torch.optim.adamw import adamw

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import ImageDiffusionConfig
from gaugeblock.reference.torch import dit, objectives, random

CLIPPING_EPSILON = 1e-6  # added to the norm by torch.nn.utils.clip_grad_norm_ (optax.clip_by_global_norm adds nothing)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Metrics:
    """What a step reports.

    Attributes:
        loss: [], the mean over the examples of the batch, before the update.
        gradient_norm: [], the norm of all gradients together, before clipping.
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor


def initial_state(config: ImageDiffusionConfig) -> Tensors:
    """Return the state at the start of a run: a new model, moments of zero, step 0; float32, and an int64 step."""
    parameters = dit.initial_state(config.model, seed=config.seed)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    return join_state(parameters, zeros, zeros, torch.tensor(0))


def train_step(
    state: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: ImageDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """Make one update of AdamW on the mean loss of a batch; the given state is not written to.

        loss, gradients = mean over b of loss[b], and its gradients
        gradient_norm   = sqrt(sum of gradients**2)
        gradients       = gradients * min(1, max_gradient_norm / (gradient_norm + 1e-6))
        exp_avg         = beta1 * exp_avg + (1 - beta1) * gradients
        exp_avg_sq      = beta2 * exp_avg_sq + (1 - beta2) * gradients**2
        step            = step + 1
        update          = exp_avg / (1 - beta1**step) / (sqrt(exp_avg_sq / (1 - beta2**step)) + adam_epsilon)
        model           = model - learning_rate * (update + weight_decay * model)

    Args:
        state: As at the top of this module; float32 or float64, with an integer step.
        images: [batch_size, in_channels, input_size, input_size], dtype of the state: the data, pixels or latents.
        labels: [batch_size], integer in 0..num_classes - 1.
        example_ids: [batch_size], integer in 0..2**32 - 1; examples with the same id get the same draws.
        config: Of the run.

    Returns:
        new_state: As state.
        metrics: In the dtype of the state.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `state` is not a dict of arrays.
        ValueError: Shapes or devices do not fit together, or `state` lacks an entry or has one too many.
        FloatingPointError: The loss or a gradient is not finite; the message names the step and the first bad one.

    Source: Esser et al. (arXiv:2403.03206), section 2; label dropout: Ho and Salimans (arXiv:2207.12598), algorithm 1;
    clipping: Pascanu et al. (arXiv:1211.5063), algorithm 1; AdamW: Loshchilov and Hutter (arXiv:1711.05101), algorithm 2,
    whose schedule multiplier is learning_rate and whose weight decay is learning_rate * weight_decay, as in torch.optim.
    """
    validation.image_diffusion_step(state, images, labels, example_ids, config.model, dit.state_shapes(config.model))

    parameters = {name: state[f"model.{name}"] for name in dit.state_shapes(config.model)}
    loss, gradients = loss_and_gradients(parameters, images, labels, example_ids, int(state["step"]), config=config)
    gradient_norm = global_norm(gradients)
    require_finite(state["step"], loss, gradients, gradient_norm)
    return adamw_update(state, gradients, gradient_norm, config=config), Metrics(loss, gradient_norm)


def loss_and_gradients(
    parameters: Tensors,
    images: torch.Tensor,
    labels: torch.Tensor,
    example_ids: torch.Tensor,
    step: int,
    *,
    config: ImageDiffusionConfig,
) -> tuple[torch.Tensor, Tensors]:
    """Return the mean loss of a batch and its gradients, computed in microbatches whose sizes differ by one at most."""
    batch_size = images.shape[0]
    num_microbatches = min(config.accumulation_steps, batch_size)
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}

    loss = images.new_zeros(())
    gradients = [torch.zeros_like(parameter) for parameter in parameters.values()]
    microbatches = (each.tensor_split(num_microbatches) for each in (images, labels, example_ids))
    for some_images, some_labels, some_ids in zip(*microbatches, strict=True):
        # over the examples of the whole batch: a mean of the microbatches' means would favour those of small ones
        share = example_losses(parameters, some_images, some_labels, some_ids, step, config=config).sum() / batch_size
        loss = loss + share.detach()
        shares = torch.autograd.grad(share, [*parameters.values()])
        gradients = [gradient + each for gradient, each in zip(gradients, shares, strict=True)]
    return loss, dict(zip(parameters, gradients, strict=True))


def example_losses(
    parameters: Tensors,
    images: torch.Tensor,
    labels: torch.Tensor,
    example_ids: torch.Tensor,
    step: int,
    *,
    config: ImageDiffusionConfig,
) -> torch.Tensor:
    """Return the loss of each example, [batch_size], at the noise, the time and the label drawn for it in this step."""
    noise_BCHW, times_B, is_dropped_B = draws(images, example_ids, step, config=config)
    labels_B = labels.long().masked_fill(is_dropped_B, config.model.num_classes)

    noised_BCHW = objectives.rectified_flow_interpolate(images, noise_BCHW, times_B)
    velocity_BCHW = dit.dit(parameters, noised_BCHW, objectives.TIMESTEPS * times_B, labels_B, config=config.model)
    return objectives.rectified_flow_loss(velocity_BCHW, images, noise_BCHW, velocity=config.velocity)


def draws(
    images: torch.Tensor, example_ids: torch.Tensor, step: int, *, config: ImageDiffusionConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw what is random in a step, each example by its id.

    Args:
        images: [batch_size, in_channels, input_size, input_size], of which only shape and dtype count.
        example_ids: [batch_size], integer.
        step: The updates made so far.
        config: Of the run.

    Returns:
        noise: Like images, standard normal.
        times: [batch_size], dtype of images, in [0, 1).
        is_dropped: [batch_size], bool: whether the model is not told the label.
    """
    key = {"seed": config.seed, "step": step}
    noise_BCHW = random.normal(images.shape[1:], **key, example=example_ids, purpose=purposes.TRAINING_NOISE)
    draw_time = random.uniform if config.timestep_sampling == "uniform" else random.normal
    times_B = draw_time((), **key, example=example_ids, purpose=purposes.TRAINING_TIMES).to(images.dtype)
    if config.timestep_sampling == "logit-normal":
        times_B = times_B.sigmoid()
    is_dropped_B = random.uniform((), **key, example=example_ids, purpose=purposes.LABEL_DROPOUT) < config.label_dropout
    return noise_BCHW.to(images.dtype), times_B, is_dropped_B


def global_norm(tensors: Tensors) -> torch.Tensor:
    """Return the norm of all tensors together, []."""
    return torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt()


def require_finite(step: torch.Tensor, loss: torch.Tensor, gradients: Tensors, gradient_norm: torch.Tensor) -> None:
    """Raise FloatingPointError with the step and the first tensor that is not finite, if there is one."""
    if torch.stack([loss, gradient_norm]).isfinite().all():
        return
    tensors = {"loss": loss, **{f"gradient of {name}": each for name, each in gradients.items()}, "gradient_norm": gradient_norm}
    bad = next(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    raise FloatingPointError(f"step {int(step)}: {bad} is not finite (loss {float(loss)}, gradient_norm {float(gradient_norm)})")


def adamw_update(
    state: Mapping[str, torch.Tensor], gradients: Tensors, gradient_norm: torch.Tensor, *, config: ImageDiffusionConfig
) -> Tensors:
    """Return the state after one update by torch.optim.AdamW with clipped gradients; formula as in `train_step`."""
    clipping_factor = (config.max_gradient_norm / (gradient_norm + CLIPPING_EPSILON)).clamp(max=1)
    parameters, exp_avg, exp_avg_sq = (
        {name: tensor.detach().clone() for name, tensor in part_of_state(state, part).items()}
        for part in ("model", "exp_avg", "exp_avg_sq")
    )
    step = torch.tensor(float(state["step"]), dtype=torch.float64, device="cpu")
    adamw(  # in place, in the clones
        list(parameters.values()),
        [gradients[name] * clipping_factor for name in parameters],
        list(exp_avg.values()),
        list(exp_avg_sq.values()),
        max_exp_avg_sqs=[],
        state_steps=[step.clone() for _ in parameters],
        foreach=False,
        amsgrad=False,
        maximize=False,
        lr=config.learning_rate,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    return join_state(parameters, exp_avg, exp_avg_sq, state["step"] + 1)


def part_of_state(state: Mapping[str, torch.Tensor], part: str) -> Tensors:
    """Return the tensors of a state whose names begin with `part` and a dot, without that beginning."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


def join_state(parameters: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, step: torch.Tensor) -> Tensors:
    """Return the state that these are the parts of."""
    parts = {"model": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()} | {"step": step}


def save_state(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a state to a safetensors file, bit for bit; either framework reads it."""
    from safetensors.torch import save_file  # what a run needs, and the step does not

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def load_state(path: Path) -> Tensors:
    """Read a state that `save_state` of either framework wrote; it lies on the CPU."""
    from safetensors.torch import load_file

    return load_file(path)
