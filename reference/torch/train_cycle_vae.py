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

import torch

from gaugeblock.reference import noise_tables, purposes, validation
from gaugeblock.reference.configs import CycleVAEConfig
from gaugeblock.reference.torch import noise_schedules, predictions, random, text_latent_mmdit, token_choices, training
from gaugeblock.reference.torch.precision import at_least_float32

TIMESTEPS = 1000  # of the table of noise
LAST_TIME = 0.9999  # of times that are drawn
SMALLEST_NORM = 1e-8  # what latents are divided by at least
LARGEST_TEXT_LOSS = 100.0  # of an example
# texts, the two directions and the two cycles: what a run may have trouble with, in the order of its making
PARTS = """latent_norm t_lat_mean latent_pred_norm base_t2l_latent_loss base_l2t_text_loss x0_pred_norm cycle_text_loss
    cycle_latent_loss""".split()

Tensors = dict[str, torch.Tensor]
Model = Callable[..., tuple[torch.Tensor, ...]]
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, latents, times of the text and of the latent
Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # noise, times, and what there is of latents and of noise


@dataclass(frozen=True)
class Metrics:
    """What a step reports, before the update; means over the batch, 0 of what was not computed.

    Attributes:
        loss: [], what is minimized.
        base_t2l_latent_loss: [], of latents that are predicted from texts; as all parts, not weighted.
        base_l2t_text_loss: [], of texts that are predicted from latents.
        cycle_text_loss: [], of texts that are predicted from predicted latents.
        cycle_latent_loss: [], of latents that are predicted from predicted texts.
        cycle_text_weight, cycle_latent_weight: [], of the cycles in this update.
        t_lat_mean: [], of the times of base_t2l_latent_loss.
        latent_norm: [], of the latents.
        latent_pred_norm: [], of what base_t2l_latent_loss has for its prediction.
        x0_pred_norm: [], of the latents that it says.
        gradient_norm: [], the norm of all gradients together, before clipping.
    """

    loss: torch.Tensor
    base_t2l_latent_loss: torch.Tensor
    base_l2t_text_loss: torch.Tensor
    cycle_text_loss: torch.Tensor
    cycle_latent_loss: torch.Tensor
    cycle_text_weight: torch.Tensor
    cycle_latent_weight: torch.Tensor
    t_lat_mean: torch.Tensor
    latent_norm: torch.Tensor
    latent_pred_norm: torch.Tensor
    x0_pred_norm: torch.Tensor
    gradient_norm: torch.Tensor


def initial_state(config: CycleVAEConfig) -> Tensors:
    """Return the state at the start of a run: a new model, moments of zero, step 0; float32, and an int64 step."""
    return state_of(text_latent_mmdit.initial_state(config.model, seed=config.seed), config=config)


def state_of(parameters: Mapping[str, torch.Tensor], *, config: CycleVAEConfig) -> Tensors:
    """Return the state at the start of a run with these parameters, of the names in `text_latent_mmdit.state_shapes`."""
    return training.initial_state(parameters, config=config, frozen=frozen_names(config))


