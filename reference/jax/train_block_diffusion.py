"""One training step of a masked or block diffusion language model: SDAR, SDAR-MoE, LLaDA or Dream.

The state of a run is that of `training`, whose `model.<name>` are named as in the model's reference. Which tokens of an example
are masked is drawn by (seed, step, example id, purpose), whatever batch, microbatch or rank it is in, and before anything is
computed: so the numbers of tokens that the losses are divided by are those of the whole batch.

Shapes: B batch_size, S num_tokens, V vocab_size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import IGNORED_LABEL, BlockDiffusionConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.jax import language_models, random, training
from gaugeblock.reference.jax.block_masks import places_in_samples
from gaugeblock.reference.jax.precision import at_least_float32

EXCLUDED = -1e6  # added to the mask token's logit: its probability is 0 beside any other
TICKS = 2**24  # in whole numbers of which times are added up, so that they are the same in both frameworks

Tensors = dict[str, jax.Array]


@dataclass(frozen=True)
class Metrics:
    """As `gaugeblock.reference.torch.train_block_diffusion.Metrics`."""

    loss: jax.Array
    gradient_norm: jax.Array


def initial_state(config: BlockDiffusionConfig) -> Tensors:
    """As `gaugeblock.reference.torch.train_block_diffusion.initial_state`, but step is an int32."""
    return training.initial_state(language_models.initial_state(config.model, seed=config.seed), config=config)


def train_step(
    state: Mapping[str, jax.Array],
    input_ids: jax.Array,
    labels: jax.Array,
    sample_ids: jax.Array,
    example_ids: jax.Array,
    *,
    config: BlockDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """As `gaugeblock.reference.torch.train_block_diffusion.train_step`."""
    shapes = language_models.state_shapes(config.model)
    validation.block_diffusion_step(state, input_ids, labels, sample_ids, example_ids, config, shapes)
    dtype = state[f"model.{next(iter(shapes))}"].dtype
    batch = weighted_batch(input_ids, labels, sample_ids, example_ids, state["step"], dtype=dtype, config=config)
    new_state, metrics = training.step(shares, state, batch, config=config)
    return new_state, Metrics(**metrics)


@partial(jax.jit, static_argnames=("dtype", "config"))
def weighted_batch(
    input_ids: jax.Array,
    labels: jax.Array,
    sample_ids: jax.Array,
    example_ids: jax.Array,
    step: int | jax.Array,
    *,
    dtype: Any,
    config: BlockDiffusionConfig,
) -> tuple[jax.Array, ...]:
    """As `gaugeblock.reference.torch.train_block_diffusion.weighted_batch`."""
    arrays = input_ids, labels, sample_ids
    noisy_ids, weights_BS, number = masked_batch(*arrays, example_ids, step, dtype=dtype, config=config)
    return noisy_ids, *arrays, weights_BS / jnp.maximum(number, 1)


def masked_batch(
    input_ids: jax.Array,
    labels: jax.Array,
    sample_ids: jax.Array,
    example_ids: jax.Array,
    step: int | jax.Array,
    *,
    dtype: Any,
    config: BlockDiffusionConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.train_block_diffusion.masked_batch`."""
    shares_BS, is_drawn_BS = draws(sample_ids, example_ids, step, config=config)
    has_label_BS = (labels != IGNORED_LABEL) & (sample_ids >= 0)
    is_masked_BS = is_drawn_BS & has_label_BS
    noisy_ids = jnp.where(is_masked_BS, config.model.mask_token_id, input_ids)
    weights_BS = weights(shares_BS.astype(dtype), is_masked_BS, sample_ids, config=config)
    match config.mean_over:
        case "tokens":
            number = has_label_BS.sum()
        case "masked":
            number = is_masked_BS.sum()
        case "examples":
            weights_BS = weights_BS / jnp.maximum(has_label_BS.sum(axis=1, keepdims=True), 1)
            number = jnp.full((), len(labels))
    return noisy_ids, weights_BS, number


def shares(
    parameters: Tensors, *microbatch: Any, batch_size: int, step: jax.Array, config: BlockDiffusionConfig
) -> tuple[jax.Array, Tensors]:
    """As `gaugeblock.reference.torch.train_block_diffusion.shares`."""
    loss = weighted_loss(partial(language_models.operation(config.model), parameters), *microbatch, config=config)
    return loss, {"loss": loss}


