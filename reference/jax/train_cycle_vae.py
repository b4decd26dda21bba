"""One training step of text-latent diffusion: text to latent, latent to text, and the cycles through both (LGDLM).

The state of a run is that of `training`, whose `model.<name>` are named as in `text_latent_mmdit`. What is random of an example,
its noises, its times and the tokens of its pseudo-text, is drawn by (seed, step, example id, purpose), whatever batch,
microbatch or rank it is in.

Shapes: B batch_size, T num_tokens, E latent_dim, V vocab_size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import noise_tables, purposes, validation
from gaugeblock.reference.configs import CycleVAEConfig
from gaugeblock.reference.jax import noise_schedules, predictions, random, text_latent_mmdit, token_choices, training
from gaugeblock.reference.jax.precision import at_least_float32

TIMESTEPS = 1000  # of the table of noise
LAST_TIME = 0.9999  # of times that are drawn
SMALLEST_NORM = 1e-8  # what latents are divided by at least
LARGEST_TEXT_LOSS = 100.0  # of an example
# texts, the two directions and the two cycles: what a run may have trouble with, in the order of its making
PARTS = """latent_norm t_lat_mean latent_pred_norm base_t2l_latent_loss base_l2t_text_loss x0_pred_norm cycle_text_loss
    cycle_latent_loss""".split()

Tensors = dict[str, jax.Array]
Model = Callable[..., tuple[jax.Array, ...]]
Call = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # tokens, latents, times of the text and of the latent
Drawn = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # noise, times, and what there is of latents and of noise


@dataclass(frozen=True)
class Metrics:
    """As `gaugeblock.reference.torch.train_cycle_vae.Metrics`."""

    loss: jax.Array
    base_t2l_latent_loss: jax.Array
    base_l2t_text_loss: jax.Array
    cycle_text_loss: jax.Array
    cycle_latent_loss: jax.Array
    cycle_text_weight: jax.Array
    cycle_latent_weight: jax.Array
    t_lat_mean: jax.Array
    latent_norm: jax.Array
    latent_pred_norm: jax.Array
    x0_pred_norm: jax.Array
    gradient_norm: jax.Array


def initial_state(config: CycleVAEConfig) -> Tensors:
    """As `gaugeblock.reference.torch.train_cycle_vae.initial_state`, but step is an int32."""
    return state_of(text_latent_mmdit.initial_state(config.model, seed=config.seed), config=config)


def state_of(parameters: Mapping[str, jax.Array], *, config: CycleVAEConfig) -> Tensors:
    """Return the state at the start of a run with these parameters, of the names in `text_latent_mmdit.state_shapes`."""
    return training.initial_state(parameters, config=config, frozen=frozen_names(config))


def train_step(
    state: Mapping[str, jax.Array],
    input_ids: jax.Array,
    latents: jax.Array,
    attention_mask: jax.Array | None,
    example_ids: jax.Array,
    *,
    config: CycleVAEConfig,
) -> tuple[Tensors, Metrics]:
    """As `gaugeblock.reference.torch.train_cycle_vae.train_step`."""
    shapes, frozen = text_latent_mmdit.state_shapes(config.model), frozen_names(config)
    validation.cycle_vae_step(state, input_ids, latents, attention_mask, example_ids, config, shapes, frozen)
    batch = input_ids, latents, attention_mask, example_ids
    shares = Shares(cycles_run(state["step"], config=config))
    new_state, metrics = training.step(shares, state, batch, config=config)
    return new_state, Metrics(**metrics, **weight_metrics(state["step"], latents, config=config))


@dataclass(frozen=True)
class Shares:
    """As `gaugeblock.reference.torch.train_cycle_vae.Shares`, but two of the same cycles are one to the compiler."""

    runs: tuple[bool, bool]

    def __call__(
        self, parameters: Tensors, *microbatch: Any, batch_size: jax.Array, step: jax.Array, config: CycleVAEConfig
    ) -> tuple[jax.Array, Tensors]:
        """Return the share."""
        parts = self.example_parts(parameters, *microbatch, step=step, config=config)
        return weighted({name: each.sum() / batch_size for name, each in parts.items()}, step, config=config)

    def example_parts(self, parameters: Tensors, *microbatch: Any, step: jax.Array, config: CycleVAEConfig) -> Tensors:
        """As the function of that name, of a model with these parameters."""
        model: Any = partial(text_latent_mmdit.text_latent_mmdit, parameters, config=config.model)
        return example_parts(model, *microbatch, step=step, runs=self.runs, config=config)


def weighted(parts: Tensors, step: jax.Array, *, config: CycleVAEConfig) -> tuple[jax.Array, Tensors]:
    """Return the loss that these parts have in this step, and all that is reported, what raises first in front."""
    text_weight, latent_weight = (each.astype(parts["latent_norm"].dtype) for each in cycle_weights(step, config=config))
    parts = {name: parts.get(name, jnp.zeros_like(parts["latent_norm"])) for name in PARTS}
    loss = config.latent_loss_weight * parts["base_t2l_latent_loss"] + parts["base_l2t_text_loss"]
    loss = loss + text_weight * parts["cycle_text_loss"] + latent_weight * parts["cycle_latent_loss"]
    return loss, parts | {"loss": loss}


def example_parts(
    model: Model,
    input_ids: jax.Array,
    latents: jax.Array,
    attention_mask: jax.Array | None,
    example_ids: jax.Array,
    *,
    step: jax.Array,
    runs: tuple[bool, bool],
    config: CycleVAEConfig,
) -> Tensors:
    """As `gaugeblock.reference.torch.train_cycle_vae.example_parts`."""
    calls = {}
    if config.mode != "l2t":
        drawn = draws(latents, example_ids, step, is_cycle=False, config=config)
        calls["t2l"] = to_latents(input_ids, latents, drawn)
    if config.mode != "t2l":
        calls["l2t"] = to_text(input_ids, latents, config=config)
    results, parts = predict(model, calls, attention_mask, config=config), {"latent_norm": norm(latents)}
    if "t2l" in calls:
        _, predicted_BE = results["t2l"]
        sample_BE = sample(predicted_BE, latents, drawn, config=config)
        parts |= {"t_lat_mean": drawn[1], "latent_pred_norm": norm(predicted_BE), "x0_pred_norm": norm(sample_BE)}
        parts["base_t2l_latent_loss"] = latent_losses(predicted_BE, target(latents, drawn, config=config))
    if "l2t" in calls:
        logits_BTV, _ = results["l2t"]
        parts["base_l2t_text_loss"] = text_losses(logits_BTV, input_ids)

    cycles, (runs_text, runs_latent) = {}, runs
    if runs_text:
        known_BE = jax.lax.stop_gradient(sample_BE) if config.cycle_stop_grad_latent else sample_BE
        cycles["t2l2t"] = to_text(input_ids, known_BE, config=config)
    if runs_latent:
        tokens_BT = pseudo_tokens(logits_BTV, example_ids, step, config=config)
        drawn = draws(latents, example_ids, step, is_cycle=True, config=config)
        cycles["l2t2l"] = to_latents(tokens_BT, latents, drawn)
    results = predict(model, cycles, attention_mask, config=config) if cycles else {}
    if runs_text:
        parts["cycle_text_loss"] = text_losses(results["t2l2t"][0], input_ids)
    if runs_latent:
        parts["cycle_latent_loss"] = latent_losses(results["l2t2l"][1], target(latents, drawn, config=config))
    return parts


def to_latents(text_tokens: jax.Array, latents: jax.Array, drawn: Drawn) -> Call:
    """Return the call of a model that predicts latents [B, E], noised as `drawn` says, from texts [B, T]."""
    _, times_B, _, _ = drawn
    return text_tokens, noised(latents, drawn), jnp.zeros_like(times_B), times_B


def to_text(input_ids: jax.Array, latents: jax.Array, *, config: CycleVAEConfig) -> Call:
    """Return the call of a model that predicts texts like [B, T], all of whose places are masked, from latents [B, E]."""
    known_B = jnp.zeros_like(latents[:, 0])
    return jnp.full_like(input_ids, config.mask_token_id), latents, jnp.ones_like(known_B), known_B


def predict(
    model: Model, calls: Mapping[str, Call], attention_mask: jax.Array | None, *, config: CycleVAEConfig
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """As `gaugeblock.reference.torch.train_cycle_vae.predict`."""
    tokens_BT, latents_BE, text_times_B, latent_times_B = (jnp.concatenate(each) for each in zip(*calls.values(), strict=True))
    mask_BT = None if attention_mask is None else jnp.tile(attention_mask, (len(calls), 1))
    latents_BE = training.in_compute_dtype(latents_BE, config)
    logits_BTV, predicted_B1E, _ = model(tokens_BT, latents_BE, text_times_B, latent_times_B, mask_BT)
    results = (jnp.split(at_least_float32(each), len(calls)) for each in (logits_BTV, predicted_B1E[:, 0]))
    return dict(zip(calls, zip(*results, strict=True), strict=True))


def noised(latents: jax.Array, drawn: Drawn) -> jax.Array:
    """Return latents [B, E] with the noise that was drawn for them."""
    noise_BE, _, alphas_B, sigmas_B = drawn
    return predictions.add_noise(latents, noise_BE, alphas_B, sigmas_B)


def target(latents: jax.Array, drawn: Drawn, *, config: CycleVAEConfig) -> jax.Array:
    """Return what is to be predicted of noised latents, [B, E]."""
    noise_BE, _, alphas_B, sigmas_B = drawn
    return predictions.prediction_target(latents, noise_BE, alphas_B, sigmas_B, prediction_type=config.prediction_type)


def sample(predicted: jax.Array, latents: jax.Array, drawn: Drawn, *, config: CycleVAEConfig) -> jax.Array:
    """Return the latents, [B, E], that are predicted by what is predicted of noised ones."""
    _, _, alphas_B, sigmas_B = drawn
    kind = config.prediction_type
    return predictions.convert_prediction(
        predicted, noised(latents, drawn), alphas_B, sigmas_B, prediction_type=kind, to="sample"
    )


def latent_losses(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Return the mean squared difference of the directions of latents [B, E], of each example, [batch_size]; at most 4 / E."""
    return jnp.square(direction(predicted) - direction(target)).mean(axis=1)


