"""Loops that decode masked and block diffusion language models, step by step of `unmasking`.

A model is a function from ids [batch_size, length] to logits [batch_size, length, vocabulary_size]; one with a cache is a
`CachedModel`. The host waits for the device only where it asks whether a block is done.

Shapes: B batch_size, L length of prompt and new tokens, S places of a block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import DreamDecodingConfig, LLaDADecodingConfig, SDARConfig, SDARDecodingConfig, SDARMoEConfig
from gaugeblock.reference.torch import random, unmasking
from gaugeblock.reference.torch.token_choices import guided_logits

Model = Callable[[torch.Tensor], torch.Tensor]
Cache = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A block-causal model with a cache of finished blocks, which is whatever the functions make it.

    Attributes:
        prefill: From ids [batch_size, length] of finished blocks, of which there may be none, to a cache of them.
        denoise: From a cache and the ids [batch_size, block_length] of the open block to its logits; the cache stays as it is.
        store: From a cache and the ids of the finished block to a cache with it.
    """

    prefill: Callable[[torch.Tensor], Any]
    denoise: Callable[[Any, torch.Tensor], torch.Tensor]
    store: Callable[[Any, torch.Tensor], Any]


def with_cache(
    sdar_cached: Callable[..., Any], state: Mapping[str, torch.Tensor], *, config: SDARConfig | SDARMoEConfig
) -> CachedModel:
    """Return SDAR with the keys and values of finished blocks for a cache.

    Args:
        sdar_cached: `sdar.sdar_cached`, or another implementation of it.
        state: Its parameters.
        config: The model.
    """

    def denoise(cache: Cache, ids: torch.Tensor) -> torch.Tensor:
        return sdar_cached(state, ids, *cache, config=config)[0]

    def store(cache: Cache, ids: torch.Tensor) -> Cache:
        _, keys, values = sdar_cached(state, ids, *cache, config=config)
        return torch.cat([cache[0], keys], dim=3), torch.cat([cache[1], values], dim=3)

    def prefill(ids: torch.Tensor) -> Cache:
        shape = config.num_hidden_layers, ids.shape[0], config.num_key_value_heads, 0, config.head_dim
        nothing = torch.zeros(shape, dtype=state["lm_head.weight"].dtype, device=ids.device)
        return store((nothing, nothing), ids) if ids.shape[1] else (nothing, nothing)

    return CachedModel(prefill=prefill, denoise=denoise, store=store)


def llada_generate(
    model: Model, prompt_ids: torch.Tensor, example_ids: torch.Tensor, *, config: LLaDADecodingConfig, seed: int
) -> torch.Tensor:
    """Fill blocks from left to right, each in steps / num_blocks passes over the whole sequence.

    Args:
        model: Its logits are those of the token that stands at a place, not of the next one.
        prompt_ids: [batch_size, prompt_length], integer.
        example_ids: [batch_size], integer in 0..2**32 - 1; an id has the same draws in any batch.
        config: What is made and how.
        seed: In 0..2**64 - 1.

    Returns:
        [batch_size, prompt_length + new_tokens], dtype as prompt_ids: the prompt as it was, and new tokens.

    Raises:
        TypeError: An argument is not an array of the dtype above, or no config.
        ValueError: Shapes do not fit together.

    Source: Nie et al. (arXiv:2502.09992), algorithm 5; ML-GSAI/LLaDA, generate.py.
    """
    validation.decoding(prompt_ids, example_ids, config, LLaDADecodingConfig)
    ids_BL = with_masks(prompt_ids, config.new_tokens, config.mask_id)
    prompt_length, steps = prompt_ids.shape[1], config.steps // config.num_blocks
    for block in range(config.num_blocks):
        start = prompt_length + block * config.block_length
        places = slice(start, start + config.block_length)
        counts = unmasking.quotas((ids_BL[:, places] == config.mask_id).sum(dim=-1), steps=steps)
        for step in range(steps):
            logits = model(ids_BL)[:, places]
            if config.cfg_scale > 0:
                without_prompt = torch.cat([torch.full_like(prompt_ids, config.mask_id), ids_BL[:, prompt_length:]], dim=1)
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
            ids_BL = torch.cat([ids_BL[:, :start], new_BS, ids_BL[:, places.stop :]], dim=1)
    return ids_BL


