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

import torch

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import IGNORED_LABEL, BlockDiffusionConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.torch import language_models, random, training
from gaugeblock.reference.torch.block_masks import places_in_samples
from gaugeblock.reference.torch.precision import at_least_float32

EXCLUDED = -1e6  # added to the mask token's logit: its probability is 0 beside any other
TICKS = 2**24  # in whole numbers of which times are added up, so that they are the same in both frameworks

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Metrics:
    """What a step reports, before the update.

    Attributes:
        loss: [], of the batch.
        gradient_norm: [], the norm of all gradients together, before clipping.
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor


def initial_state(config: BlockDiffusionConfig) -> Tensors:
    """Return the state at the start of a run: a new model, moments of zero, step 0; float32, and an int64 step."""
    return training.initial_state(language_models.initial_state(config.model, seed=config.seed), config=config)


def train_step(
    state: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    sample_ids: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: BlockDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """Make one update of a model on tokens that are masked; the given state is not written to.

        t          = draw of each sequence, sample or block, in [0, 1)
        p          = least_share + (greatest_share - least_share) * t
        masked     = draw of each token < p, of those that have a label
        noisy      = mask_token_id where masked, else the token
        loss       = sum over masked tokens of weight(p) * -log softmax(model(noisy, input_ids))[label] / tokens
        new_state  = update of the optimizer by the clipped gradients of loss (`training.update`)

    where tokens are counted as `config.mean_over` says, over the batch. With the weight 1 / p, and for a model that ignores its
    input, the sum is on average over draws that of all tokens with labels, masked or not. A sequence in which nothing happens to
    be masked has a loss of 0; SDAR's code draws again, and then masks one token, by which the average is more.

    Args:
        state: As of `training`; float32 or float64, with an integer step.
        input_ids: [batch_size, num_tokens], int32 or int64 in 0 .. vocab_size - 1.
        labels: [batch_size, num_tokens], int32 or int64: what is to be predicted where the token is masked, in
            0 .. vocab_size - 1; -100 for a token that never is, as those of a prompt.
        sample_ids: [batch_size, num_tokens], int32 or int64: which sample of its sequence a token belongs to, of several that are
            packed; a negative one is padding, which is never masked. LLaDA and Dream see all samples of a sequence as one.
        example_ids: [batch_size], integer in 0..2**32 - 1; sequences with the same id get the same draws.
        config: Of the run.

    Returns:
        new_state: As state.
        metrics: In the dtype of the state.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `state` is not a dict of arrays.
        ValueError: Shapes or devices do not fit together, `state` lacks an entry or has one too many, an id or a label names no
            token, or there is none.
        FloatingPointError: The loss or a gradient is not finite; the message names the step and the first bad one.

    Source: as of `BlockDiffusionConfig`. BD3-LM spreads antithetic times over the whole batch, so that an example's times depend
    on its place in it.
    """
    shapes = language_models.state_shapes(config.model)
    validation.block_diffusion_step(state, input_ids, labels, sample_ids, example_ids, config, shapes)
    dtype = state[f"model.{next(iter(shapes))}"].dtype
    batch = weighted_batch(input_ids, labels, sample_ids, example_ids, int(state["step"]), dtype=dtype, config=config)
    new_state, metrics = training.step(shares, state, batch, config=config)
    return new_state, Metrics(**metrics)


def weighted_batch(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    sample_ids: torch.Tensor,
    example_ids: torch.Tensor,
    step: int,
    *,
    dtype: torch.dtype,
    config: BlockDiffusionConfig,
) -> tuple[torch.Tensor, ...]:
    """Return a whole batch as `weighted_loss` takes it; arguments as of `masked_batch`."""
    arrays = input_ids, labels, sample_ids
    noisy_ids, weights_BS, number = masked_batch(*arrays, example_ids, step, dtype=dtype, config=config)
    return noisy_ids, *arrays, weights_BS / number.clamp(min=1)


def masked_batch(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    sample_ids: torch.Tensor,
    example_ids: torch.Tensor,
    step: int,
    *,
    dtype: torch.dtype,
    config: BlockDiffusionConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask what is drawn for each example of a batch, or of a part of one.

    Args:
        input_ids, labels, sample_ids, example_ids: As of `train_step`.
        step: The updates made so far.
        dtype: Of the weights.
        config: Of the run.

    Returns:
        noisy_ids: Like input_ids.
        weights: [batch_size, num_tokens]: what the loss of each token is multiplied by, 0 where it is not masked.
        number: [], int64: what the sum of those is divided by, after it is added up over the parts of a batch.
    """
    shares_BS, is_drawn_BS = draws(sample_ids, example_ids, step, config=config)
    has_label_BS = (labels != IGNORED_LABEL) & (sample_ids >= 0)
    is_masked_BS = is_drawn_BS & has_label_BS
    noisy_ids = torch.where(is_masked_BS, config.model.mask_token_id, input_ids)
    weights_BS = weights(shares_BS.to(dtype), is_masked_BS, sample_ids, config=config)
    match config.mean_over:
        case "tokens":
            number = has_label_BS.sum()
        case "masked":
            number = is_masked_BS.sum()
        case "examples":
            weights_BS = weights_BS / has_label_BS.sum(dim=1, keepdim=True).clamp(min=1)
            number = torch.full((), len(labels), device=labels.device)
    return noisy_ids, weights_BS, number


