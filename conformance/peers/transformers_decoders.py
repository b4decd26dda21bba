"""transformers' Qwen3, Qwen3-MoE, Llama and Qwen2 on trial as SDAR, SDAR-MoE, LLaDA and Dream.

Their attention is eager, under our masks as additive ones. Where a token may look nowhere, they have no number; here its
attention is 0, which is said to them before `o_proj`. Imported only where transformers is installed.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch.func import functional_call

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.modules import with_buffers_alone
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference import decoder_states
from gaugeblock.reference.configs import DreamConfig, LanguageModelConfig, LLaDAConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.torch import block_masks

CLASSES: Mapping[type, tuple[Any, Any]] = {
    SDARConfig: (transformers.Qwen3Config, transformers.Qwen3Model),
    SDARMoEConfig: (transformers.Qwen3MoeConfig, transformers.Qwen3MoeModel),
    LLaDAConfig: (transformers.LlamaConfig, transformers.LlamaModel),
    DreamConfig: (transformers.Qwen2Config, transformers.Qwen2Model),
}
EAGER: dict[str, Any] = {"dtypes": DTYPES, "rounding": "eager", "oracle": True}


def their_config(config: LanguageModelConfig) -> Any:
    """The same model's config of transformers."""
    own = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    more = ("rms_norm_eps", "intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    sizes = {name: getattr(config, name) for name in (*own, *more) if hasattr(config, name)}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
    implementations = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return CLASSES[type(config)][0](**sizes, rope_parameters=rope, **special, **implementations)


@torch.compiler.disable  # what is compiled gets the module as it is made once
@functools.cache
def model(config: LanguageModelConfig, dtype_of_waves: torch.dtype) -> Any:
    """Of any parameters; the waves of the rotary embedding are made with the module, in that dtype.

    What it attends to is 0 where its buffer `sees` is False, [B or 1, S, 1].
    """
    theirs = with_buffers_alone(CLASSES[type(config)][1], their_config(config))
    theirs.register_buffer("sees", None)
    for layer in theirs.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * theirs.sees,))
    return theirs


def hidden_states(
    state: Mapping[str, torch.Tensor],
    input_ids: torch.Tensor,
    places: torch.Tensor,
    mask: torch.Tensor,
    config: LanguageModelConfig,
    **options: Any,
) -> Any:
    """What their module makes of tokens [B, S] at places [B, S] under a mask [B, S, T]; options are theirs."""
    theirs = model(config, torch.get_default_dtype())
    dtype = state["lm_head.weight"].dtype
    is_lost = ~mask.any(-1, keepdim=True)
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~(mask | is_lost), -torch.inf)[:, None]
    parameters = {name.removeprefix("model."): each for name, each in state.items() if name.startswith("model.")}
    arguments = {"input_ids": input_ids.long(), "attention_mask": additive, "position_ids": places, **options}
    return functional_call(theirs, parameters | {"sees": ~is_lost}, (), arguments)


