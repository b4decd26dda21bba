"""Loops that decode masked and block diffusion language models, step by step of `unmasking`.

A model is a function from ids [batch_size, length] to logits [batch_size, length, vocabulary_size]; one with a cache is a
`CachedModel`. The host waits for the device only where it asks whether a block is done.

Shapes: B batch_size, L length of prompt and new tokens, S places of a block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import DreamDecodingConfig, LLaDADecodingConfig, SDARConfig, SDARDecodingConfig, SDARMoEConfig
from gaugeblock.reference.jax import random, unmasking
from gaugeblock.reference.jax.token_choices import guided_logits

Model = Callable[[jax.Array], jax.Array]
Cache = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """As `gaugeblock.reference.torch.decoding.CachedModel`."""

    prefill: Callable[[jax.Array], Any]
    denoise: Callable[[Any, jax.Array], jax.Array]
    store: Callable[[Any, jax.Array], Any]


def with_cache(
    sdar_cached: Callable[..., Any], state: Mapping[str, jax.Array], *, config: SDARConfig | SDARMoEConfig
) -> CachedModel:
    """As `gaugeblock.reference.torch.decoding.with_cache`."""

    def denoise(cache: Cache, ids: jax.Array) -> jax.Array:
        return sdar_cached(state, ids, *cache, config=config)[0]

    def store(cache: Cache, ids: jax.Array) -> Cache:
        _, keys, values = sdar_cached(state, ids, *cache, config=config)
        return jnp.concatenate([cache[0], keys], axis=3), jnp.concatenate([cache[1], values], axis=3)

    def prefill(ids: jax.Array) -> Cache:
        shape = config.num_hidden_layers, ids.shape[0], config.num_key_value_heads, 0, config.head_dim
        nothing = jnp.zeros(shape, dtype=state["lm_head.weight"].dtype)
        return store((nothing, nothing), ids) if ids.shape[1] else (nothing, nothing)

    return CachedModel(prefill=prefill, denoise=denoise, store=store)


def llada_generate(
    model: Model, prompt_ids: jax.Array, example_ids: jax.Array, *, config: LLaDADecodingConfig, seed: int
) -> jax.Array:
    """As `gaugeblock.reference.torch.decoding.llada_generate`."""
    validation.decoding(prompt_ids, example_ids, config, LLaDADecodingConfig)
    ids_BL = with_masks(prompt_ids, config.new_tokens, config.mask_id)
    prompt_length, steps = prompt_ids.shape[1], config.steps // config.num_blocks
    for block in range(config.num_blocks):
        start = prompt_length + block * config.block_length
        places = slice(start, start + config.block_length)
        counts = unmasking.quotas((ids_BL[:, places] == config.mask_id).sum(axis=-1), steps=steps)
        for step in range(steps):
            logits = model(ids_BL)[:, places]
            if config.cfg_scale > 0:
                without_prompt = jnp.concatenate([jnp.full_like(prompt_ids, config.mask_id), ids_BL[:, prompt_length:]], axis=1)
                logits = guided_logits(logits, model(without_prompt)[:, places], cfg_scale=config.cfg_scale)
            key: dict[str, Any] = {"seed": seed, "step": block * steps + step, "example": example_ids}
            new_BS, _ = unmasking.llada_step(
                logits,
                ids_BL[:, places],
                counts[:, step],
                token_uniforms(logits, **key) if config.temperature > 0 else None,
                place_uniforms(logits, **key) if config.remasking == "random" else None,
                mask_id=config.mask_id,
                temperature=config.temperature,
                remasking=config.remasking,
                forbidden_ids=config.forbidden_ids,
                late_ids=config.late_ids,
            )
            ids_BL = jnp.concatenate([ids_BL[:, :start], new_BS, ids_BL[:, places.stop :]], axis=1)
    return ids_BL


def sdar_generate(
    model: CachedModel, prompt_ids: jax.Array, example_ids: jax.Array, *, config: SDARDecodingConfig, seed: int
) -> jax.Array:
    """As `gaugeblock.reference.torch.decoding.sdar_generate`."""
    validation.decoding(prompt_ids, example_ids, config, SDARDecodingConfig)
    length, size = prompt_ids.shape[1] + config.new_tokens, config.block_length
    first, num_blocks = prompt_ids.shape[1] // size, -(-length // size)
    ids_BL = with_masks(prompt_ids, num_blocks * size - prompt_ids.shape[1], config.mask_id)
    cache = model.prefill(ids_BL[:, : first * size])
    runs_B = jnp.ones_like(example_ids, dtype=bool)
    counts = unmasking.quotas(jnp.full((len(prompt_ids),), size), steps=config.steps)
    for block in range(first, num_blocks):
        start, stop = block * size, (block + 1) * size
        ids_BS = ids_BL[:, start:stop]
        for step in range(config.passes):
            if not bool(((ids_BS == config.mask_id) & runs_B[:, None]).any()):
                break
            logits = model.denoise(cache, ids_BS)
            key: dict[str, Any] = {"seed": seed, "step": block * config.passes + step, "example": example_ids}
            new_BS, _ = unmasking.sdar_step(
                logits,
                ids_BS,
                counts[:, min(step, config.steps - 1)],
                token_uniforms(logits, **key) if config.temperature > 0 else None,
                mask_id=config.mask_id,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                strategy=config.strategy,
                bound=config.bound,
                forbidden_ids=config.forbidden_ids,
            )
            ids_BS = jnp.where(runs_B[:, None], new_BS, ids_BS)
        cache = model.store(cache, ids_BS)
        ids_BL = jnp.concatenate([ids_BL[:, :start], ids_BS, ids_BL[:, stop:]], axis=1)
        for stop_id in config.stop_ids:
            runs_B = runs_B & ~(ids_BL[:, prompt_ids.shape[1] : stop] == stop_id).any(axis=-1)
        if not bool(runs_B.any()):
            break
    return ids_BL[:, :length]


def dream_generate(
    model: Model, prompt_ids: jax.Array, example_ids: jax.Array, *, config: DreamDecodingConfig, seed: int
) -> jax.Array:
    """As `gaugeblock.reference.torch.decoding.dream_generate`."""
    validation.decoding(prompt_ids, example_ids, config, DreamDecodingConfig)
    ids_BL, start = with_masks(prompt_ids, config.new_tokens, config.mask_id), prompt_ids.shape[1]
    for step, rate in enumerate(config.rates):
        logits = model(ids_BL)[:, start:]
        key: dict[str, Any] = {"seed": seed, "step": step, "example": example_ids}
        draws_places = config.algorithm == "origin" or config.alg_temp > 0
        new_BS, _ = unmasking.dream_step(
            logits,
            ids_BL[:, start:],
            token_uniforms(logits, **key) if config.temperature > 0 else None,
            place_uniforms(logits, **key) if draws_places else None,
            mask_id=config.mask_id,
            rate=rate,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            algorithm=config.algorithm,
            alg_temp=config.alg_temp,
            forbidden_ids=config.forbidden_ids,
        )
        ids_BL = jnp.concatenate([ids_BL[:, :start], new_BS], axis=1)
    return ids_BL


def with_masks(prompt_ids: jax.Array, count: int, mask_id: int) -> jax.Array:
    """Return the prompt, [batch_size, prompt_length], and so many masks after it."""
    return jnp.pad(prompt_ids, ((0, 0), (0, count)), constant_values=mask_id)


def token_uniforms(logits: jax.Array, *, seed: int, step: int, example: jax.Array) -> jax.Array:
    """Draw uniform numbers of logits' shape, each example by its id, float32."""
    return random.uniform(tuple(logits.shape[1:]), seed=seed, step=step, example=example, purpose=purposes.TOKEN_DRAWS)


def place_uniforms(logits: jax.Array, *, seed: int, step: int, example: jax.Array) -> jax.Array:
    """Draw a uniform number for each place of logits, [batch_size, places], float32."""
    return random.uniform(tuple(logits.shape[1:2]), seed=seed, step=step, example=example, purpose=purposes.PLACE_DRAWS)