def direction(latents: jax.Array) -> jax.Array:
    """Divide latents [B, E] by their norms, or by 1e-8 where these are less."""
    # of squares, since a norm has no gradient at 0
    return latents * jax.lax.rsqrt(jnp.maximum((latents * latents).sum(axis=1, keepdims=True), SMALLEST_NORM**2))


def text_losses(logits: jax.Array, input_ids: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of all places of each text, [B], of logits [B, T, V]; at most 100, unless infinite."""
    chosen_BT = jnp.take_along_axis(logits, input_ids[..., None], axis=-1)[..., 0]
    losses_B = (jax.nn.logsumexp(logits, axis=-1) - chosen_BT).mean(axis=1)
    return jnp.where(jnp.isfinite(losses_B), jnp.minimum(losses_B, LARGEST_TEXT_LOSS), losses_B)


def norm(latents: jax.Array) -> jax.Array:
    """Return the norms of latents [B, E], as they are reported."""
    return jnp.sqrt(jnp.square(jax.lax.stop_gradient(latents)).sum(axis=1))


def pseudo_tokens(logits: jax.Array, example_ids: jax.Array, step: jax.Array, *, config: CycleVAEConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.train_cycle_vae.pseudo_tokens`, but int32."""
    uniforms_NV, temperature = None, 0.0
    if config.cycle_latent_sampling == "categorical":
        key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids, "purpose": purposes.PSEUDO_TOKENS}
        uniforms_NV = random.uniform(logits.shape[1:], **key).reshape(-1, logits.shape[2])
        temperature = config.cycle_latent_temperature
    logits_NV = jax.lax.stop_gradient(logits).reshape(-1, logits.shape[2])
    ids_N, _ = token_choices.draw_tokens(logits_NV, uniforms_NV, temperature=temperature, confidence="probability")
    return ids_N.reshape(logits.shape[:2])