def sdar_generate(
    model: CachedModel, prompt_ids: torch.Tensor, example_ids: torch.Tensor, *, config: SDARDecodingConfig, seed: int
) -> torch.Tensor:
    """Fill blocks from left to right, each by passes over the block and the cache, and one more that stores it when it is done.

    The prompt's full blocks are stored at first; its tail opens the first block that is decoded. A row ends after the block in
    which it has a stop id.

    Args: as of `llada_generate`.

    Returns:
        [batch_size, prompt_length + new_tokens], dtype as prompt_ids: the prompt as it was, new tokens, and masks after the
        block in which a row ended.

    Raises: as `llada_generate`.

    Source: Cheng et al. (arXiv:2510.06303), section 3; JetLM/SDAR, generate.py.
    """
    validation.decoding(prompt_ids, example_ids, config, SDARDecodingConfig)
    length, size = prompt_ids.shape[1] + config.new_tokens, config.block_length
    first, num_blocks = prompt_ids.shape[1] // size, -(-length // size)
    ids_BL = with_masks(prompt_ids, num_blocks * size - prompt_ids.shape[1], config.mask_id)
    cache = model.prefill(ids_BL[:, : first * size])
    runs_B = torch.ones_like(example_ids, dtype=torch.bool)
    counts = unmasking.quotas(torch.full((len(prompt_ids),), size, device=prompt_ids.device), steps=config.steps)
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
            ids_BS = torch.where(runs_B[:, None], new_BS, ids_BS)
        cache = model.store(cache, ids_BS)
        ids_BL = torch.cat([ids_BL[:, :start], ids_BS, ids_BL[:, stop:]], dim=1)
        for stop_id in config.stop_ids:
            runs_B = runs_B & ~(ids_BL[:, prompt_ids.shape[1] : stop] == stop_id).any(dim=-1)
        if not bool(runs_B.any()):
            break
    return ids_BL[:, :length]


def dream_generate(
    model: Model, prompt_ids: torch.Tensor, example_ids: torch.Tensor, *, config: DreamDecodingConfig, seed: int
) -> torch.Tensor:
    """Decide a share of the masks in each of `steps` passes over the whole sequence, the last of which decides all that is left.

    Args: as of `llada_generate`; `dream.dream` has shifted its logits to their own places.

    Returns: as `llada_generate`.

    Raises: as `llada_generate`.

    Source: Ye et al. (arXiv:2508.15487); the public model's generation_utils.py.
    """
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
        ids_BL = torch.cat([ids_BL[:, :start], new_BS], dim=1)
    return ids_BL


def with_masks(prompt_ids: torch.Tensor, count: int, mask_id: int) -> torch.Tensor:
    """Return the prompt, [batch_size, prompt_length], and so many masks after it."""
    return torch.nn.functional.pad(prompt_ids, (0, count), value=mask_id)


def token_uniforms(logits: torch.Tensor, *, seed: int, step: int, example: torch.Tensor) -> torch.Tensor:
    """Draw uniform numbers of logits' shape, each example by its id, float32."""
    return random.uniform(tuple(logits.shape[1:]), seed=seed, step=step, example=example, purpose=purposes.TOKEN_DRAWS)


def place_uniforms(logits: torch.Tensor, *, seed: int, step: int, example: torch.Tensor) -> torch.Tensor:
    """Draw a uniform number for each place of logits, [batch_size, places], float32."""
    return random.uniform(tuple(logits.shape[1:2]), seed=seed, step=step, example=example, purpose=purposes.PLACE_DRAWS)