def logits(state: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Their head."""
    return torch.nn.functional.linear(hidden, state["lm_head.weight"])


def counted(input_ids: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Places [B, S] from a first one on."""
    return torch.arange(first, first + input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)


def block_causal(input_ids: torch.Tensor, config: Any, past: int = 0) -> torch.Tensor:
    """The mask [B, S, past + S]."""
    places = torch.arange(past + input_ids.shape[1], device=input_ids.device)
    mask = block_masks.block_causal_mask(places[past:], places, block_length=config.block_length)
    return mask.expand(len(input_ids), -1, -1)


@peer("llada.llada", only="hidden_size % num_attention_heads == 0", **EAGER)
class TransformersLlama:
    """LlamaModel, its parameters by LLaDA's names."""

    def __call__(self, state, input_ids, attention_mask, *, config):
        common = decoder_states.llada_as_transformers(state, config)
        mask = attention_mask[:, None].expand(-1, input_ids.shape[1], -1)
        return logits(common, hidden_states(common, input_ids, counted(input_ids), mask, config).last_hidden_state)


@peer("dream.dream", **EAGER)
class TransformersQwen2:
    """Qwen2Model, its logits shifted."""

    def __call__(self, state, input_ids, attention_mask, *, config):
        places = attention_mask.long().cumsum(1) - 1
        mask = attention_mask[:, None] & attention_mask[:, :, None]
        unshifted = logits(state, hidden_states(state, input_ids, places, mask, config).last_hidden_state)
        return unshifted[:, [0, *range(input_ids.shape[1] - 1)]]


@peer("sdar.sdar", **EAGER)
class TransformersQwen3:
    """Qwen3Model."""

    def __call__(self, state, input_ids, *, config):
        out = hidden_states(state, input_ids, counted(input_ids), block_causal(input_ids, config), config)
        return logits(state, out.last_hidden_state)


@peer("sdar.sdar_moe", **EAGER)
class TransformersQwen3Moe:
    """Qwen3MoeModel."""

    def __call__(self, state, input_ids, *, config):
        mask = block_causal(input_ids, config)
        out = hidden_states(state, input_ids, counted(input_ids), mask, config, output_router_logits=True)
        router_logits = torch.stack(out.router_logits).unflatten(1, input_ids.shape)
        return logits(state, out.last_hidden_state), router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))


@peer("sdar.sdar_cached", **EAGER)
class TransformersQwen3Cached:
    """Qwen3Model with a DynamicCache."""

    def __call__(self, state, input_ids, past_keys, past_values, *, config):
        past, cache = past_keys.shape[3], transformers.DynamicCache()
        for index, (keys, values) in enumerate(zip(past_keys, past_values, strict=True)):
            cache.update(keys, values, index)
        mask, places = block_causal(input_ids, config, past), counted(input_ids, past)
        out = hidden_states(state, input_ids, places, mask, config, past_key_values=cache, use_cache=True)
        kept = [torch.stack([getattr(layer, each)[:, :, past:] for layer in cache.layers]) for each in ("keys", "values")]
        return logits(state, out.last_hidden_state), *kept


@peer("sdar.sdar_training", **EAGER)
class TransformersQwen3Training:
    """Qwen3Model on noisy and clean tokens as SDAR's code packs them: of each sample the noisy ones, then the clean ones."""

    def __call__(self, state, noisy_ids, clean_ids, sample_ids, *, config):
        rows = [self.row(state, *each, config=config) for each in zip(noisy_ids, clean_ids, sample_ids, strict=True)]
        return torch.stack(rows)

    def row(self, state, noisy_ids, clean_ids, sample_ids, *, config):
        samples = [(sample_ids == each).nonzero()[:, 0] for each in sample_ids[sample_ids >= 0].unique()]
        length = config.block_length
        parts = []
        for own in samples:
            block = torch.arange(len(own), device=own.device) // length
            parts.append((own, torch.zeros_like(own), block))
            parts.append((own, torch.ones_like(own), block))
        lost = (sample_ids < 0).nonzero()[:, 0]
        parts.append((lost, torch.zeros_like(lost), torch.zeros_like(lost)))
        place, is_clean, block = (torch.cat(each) for each in zip(*parts, strict=True))
        ids = torch.where(is_clean.bool(), clean_ids[place], noisy_ids[place])
        own = sample_ids[place]
        in_sample = torch.cat([torch.arange(len(each), device=each.device) for each, _, _ in parts])
        together = (own[:, None] == own) & (own >= 0)
        query, key, query_clean, key_clean = block[:, None], block[None], is_clean[:, None], is_clean[None]
        sees = torch.where(query_clean == key_clean, query == key, False)  # within its own copy and block
        sees = sees | ((key_clean == 1) & (query > key))
        mask = (together & sees)[None]
        out = logits(state, hidden_states(state, ids[None], in_sample[None], mask, config).last_hidden_state)[0]
        noisy = is_clean == 0
        return torch.zeros_like(out[: len(sample_ids)]).index_put((place[noisy],), out[noisy])
