"""One training step of an upcycled GPT-2: the loss of its tokens, losses of its routers' load and logits, annealed noise.

The state of a run is that of `training`, whose `model.<name>` are named as in `upcycled_gpt2`. Experts are stacked, and an update
leaves those alone to which no token of the batch came. A sequence's noise is drawn by (seed, step, example id, purpose), for each
token, layer and expert, whatever batch, microbatch or rank it is in.

The balance loss is of a microbatch: the product of two means over its tokens. So it depends on how a batch is split, as no other
part of a step does; ranks have one microbatch together.

Shapes: B batch_size, S tokens of a sequence, V vocab_size, L num_moe_layers, E num_experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import IGNORED_LABEL, MoELMConfig
from gaugeblock.reference.moe_states import OF_AN_EXPERT
from gaugeblock.reference.torch import noisy_routers, random, training, upcycled_gpt2
from gaugeblock.reference.torch.precision import at_least_float32

Tensors = dict[str, torch.Tensor]
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Metrics:
    """What a step reports, before the update.

    Attributes:
        lm_loss: [], the mean over the labels of the batch.
        balance_loss: [], the mean over the MoE layers, and over microbatches by their numbers of examples; 1 for an even load.
        z_loss: [], the mean over the MoE layers and tokens.
        entropy: [num_moe_layers], the mean over tokens, in nats, of the routers' probabilities without noise.
        load: [num_moe_layers, num_experts], each expert's part of all assignments.
        gradient_norm: [], the norm of all gradients together, before clipping.
    """

    lm_loss: torch.Tensor
    balance_loss: torch.Tensor
    z_loss: torch.Tensor
    entropy: torch.Tensor
    load: torch.Tensor
    gradient_norm: torch.Tensor


def initial_state(parameters: Mapping[str, torch.Tensor], *, config: MoELMConfig) -> Tensors:
    """Return the state at the start of a run with these parameters, as `upcycled_gpt2.upcycled_state` makes them; step 0, int64.

    Moments and numbers of updates are 0.
    """
    return training.initial_state(parameters, config=config, stacked=upcycled_gpt2.expert_names(config.model))


def train_step(
    state: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: MoELMConfig,
) -> tuple[Tensors, Metrics]:
    """Make one update on the losses of a batch; the given state is not written to.

        logits, router_logits, p  = model(input_ids, noise_std * normals drawn for each example), in training
        lm_loss       = mean over labels[b, s + 1] that are not -100 of -log softmax(logits[b, s])[labels[b, s + 1]]
        balance_loss  = mean over layers of num_experts * sum over e of load[e] * (mean over tokens of p[e])
        z_loss        = mean over layers and tokens of logsumexp(router_logits)**2
        new_state     = update of the optimizer by the clipped gradients of
                        lm_loss + balance_coefficient * balance_loss + z_coefficient * z_loss (`training.update`),
                        but for experts with a load of 0

    where load[e] is the part of a layer's assignments, has no gradient, and with p[e] is of a microbatch. The deviation of the
    noise falls on a line from `noise_std` to 0 over the first `anneal_fraction` of the run (`noisy_routers.noise_std_at`).

    Args:
        state: As of `training`; float32 or float64, with integer numbers of updates and an integer step.
        input_ids: [batch_size, num_tokens], int32 or int64 in 0 .. vocab_size - 1, num_tokens 2 to max_position_embeddings.
        labels: [batch_size, num_tokens], int32 or int64: the input_ids, or -100 for tokens that are not to be predicted. As in
            transformers, they are those of the tokens themselves; the first of a sequence is not read.
        example_ids: [batch_size], integer in 0..2**32 - 1; examples with the same id get the same draws.
        config: Of the run.

    Returns:
        new_state: As state.
        metrics: In the dtype of the state.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `state` is not a dict of arrays.
        ValueError: Shapes or devices do not fit together, `state` lacks an entry or has one too many, or an id or a label names
            no token.
        FloatingPointError: A loss or a gradient is not finite; the message names the step and the first bad one. So where no
            label counts.

    Source: sumitdotml/moe-emergence, `moe_emergence/train.py`, whose loss is the mean of its microbatches' means: the same where
    these have as many labels. Switch Transformers (arXiv:2101.03961), equations 4 to 6; ST-MoE (arXiv:2202.08906), equation 5.
    """
    model = config.model
    stacked = upcycled_gpt2.expert_names(model)
    validation.moe_lm_step(state, input_ids, labels, example_ids, config, upcycled_gpt2.state_shapes(model), stacked)
    batch = input_ids, labels, label_weights(labels, dtype=state[f"model.{upcycled_gpt2.TOKENS}"].dtype), example_ids
    new_state, metrics = training.step(shares, state, batch, config=config, rows_used=experts_used)
    return new_state, Metrics(**metrics)


def label_weights(labels: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Return by how much the loss of each label of a whole batch counts, [batch_size, num_tokens - 1]."""
    counts_BS = labels[:, 1:] != IGNORED_LABEL
    return counts_BS.to(dtype) / counts_BS.sum()


