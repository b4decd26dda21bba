"""Routers that choose by noisy logits; the draw is an input.

Shapes: T num_tokens, E num_experts, K top_k.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.precision import at_least_float32


def noisy_topk(router_logits: jax.Array, noise_logits: jax.Array, noise: jax.Array, *, top_k: int) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.noisy_routers.noisy_topk`, but topk_ids are int32, and the noise gets a zero gradient."""
    validation.noisy_topk(router_logits, noise_logits, noise, top_k)

    noisy_TE = noisy_logits(router_logits, noise_logits, noise)
    ids_TK = jax.lax.top_k(noisy_TE, top_k)[1]
    return jax.nn.softmax(jnp.take_along_axis(noisy_TE, ids_TK, axis=-1), axis=-1), ids_TK


def noisy_logits(router_logits: jax.Array, noise_logits: jax.Array, noise: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.noisy_routers.noisy_logits`."""
    logits_TE = at_least_float32(router_logits)
    deviation_TE = jax.nn.softplus(at_least_float32(noise_logits))
    return logits_TE + jax.lax.stop_gradient(noise).astype(logits_TE.dtype) * deviation_TE


def ste_topk(
    router_logits: jax.Array, noise: jax.Array, *, top_k: int, noise_std: float, training: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.noisy_routers.ste_topk`, but topk_ids are int32, and the noise gets a zero gradient."""
    validation.ste_topk(router_logits, noise, top_k, noise_std)

    logits_TE = at_least_float32(router_logits).reshape(-1, router_logits.shape[-1])
    probs_clean_TE = jax.nn.softmax(logits_TE, axis=-1)
    entropy_T = -(probs_clean_TE * jnp.log(probs_clean_TE + 1e-9)).sum(axis=-1)
    probs_TE = noisy_probs(logits_TE, noise, noise_std) if training else probs_clean_TE

    ids_TK = jax.lax.top_k(probs_TE, top_k)[1]
    weights_TK = jnp.take_along_axis(probs_TE, ids_TK, axis=-1)
    if top_k > 1:
        weights_TK = weights_TK / (weights_TK.sum(axis=-1, keepdims=True) + 1e-9)
    else:
        weights_TK = 1 + (weights_TK - jax.lax.stop_gradient(weights_TK)) if training else jnp.ones_like(weights_TK)
    return weights_TK, ids_TK, probs_TE, probs_clean_TE, logits_TE, entropy_T


def noisy_probs(router_logits: jax.Array, noise: jax.Array, noise_std: float) -> jax.Array:
    """As `gaugeblock.reference.torch.noisy_routers.noisy_probs`."""
    noise_TE = jax.lax.stop_gradient(noise).astype(router_logits.dtype).reshape(router_logits.shape)
    return jax.nn.softmax(router_logits + noise_std * noise_TE, axis=-1)


def noise_std_at(step: int, total_steps: int, anneal_fraction: float, noise_std: float) -> float:
    """As `gaugeblock.reference.torch.noisy_routers.noise_std_at`."""
    validation.noise_std_at(step, total_steps, anneal_fraction, noise_std)
    anneal_steps = int(total_steps * anneal_fraction)
    return noise_std * (1 - step / anneal_steps) if step < anneal_steps else 0.0