def draws(latents: jax.Array, example_ids: jax.Array, step: jax.Array, *, is_cycle: bool, config: CycleVAEConfig) -> Drawn:
    """As `gaugeblock.reference.torch.train_cycle_vae.draws`."""
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids}
    of_noise, of_times = purposes.TRAINING_NOISE, purposes.TRAINING_TIMES
    if is_cycle:
        of_noise, of_times = purposes.CYCLE_NOISE, purposes.CYCLE_TIMES
    noise_BE = random.normal(latents.shape[1:], **key, purpose=of_noise).astype(latents.dtype)
    uniforms_B = random.uniform((), **key, purpose=of_times)
    with jax.enable_x64(True):
        if config.latent_t_mode == "full":
            times_B = jnp.ones(len(latents), jnp.float64)
        else:
            # in float64: a timestep is decided by the product's whole part, which rounding should not
            uniforms_B = uniforms_B.astype(jnp.float64)
            least, length = config.latent_t_min, config.latent_t_max - config.latent_t_min
            times_B = jnp.minimum(least + length * uniforms_B, LAST_TIME)
        alphas_B, sigmas_B = rates(times_B)
        times_B, alphas_B, sigmas_B = (each.astype(latents.dtype) for each in (times_B, alphas_B, sigmas_B))
    return noise_BE, times_B, alphas_B, sigmas_B