def shares(
    parameters: Tensors, *microbatch: Any, batch_size: int, step: int, config: BlockDiffusionConfig
) -> tuple[torch.Tensor, Tensors]:
    """Return a microbatch's share of what is minimized and of the metrics, as `training.step` takes it.

    A batch is that of `weighted_batch`.
    """
    loss = weighted_loss(partial(language_models.operation(config.model), parameters), *microbatch, config=config)
    return loss, {"loss": loss}


def weighted_loss(
    model: Callable[..., torch.Tensor],
    noisy_ids: torch.Tensor,
    clean_ids: torch.Tensor,
    labels: torch.Tensor,
    sample_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    config: BlockDiffusionConfig,
) -> torch.Tensor:
    """Return the sum of the weighted cross-entropies of all tokens, []; `model` takes arrays, as of `language_models.predict`."""
    logits_BSV = language_models.predict(model, noisy_ids, clean_ids, sample_ids, config=config.model)
    logits_BSV = at_least_float32(logits_BSV)
    if config.excludes_mask_token:
        is_mask_V = torch.arange(config.model.vocab_size, device=labels.device) == config.model.mask_token_id
        logits_BSV = logits_BSV + EXCLUDED * is_mask_V
    log_probs_BSV = torch.log_softmax(logits_BSV, dim=-1)
    own_BS1 = log_probs_BSV.gather(2, labels.long().clamp(min=0)[..., None])
    return -(weights * own_BS1[..., 0]).sum()


def draws(
    sample_ids: torch.Tensor, example_ids: torch.Tensor, step: int, *, config: BlockDiffusionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw what is random in a step, each example by its id.

    A number is drawn for every place; the time of a sequence, sample or block is that of its first token. Times are the same bits
    in both frameworks; XLA may round the sum and product of a share once, by which one token in 10**8 is masked or not.

    Args:
        sample_ids: [batch_size, num_tokens], integer.
        example_ids: [batch_size], integer.
        step: The updates made so far.
        config: Of the run.

    Returns:
        shares: [batch_size, num_tokens], float32: the probability with which each token is masked.
        is_drawn: [batch_size, num_tokens], bool: whether it is, if it has a label.
    """
    num_tokens = sample_ids.shape[1]
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids}
    drawn_BS = random.uniform((num_tokens,), **key, purpose=purposes.MASK_TIMES)
    first_BS = first_places(sample_ids, config=config)
    ticks_BS = (drawn_BS.gather(1, first_BS) * TICKS).long()
    if config.antithetic:
        is_first_BS = (first_BS == torch.arange(num_tokens, device=first_BS.device)) & (sample_ids >= 0)
        before_BS = is_first_BS.cumsum(dim=1).gather(1, first_BS) - 1
        of_first_B1 = ticks_BS.gather(1, is_first_BS.int().argmax(dim=1, keepdim=True))
        ticks_BS = (of_first_B1 + before_BS * (TICKS // is_first_BS.sum(dim=1, keepdim=True).clamp(min=1))) % TICKS
    times_BS = ticks_BS.float() / TICKS
    shares_BS = config.least_share + (config.greatest_share - config.least_share) * times_BS
    return shares_BS, random.uniform((num_tokens,), **key, purpose=purposes.MASKED_TOKENS) < shares_BS


def first_places(sample_ids: torch.Tensor, *, config: BlockDiffusionConfig) -> torch.Tensor:
    """Return for each token where the first one is that shares its time, [batch_size, num_tokens], int64."""
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
    return is_together_BSS.int().argmax(dim=2)  # of several that are largest the first


def weights(
    shares: torch.Tensor, is_masked: torch.Tensor, sample_ids: torch.Tensor, *, config: BlockDiffusionConfig
) -> torch.Tensor:
    """Return what the losses of tokens are multiplied by, like shares [batch_size, num_tokens]: 0 where none is masked.

    cart: sum over tokens j of the sample of i that are seen of cart_p * (1 - cart_p)**(abs(i - j) - 1) / 2
    """
    match config.weighting:
        case "inverse":
            weights_BS = 1 / shares
        case "none":
            weights_BS = torch.ones_like(shares)
        case "linear":
            weights_BS = 1 - shares
        case "cart":
            place_S = torch.arange(shares.shape[1], dtype=shares.dtype, device=shares.device)
            distance_SS = (place_S[:, None] - place_S[None, :]).abs()
            near_SS = config.cart_p * (1 - config.cart_p) ** (distance_SS - 1) / 2
            sees_BSS = (sample_ids[:, :, None] == sample_ids[:, None, :]) & ~is_masked[:, None, :]
            weights_BS = torch.where(sees_BSS, near_SS, 0).sum(dim=2)
    return torch.where(is_masked, weights_BS, 0)
