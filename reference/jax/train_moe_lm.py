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

import jax
import jax.numpy as jnp

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import IGNORED_LABEL, MoELMConfig
from gaugeblock.reference.jax import random, training, upcycled_gpt2
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.moe_states import OF_AN_EXPERT

Tensors = dict[str, jax.Array]
Outputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@dataclass(frozen=True)
class Metrics:
    """As `gaugeblock.reference.torch.train_moe_lm.Metrics`."""

    lm_loss: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    entropy: jax.Array
    load: jax.Array
    gradient_norm: jax.Array


def initial_state(parameters: Mapping[str, jax.Array], *, config: MoELMConfig) -> Tensors:
    """As `gaugeblock.reference.torch.train_moe_lm.initial_state`, but step and numbers of updates are int32."""
    return training.initial_state(parameters, config=config, stacked=upcycled_gpt2.expert_names(config.model))


def train_step(
    state: Mapping[str, jax.Array],
    input_ids: jax.Array,
    labels: jax.Array,
    example_ids: jax.Array,
    *,
    config: MoELMConfig,
) -> tuple[Tensors, Metrics]:
    """As `gaugeblock.reference.torch.train_moe_lm.train_step`."""
    model = config.model
    stacked = upcycled_gpt2.expert_names(model)
    validation.moe_lm_step(state, input_ids, labels, example_ids, config, upcycled_gpt2.state_shapes(model), stacked)
    batch = input_ids, labels, label_weights(labels, dtype=state[f"model.{upcycled_gpt2.TOKENS}"].dtype), example_ids
    new_state, metrics = training.step(shares, state, batch, config=config, rows_used=experts_used)
    return new_state, Metrics(**metrics)


def label_weights(labels: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Return by how much the loss of each label of a whole batch counts, [batch_size, num_tokens - 1]."""
    counts_BS = labels[:, 1:] != IGNORED_LABEL
    return counts_BS.astype(dtype) / counts_BS.sum()


def shares(
    parameters: Tensors,
    input_ids: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    example_ids: jax.Array,
    *,
    batch_size: int | jax.Array,
    step: jax.Array,
    config: MoELMConfig,
) -> tuple[jax.Array, Tensors]:
    """As `gaugeblock.reference.torch.train_moe_lm.shares`."""
    noise_BSLE = noise(example_ids, input_ids.shape[1], step, dtype=weights.dtype, config=config)
    outputs = upcycled_gpt2.upcycled_gpt2(parameters, input_ids, noise_BSLE, training=True, config=config.model)
    shares_B = jnp.ones(len(input_ids), weights.dtype) / batch_size
    return shares_of_outputs(outputs, labels, weights, shares_B, outputs[4].mean(axis=0), config=config)


def shares_of_outputs(
    outputs: Outputs,
    labels: jax.Array,
    weights: jax.Array,
    example_shares: jax.Array,
    load: jax.Array,
    *,
    config: MoELMConfig,
) -> tuple[jax.Array, Tensors]:
    """As `gaugeblock.reference.torch.train_moe_lm.shares_of_outputs`."""
    logits_BSV, router_logits_BSLE, probs_BSLE, entropy_BSL, load_BLE = outputs
    num_layers = max(1, len(config.model.moe_layers))
    num_tokens, num_experts = router_logits_BSLE.shape[1], router_logits_BSLE.shape[3]
    lm_loss = (weights * token_losses(logits_BSV, labels)).sum()

    shares_BSL = jnp.broadcast_to((example_shares / num_tokens)[:, None, None], entropy_BSL.shape)
    probability_LE = (shares_BSL[..., None] * probs_BSLE).sum(axis=(0, 1))
    balance_loss = num_experts * (load * probability_LE).sum() / num_layers
    z_loss = (shares_BSL * jnp.square(jax.nn.logsumexp(router_logits_BSLE, axis=-1))).sum() / num_layers
    metrics = {
        "lm_loss": lm_loss,
        "balance_loss": balance_loss,
        "z_loss": z_loss,
        "entropy": (shares_BSL * entropy_BSL).sum(axis=(0, 1)),
        "load": (example_shares[:, None, None] * load_BLE).sum(axis=0),
    }
    objective = lm_loss + config.balance_coefficient * balance_loss + config.z_coefficient * z_loss
    return objective, metrics


def token_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.train_moe_lm.token_losses`."""
    labels_BS = labels[:, 1:]
    log_probs_BSV = jax.nn.log_softmax(at_least_float32(logits[:, :-1]), axis=-1)
    picked_BS = jnp.take_along_axis(log_probs_BSV, jnp.maximum(labels_BS, 0)[..., None], axis=-1).squeeze(-1)
    return -picked_BS


def noise(example_ids: jax.Array, num_tokens: int, step: jax.Array, *, dtype: jnp.dtype, config: MoELMConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.train_moe_lm.noise`."""
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids, "purpose": purposes.ROUTER_NOISE}
    normals_BSLE = random.normal((num_tokens, len(config.model.moe_layers), config.model.num_experts), **key)
    return normals_BSLE.astype(dtype) * noise_std_of(step, config=config).astype(dtype)


def noise_std_of(step: jax.Array, *, config: MoELMConfig) -> jax.Array:
    """Return the deviation of the noise in the step after `step` others."""
    with jax.enable_x64(True):
        steps, end = jnp.asarray(step).astype(jnp.float64), config.noised_steps
        done = steps / max(1, end)
        return jnp.where(steps < end, config.noise_std * (1 - done), 0.0)


def experts_used(metrics: Mapping[str, jax.Array], *, config: MoELMConfig) -> Tensors:
    """Return which experts had tokens, [num_experts] bool, for each parameter of them, as `training.finish` takes it."""
    return {
        f"transformer.h.{index}.mlp.experts.{name}": load_E > 0
        for index, load_E in zip(config.model.moe_layers, metrics["load"], strict=True)
        for name in OF_AN_EXPERT
    }