def rates(times: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.train_cycle_vae.rates`."""
    betas = noise_tables.cosine_betas(TIMESTEPS, *noise_tables.LGDLM_BETAS)
    with jax.enable_x64(True):
        table = jnp.asarray(noise_tables.cumulative_alphas(betas), jnp.float64)
        return noise_schedules.signal_and_noise(table[(times * (TIMESTEPS - 1)).astype(int)])


def cycle_weights(step: jax.Array, *, config: CycleVAEConfig) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.train_cycle_vae.cycle_weights`, but arrays of float64."""
    text = ramp(step, config.cycle_text_weight, config.cycle_text_warmup_steps, config.cycle_text_ramp_steps)
    latent = ramp(step, config.cycle_latent_weight, config.cycle_latent_warmup_steps, config.cycle_latent_ramp_steps)
    with jax.enable_x64(True):
        if config.mode != "cycle":
            return 0 * text, 0 * latent
        if config.cycle_every is None:
            return text, latent
        is_latents_turn = jnp.asarray(step) // config.cycle_every % 2 == 1
        return jnp.where(is_latents_turn, 0, text), jnp.where(is_latents_turn, latent, 0)


def cycles_run(step: jax.Array, *, config: CycleVAEConfig) -> tuple[bool, bool]:
    """Return whether T2L2T and L2T2L are run in the update that is made after `step` others: where their weights are not 0."""
    text_weight, latent_weight = cycle_weights(step, config=config)
    with jax.enable_x64(True):
        return bool(text_weight > 0), bool(latent_weight > 0)


def ramp(step: jax.Array, weight: float, warmup_steps: int, ramp_steps: int) -> jax.Array:
    """Return a weight that is 0 up to warmup_steps and rises in a line over ramp_steps more."""
    with jax.enable_x64(True):
        since = jnp.asarray(step).astype(jnp.float64) - warmup_steps
        risen = jnp.minimum(1.0, since / ramp_steps) if ramp_steps else 1.0
        return jnp.where(since < 0, 0.0, weight * risen)


def weight_metrics(step: jax.Array, latents: jax.Array, *, config: CycleVAEConfig) -> Tensors:
    """Return the weights of the cycles in a step, as they are reported, in the dtype of latents."""
    weights = (each.astype(latents.dtype) for each in cycle_weights(step, config=config))
    return {f"cycle_{name}_weight": each for name, each in zip(("text", "latent"), weights, strict=True)}


def frozen_names(config: CycleVAEConfig) -> tuple[str, ...]:
    """Return the names of what is not trained: the head of clusters, which no loss sees, and what a single mode leaves out."""
    frozen = {
        "cycle": ("text_head_clusters.",),
        "t2l": ("text_encoder.", "text_head.", "text_head_clusters."),
        "l2t": ("latent_encoder.", "latent_head.", "text_head_clusters."),
    }[config.mode]
    return tuple(name for name in text_latent_mmdit.state_shapes(config.model) if name.startswith(frozen))