def train_step(
    state: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    latents: torch.Tensor,
    attention_mask: torch.Tensor | None,
    example_ids: torch.Tensor,
    *,
    config: CycleVAEConfig,
) -> tuple[Tensors, Metrics]:
    """Make one update on the mean loss of a batch of texts and their latents; the given state is not written to.

        t, noise    = draws of each example;  t', noise' others
        x           = alpha(t) * latents + sigma(t) * noise
        T2L         p = model(input_ids, x, 0, t);             loss_T2L = D(p, target)
        L2T         q = model(masks, latents, 1, 0);           loss_L2T = CE(q, input_ids)
        T2L2T       q' = model(masks, latents that p says, 1, 0);   loss_T2L2T = CE(q', input_ids)
        L2T2L       p' = model(tokens that q chooses, x', 0, t');   loss_L2T2L = D(p', target')

        D(p, y)     = mean over the latent's numbers of (p / max(|p|, 1e-8) - y / max(|y|, 1e-8))**2, (2 - 2 cos) / latent_dim
        CE(q, y)    = min(mean over all places of -log(softmax(q)[y]), 100)
        loss        = latent_loss_weight * loss_T2L + loss_L2T + w_text * loss_T2L2T + w_latent * loss_L2T2L
        new_state   = update of the optimizer by the clipped gradients of loss (`training.update`)

    A model is told of each text and each latent a time: 0 where it is known. Its tables of alpha and sigma are those of a cosine
    schedule of 1000 timesteps, of which that of time t is floor(999 t). All places of a text count, padding too. Weights are as
    `cycle_weights` says; a cycle whose weight is 0 in this update is not run, and its loss is reported as 0.

    Different from the public step: its predicted latents, [batch_size, 1, latent_dim], compare every example with every other
    one, and the cycle after them raises; it bounds the mean cross-entropy of the batch, where this bounds each example's, so that
    microbatches and ranks do not matter; it counts microbatches as steps; and where this raises, it goes on with 0 or 0.01.

    Args:
        state: As above; float32 or float64, with an integer step.
        input_ids: [batch_size, num_tokens], int32 or int64 in 0..vocab_size - 1.
        latents: [batch_size, latent_dim], dtype of the state.
        attention_mask: [batch_size, num_tokens], bool, True for what is no padding; None for no padding.
        example_ids: [batch_size], integer in 0..2**32 - 1; examples with the same id get the same draws.
        config: Of the run.

    Returns:
        new_state: As state.
        metrics: In the dtype of the state.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `state` is not a dict of arrays.
        ValueError: Shapes or devices do not fit together, `state` lacks an entry or has one too many, or an id names no token.
        FloatingPointError: Latents, a prediction, a loss before its bound, or a gradient is not finite; the message names the
            step and the first such.

    Source: Joshua-Zhang-Jiaquan/LGDLM cycle_vae_impl/trainers/cycle_vae_trainer.py, latentDLM_mmdit/continuous_diffusion.py; the
    schedule: Nichol and Dhariwal (arXiv:2102.09672), equation 17; cycles: Zhu et al. (arXiv:1703.10593), section 3.2.
    """
    shapes, frozen = text_latent_mmdit.state_shapes(config.model), frozen_names(config)
    validation.cycle_vae_step(state, input_ids, latents, attention_mask, example_ids, config, shapes, frozen)
    batch = input_ids, latents, attention_mask, example_ids
    shares = Shares(cycles_run(int(state["step"]), config=config))
    new_state, metrics = training.step(shares, state, batch, config=config)
    return new_state, Metrics(**metrics, **weight_metrics(state["step"], latents, config=config))


@dataclass(frozen=True)
class Shares:
    """What `training.step` takes: a microbatch's share of what is minimized and of the metrics.

    A batch is as of `train_step`.

    Attributes:
        runs: As of `cycles_run`.
    """

    runs: tuple[bool, bool]

    def __call__(
        self, parameters: Tensors, *microbatch: Any, batch_size: int, step: int, config: CycleVAEConfig
    ) -> tuple[torch.Tensor, Tensors]:
        """Return the share."""
        model: Any = partial(text_latent_mmdit.text_latent_mmdit, parameters, config=config.model)
        parts = example_parts(model, *microbatch, step=step, runs=self.runs, config=config)
        return weighted({name: each.sum() / batch_size for name, each in parts.items()}, step, config=config)


def weighted(parts: Tensors, step: int, *, config: CycleVAEConfig) -> tuple[torch.Tensor, Tensors]:
    """Return the loss that these parts have in this step, and all that is reported, what raises first in front."""
    text_weight, latent_weight = cycle_weights(step, config=config)
    parts = {name: parts.get(name, torch.zeros_like(parts["latent_norm"])) for name in PARTS}
    loss = config.latent_loss_weight * parts["base_t2l_latent_loss"] + parts["base_l2t_text_loss"]
    loss = loss + text_weight * parts["cycle_text_loss"] + latent_weight * parts["cycle_latent_loss"]
    return loss, parts | {"loss": loss}


def example_parts(
    model: Model,
    input_ids: torch.Tensor,
    latents: torch.Tensor,
    attention_mask: torch.Tensor | None,
    example_ids: torch.Tensor,
    *,
    step: int,
    runs: tuple[bool, bool],
    config: CycleVAEConfig,
) -> Tensors:
    """Return the losses of each example, and what else is reported of it, [batch_size] each, of `PARTS` what this step has.

    `model` takes the arrays of `text_latent_mmdit`, `runs` is as `cycles_run` has it; other arguments are as of `train_step`.
    """
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
        known_BE = sample_BE.detach() if config.cycle_stop_grad_latent else sample_BE
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


def to_latents(text_tokens: torch.Tensor, latents: torch.Tensor, drawn: Drawn) -> Call:
    """Return the call of a model that predicts latents [B, E], noised as `drawn` says, from texts [B, T]."""
    _, times_B, _, _ = drawn
    return text_tokens, noised(latents, drawn), torch.zeros_like(times_B), times_B


def to_text(input_ids: torch.Tensor, latents: torch.Tensor, *, config: CycleVAEConfig) -> Call:
    """Return the call of a model that predicts texts like [B, T], all of whose places are masked, from latents [B, E]."""
    known_B = torch.zeros_like(latents[:, 0])
    return torch.full_like(input_ids, config.mask_token_id), latents, torch.ones_like(known_B), known_B