def weighted_loss(
    model: Callable[..., jax.Array],
    noisy_ids: jax.Array,
    clean_ids: jax.Array,
    labels: jax.Array,
    sample_ids: jax.Array,
    weights: jax.Array,
    *,
    config: BlockDiffusionConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.train_block_diffusion.weighted_loss`."""
    logits_BSV = language_models.predict(model, noisy_ids, clean_ids, sample_ids, config=config.model)
    logits_BSV = at_least_float32(logits_BSV)
    if config.excludes_mask_token:
        is_mask_V = jnp.arange(config.model.vocab_size) == config.model.mask_token_id
        logits_BSV = logits_BSV + EXCLUDED * is_mask_V
    log_probs_BSV = jax.nn.log_softmax(logits_BSV, axis=-1)
    own_BS1 = jnp.take_along_axis(log_probs_BSV, jnp.maximum(labels, 0)[..., None], axis=2)
    return -(weights * own_BS1[..., 0]).sum()


def draws(
    sample_ids: jax.Array, example_ids: jax.Array, step: int | jax.Array, *, config: BlockDiffusionConfig
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.train_block_diffusion.draws`."""
    num_tokens = sample_ids.shape[1]
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids}
    drawn_BS = random.uniform((num_tokens,), **key, purpose=purposes.MASK_TIMES)
    first_BS = first_places(sample_ids, config=config)
    ticks_BS = (jnp.take_along_axis(drawn_BS, first_BS, axis=1) * TICKS).astype(int)
    if config.antithetic:
        is_first_BS = (first_BS == jnp.arange(num_tokens)) & (sample_ids >= 0)
        before_BS = jnp.take_along_axis(is_first_BS.cumsum(axis=1), first_BS, axis=1) - 1
        of_first_B1 = jnp.take_along_axis(ticks_BS, is_first_BS.argmax(axis=1, keepdims=True), axis=1)
        ticks_BS = (of_first_B1 + before_BS * (TICKS // jnp.maximum(is_first_BS.sum(axis=1, keepdims=True), 1))) % TICKS
    times_BS = ticks_BS.astype(jnp.float32) / TICKS
    shares_BS = config.least_share + (config.greatest_share - config.least_share) * times_BS
    return shares_BS, random.uniform((num_tokens,), **key, purpose=purposes.MASKED_TOKENS) < shares_BS


def first_places(sample_ids: jax.Array, *, config: BlockDiffusionConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.train_block_diffusion.first_places`."""
    match config.times_of:
        case "sequence":
            is_padding_BS = sample_ids < 0
            is_together_BSS = is_padding_BS[:, :, None] == is_padding_BS[:, None, :]
        case "sample":
            is_together_BSS = sample_ids[:, :, None] == sample_ids[:, None, :]
        case "block":
            assert isinstance(config.model, SDARConfig | SDARMoEConfig)
            block_BS = places_in_samples(sample_ids) // config.model.block_length
            is_together_BSS = sample_ids[:, :, None] == sample_ids[:, None, :]
            is_together_BSS = is_together_BSS & (block_BS[:, :, None] == block_BS[:, None, :])
    return is_together_BSS.argmax(axis=2)  # of several that are largest the first


def weights(shares: jax.Array, is_masked: jax.Array, sample_ids: jax.Array, *, config: BlockDiffusionConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.train_block_diffusion.weights`."""
    match config.weighting:
        case "inverse":
            weights_BS = 1 / shares
        case "none":
            weights_BS = jnp.ones_like(shares)
        case "linear":
            weights_BS = 1 - shares
        case "cart":
            place_S = jnp.arange(shares.shape[1], dtype=shares.dtype)
            distance_SS = jnp.abs(place_S[:, None] - place_S[None, :])
            near_SS = config.cart_p * (1 - config.cart_p) ** (distance_SS - 1) / 2
            sees_BSS = (sample_ids[:, :, None] == sample_ids[:, None, :]) & ~is_masked[:, None, :]
            weights_BS = jnp.where(sees_BSS, near_SS, 0).sum(axis=2)
    return jnp.where(is_masked, weights_BS, 0)