def shares(
    parameters: Tensors,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    batch_size: int,
    step: int,
    config: MoELMConfig,
) -> tuple[torch.Tensor, Tensors]:
    """Return a microbatch's share of what is minimized and of the metrics, as `training.step` takes it.

    A batch is input_ids, labels, `label_weights` and example_ids.
    """
    noise_BSLE = noise(example_ids, input_ids.shape[1], step, dtype=weights.dtype, config=config)
    outputs = upcycled_gpt2.upcycled_gpt2(parameters, input_ids, noise_BSLE, training=True, config=config.model)
    shares_B = weights.new_ones(len(input_ids)) / batch_size
    return shares_of_outputs(outputs, labels, weights, shares_B, outputs[4].mean(dim=0), config=config)


def shares_of_outputs(
    outputs: Outputs,
    labels: torch.Tensor,
    weights: torch.Tensor,
    example_shares: torch.Tensor,
    load: torch.Tensor,
    *,
    config: MoELMConfig,
) -> tuple[torch.Tensor, Tensors]:
    """Return the share of some examples of a microbatch.

    Args:
        outputs: What the model returns of them.
        labels: [batch_size, num_tokens].
        weights: Of them, as of `label_weights`.
        example_shares: [batch_size], 1 over the number of examples in the whole batch; 0 for one that is padding.
        load: [num_moe_layers, num_experts], each expert's part of all assignments of the microbatch; no gradient.
        config: Of the run.

    Returns: as `shares`.
    """
    logits_BSV, router_logits_BSLE, probs_BSLE, entropy_BSL, load_BLE = outputs
    num_layers = max(1, len(config.model.moe_layers))
    num_tokens, num_experts = router_logits_BSLE.shape[1], router_logits_BSLE.shape[3]
    lm_loss = (weights * token_losses(logits_BSV, labels)).sum()

    shares_BSL = (example_shares / num_tokens)[:, None, None].expand(entropy_BSL.shape)
    probability_LE = (shares_BSL[..., None] * probs_BSLE).sum(dim=(0, 1))
    balance_loss = num_experts * (load * probability_LE).sum() / num_layers
    z_loss = (shares_BSL * torch.logsumexp(router_logits_BSLE, dim=-1).square()).sum() / num_layers
    metrics = {
        "lm_loss": lm_loss,
        "balance_loss": balance_loss,
        "z_loss": z_loss,
        "entropy": (shares_BSL * entropy_BSL).sum(dim=(0, 1)),
        "load": (example_shares[:, None, None] * load_BLE).sum(dim=0),
    }
    objective = lm_loss + config.balance_coefficient * balance_loss + config.z_coefficient * z_loss
    return objective, metrics


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of each label but the first, [B, S - 1], with the logits [B, S, V] of the token before it.

    What stands for a label that does not count is left alone: its weight is 0.
    """
    labels_BS = labels[:, 1:].long()
    log_probs_BSV = torch.log_softmax(at_least_float32(logits[:, :-1]), dim=-1)
    picked_BS = log_probs_BSV.gather(-1, labels_BS.clamp(min=0)[..., None])[..., 0]
    return -picked_BS


def noise(example_ids: torch.Tensor, num_tokens: int, step: int, *, dtype: torch.dtype, config: MoELMConfig) -> torch.Tensor:
    """Draw what is added to the routers' logits in a step, each example by its id.

    Args:
        example_ids: [batch_size], integer.
        num_tokens: Of a sequence; the noise of a token does not depend on how many follow.
        step: The updates made so far.
        dtype: Of the result.
        config: Of the run.

    Returns:
        [batch_size, num_tokens, num_moe_layers, num_experts].
    """
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids, "purpose": purposes.ROUTER_NOISE}
    normals_BSLE = random.normal((num_tokens, len(config.model.moe_layers), config.model.num_experts), **key)
    return normals_BSLE.to(dtype) * noise_std_of(step, config=config)


def noise_std_of(step: int, *, config: MoELMConfig) -> float:
    """Return the deviation of the noise in the step after `step` others."""
    return noisy_routers.noise_std_at(step, config.num_training_steps or 0, config.anneal_fraction, config.noise_std)


def experts_used(metrics: Mapping[str, torch.Tensor], *, config: MoELMConfig) -> Tensors:
    """Return which experts had tokens, [num_experts] bool, for each parameter of them, as `training.finish` takes it."""
    return {
        f"transformer.h.{index}.mlp.experts.{name}": load_E > 0
        for index, load_E in zip(config.model.moe_layers, metrics["load"], strict=True)
        for name in OF_AN_EXPERT
    }