def predict(
    model: Model, calls: Mapping[str, Call], attention_mask: torch.Tensor | None, *, config: CycleVAEConfig
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the logits [B, T, V] and the latents [B, E] that a model predicts, float32 (float64 for float64 latents), by call.

    Calls are made as one: an example's prediction depends on no other one's.
    """
    tokens_BT, latents_BE, text_times_B, latent_times_B = (torch.cat(each) for each in zip(*calls.values(), strict=True))
    mask_BT = None if attention_mask is None else attention_mask.repeat(len(calls), 1)
    latents_BE = training.in_compute_dtype(latents_BE, config)
    logits_BTV, predicted_B1E, _ = model(tokens_BT, latents_BE, text_times_B, latent_times_B, mask_BT)
    results = (at_least_float32(each).tensor_split(len(calls)) for each in (logits_BTV, predicted_B1E[:, 0]))
    return dict(zip(calls, zip(*results, strict=True), strict=True))


def noised(latents: torch.Tensor, drawn: Drawn) -> torch.Tensor:
    """Return latents [B, E] with the noise that was drawn for them."""
    noise_BE, _, alphas_B, sigmas_B = drawn
    return predictions.add_noise(latents, noise_BE, alphas_B, sigmas_B)


def target(latents: torch.Tensor, drawn: Drawn, *, config: CycleVAEConfig) -> torch.Tensor:
    """Return what is to be predicted of noised latents, [B, E]."""
    noise_BE, _, alphas_B, sigmas_B = drawn
    return predictions.prediction_target(latents, noise_BE, alphas_B, sigmas_B, prediction_type=config.prediction_type)


def sample(predicted: torch.Tensor, latents: torch.Tensor, drawn: Drawn, *, config: CycleVAEConfig) -> torch.Tensor:
    """Return the latents, [B, E], that are predicted by what is predicted of noised ones."""
    _, _, alphas_B, sigmas_B = drawn
    kind = config.prediction_type
    return predictions.convert_prediction(
        predicted, noised(latents, drawn), alphas_B, sigmas_B, prediction_type=kind, to="sample"
    )


def latent_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of the directions of latents [B, E], of each example, [batch_size]; at most 4 / E."""
    return (direction(predicted) - direction(target)).square().mean(dim=1)


def direction(latents: torch.Tensor) -> torch.Tensor:
    """Divide latents [B, E] by their norms, or by 1e-8 where these are less."""
    # of squares, since a norm has no gradient at 0
    return latents * torch.rsqrt((latents * latents).sum(dim=1, keepdim=True).clamp(min=SMALLEST_NORM**2))


def text_losses(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of all places of each text, [B], of logits [B, T, V]; at most 100, unless infinite."""
    chosen_BT = logits.gather(-1, input_ids.long()[..., None])[..., 0]
    losses_B = (torch.logsumexp(logits, dim=-1) - chosen_BT).mean(dim=1)
    return torch.where(losses_B.isfinite(), losses_B.clamp(max=LARGEST_TEXT_LOSS), losses_B)


def norm(latents: torch.Tensor) -> torch.Tensor:
    """Return the norms of latents [B, E], as they are reported."""
    return latents.detach().square().sum(dim=1).sqrt()


def pseudo_tokens(logits: torch.Tensor, example_ids: torch.Tensor, step: int, *, config: CycleVAEConfig) -> torch.Tensor:
    """Choose a text by logits [B, T, V], in this step; no gradients.

        tokens = argmax(logits)                                             "argmax"
        tokens = a draw of softmax(logits / cycle_latent_temperature)       "categorical"

    Returns:
        [batch_size, num_tokens], int64.
    """
    uniforms_NV, temperature = None, 0.0
    if config.cycle_latent_sampling == "categorical":
        key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids, "purpose": purposes.PSEUDO_TOKENS}
        uniforms_NV = random.uniform(tuple(logits.shape[1:]), **key).flatten(0, 1)
        temperature = config.cycle_latent_temperature
    logits_NV = logits.detach().flatten(0, 1)
    ids_N, _ = token_choices.draw_tokens(logits_NV, uniforms_NV, temperature=temperature, confidence="probability")
    return ids_N.reshape(logits.shape[:2])


def draws(latents: torch.Tensor, example_ids: torch.Tensor, step: int, *, is_cycle: bool, config: CycleVAEConfig) -> Drawn:
    """Draw what latents are noised by in a step, each example by its id.

        time = min(latent_t_min + (latent_t_max - latent_t_min) * u, 0.9999), or 1;  timestep = floor(999 * time)

    Args:
        latents: [batch_size, latent_dim], of which only shape and dtype count.
        example_ids: [batch_size], integer.
        step: The updates made so far.
        is_cycle: Whether it is for L2T2L, or for T2L and T2L2T.
        config: Of the run.

    Returns:
        noise: Like latents, standard normal.
        times: [batch_size], dtype of latents.
        alphas, sigmas: [batch_size], dtype of latents: how much there is of the latents and of the noise.
    """
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids}
    of_noise, of_times = purposes.TRAINING_NOISE, purposes.TRAINING_TIMES
    if is_cycle:
        of_noise, of_times = purposes.CYCLE_NOISE, purposes.CYCLE_TIMES
    noise_BE = random.normal(latents.shape[1:], **key, purpose=of_noise).to(latents.dtype)
    if config.latent_t_mode == "full":
        times_B = torch.ones(len(latents), dtype=torch.float64, device=latents.device)
    else:
        # in float64: a timestep is decided by the product's whole part, which rounding should not
        uniforms_B = random.uniform((), **key, purpose=of_times).double()
        least, length = config.latent_t_min, config.latent_t_max - config.latent_t_min
        times_B = (least + length * uniforms_B).clamp(max=LAST_TIME)
    alphas_B, sigmas_B = rates(times_B)
    times_B, alphas_B, sigmas_B = (each.to(latents.dtype) for each in (times_B, alphas_B, sigmas_B))
    return noise_BE, times_B, alphas_B, sigmas_B


def rates(times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much there is of the latents and of the noise at times [B], float64 in [0, 1]; [B], float64 each.

    beta[k]        = clip(1 - f(k + 1) / f(k), 1e-4, 0.9999),  f(k) = cos((k / 1000 + 0.008) / 1.008 * pi / 2)**2
    alpha**2       = product of 1 - beta[0..timestep] = 1 - sigma**2,  timestep = floor(999 * time)
    """
    betas = noise_tables.cosine_betas(TIMESTEPS, *noise_tables.LGDLM_BETAS)
    table = torch.tensor(noise_tables.cumulative_alphas(betas), dtype=torch.float64, device=times.device)
    return noise_schedules.signal_and_noise(table[(times * (TIMESTEPS - 1)).long()])


def cycle_weights(step: int, *, config: CycleVAEConfig) -> tuple[float, float]:
    """Return the weights of T2L2T and of L2T2L in the update that is made after `step` others.

        weight * min(max(step - warmup_steps, 0) / ramp_steps, 1), or where ramp_steps is 0, from warmup_steps on weight

    They are 0 in single modes. Where cycles take turns, T2L2T's is 0 where step // cycle_every is odd, L2T2L's where it is even.

    Source: LGDLM cycle_vae_trainer.py, _ramp_weight; turns are taken nowhere in public code.
    """
    text = ramp(step, config.cycle_text_weight, config.cycle_text_warmup_steps, config.cycle_text_ramp_steps)
    latent = ramp(step, config.cycle_latent_weight, config.cycle_latent_warmup_steps, config.cycle_latent_ramp_steps)
    if config.mode != "cycle":
        return 0.0, 0.0
    if config.cycle_every is None:
        return text, latent
    return (0.0, latent) if step // config.cycle_every % 2 else (text, 0.0)


def cycles_run(step: int, *, config: CycleVAEConfig) -> tuple[bool, bool]:
    """Return whether T2L2T and L2T2L are run in the update that is made after `step` others: where their weights are not 0."""
    text_weight, latent_weight = cycle_weights(step, config=config)
    return text_weight > 0, latent_weight > 0


def ramp(step: int, weight: float, warmup_steps: int, ramp_steps: int) -> float:
    """Return a weight that is 0 up to warmup_steps and rises in a line over ramp_steps more."""
    if step < warmup_steps:
        return 0.0
    return weight * min(1.0, (step - warmup_steps) / ramp_steps) if ramp_steps else weight


def weight_metrics(step: torch.Tensor, latents: torch.Tensor, *, config: CycleVAEConfig) -> Tensors:
    """Return the weights of the cycles in a step, as they are reported, in the dtype of latents."""
    weights = cycle_weights(int(step), config=config)
    return {f"cycle_{name}_weight": latents.new_tensor(each) for name, each in zip(("text", "latent"), weights, strict=True)}


def frozen_names(config: CycleVAEConfig) -> tuple[str, ...]:
    """Return the names of what is not trained: the head of clusters, which no loss sees, and what a single mode leaves out."""
    frozen = {
        "cycle": ("text_head_clusters.",),
        "t2l": ("text_encoder.", "text_head.", "text_head_clusters."),
        "l2t": ("latent_encoder.", "latent_head.", "text_head_clusters."),
    }[config.mode]
    return tuple(name for name in text_latent_mmdit.state_shapes(config.model) if name.startswith(frozen))
