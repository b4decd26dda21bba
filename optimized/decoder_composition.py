"""SDAR, LLaDA and Dream composed of norms, rotations, gated activations and experts that a realm brings, beside torch's products
and attention.

Everything is in the dtype of the parameters. Results of products and of attention are rounded to it; sums of products, and what
is inside of a norm or a rotation, are float32. Where every token sees every token, also where SDAR denoises one block after its
past, attention gets no mask, and a GPU's kernel reads each head of keys once.

Shapes: as in `reference.torch.decoder`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, TypeVar

import torch

from gaugeblock.optimized.decoder_attention import Masks, attention, whole_masks
from gaugeblock.optimized.model_parts import State, linear
from gaugeblock.reference import decoder_states, states
from gaugeblock.reference.configs import DreamConfig, LanguageModelConfig, LLaDAConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.torch import dream as dream_reference
from gaugeblock.reference.torch.attention import join_heads, split_heads
from gaugeblock.reference.torch.block_masks import places_in_samples
from gaugeblock.reference.torch.decoder import Decoded, Heads, places_from
from gaugeblock.reference.torch.rotary import rotary_table

TABLE = "model.embed_tokens.weight"
Outputs = TypeVar("Outputs")


def rows_of_table(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the row of each id."""
    return table[ids.long()]


def unchanged(tokens: torch.Tensor) -> torch.Tensor:
    """Return tokens."""
    return tokens


@dataclass(frozen=True, kw_only=True)
class DecoderParts:
    """Functions with the signatures of those of their names in `gaugeblock.reference.torch`."""

    rms_norm: Callable[..., torch.Tensor]
    rotate: Callable[..., torch.Tensor]
    qk_norm_rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    swiglu: Callable[..., torch.Tensor]
    qwen3_moe: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    block: Callable[[Callable[..., Any]], Callable[..., Any]]
    """What becomes of attention and of a gated network, norm and sum included, before they are called: they are compiled, or stay
    as they are. Experts stay as they are, since which rows one gets is known only when it runs."""
    layer: Callable[[Callable[..., Any]], Callable[..., Any]]
    """What becomes of a whole layer: its parameters are gathered, or it stays as it is."""
    masks: Callable[[torch.Tensor], Masks] = whole_masks
    """What makes masks for a model with that table of embeddings."""
    attention: Callable[..., torch.Tensor] = attention
    """As `decoder_attention.attention`, of the masks that those make."""
    reject: Callable[[str, torch.Tensor], None]
    """Raise TypeError where the tensor of that name has a dtype that these functions do not take."""
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = rows_of_table
    """Returns of a table the rows of ids."""
    entering: Callable[[torch.Tensor], torch.Tensor] = unchanged
    """What becomes of normalized tokens before attention, a gated network or the head."""
    last_linear: Callable[[State, str, torch.Tensor], torch.Tensor] = linear
    """Applies the last linear layer of a branch, by its name."""


def checked(operation: Callable[..., Outputs], check: Callable[..., None], parts: DecoderParts) -> Callable[..., Outputs]:
    """Return one of the operations below, of these parts, that raises what the reference of its name does.

    Args:
        operation: Which takes the call to be good.
        check: Of `validation`, with the operation's arguments but the parts.
        parts: What it is composed of.
    """

    @wraps(operation)
    def run(state: State, *arrays: torch.Tensor | None, **others: Any) -> Outputs:
        check(state, *arrays, **others)
        parts.reject("state", next(iter(state.values())))
        return operation(parts, state, *arrays, **others)

    vars(run)["__signature__"] = inspect.signature(partial(operation, parts))
    return run


def llada(
    parts: DecoderParts,
    state: State,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    config: LLaDAConfig,
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.llada.llada`, of these parts."""
    common = decoder_states.llada_as_transformers(state, config)
    mask = None
    if attention_mask is not None:
        mask = parts.masks(common[TABLE]).full_mask(torch.ones_like(attention_mask), attention_mask)
    layers = states.parts(state, "model.transformer.blocks", config.num_hidden_layers)
    decoded = decode(parts, common, input_ids, places_from(0, input_ids), mask, config=config, layers=layers)
    return linear(common, "lm_head", decoded.hidden_states)


def dream(
    parts: DecoderParts,
    state: State,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    config: DreamConfig,
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.dream.dream`, of these parts."""
    if attention_mask is None:
        places_BS, mask = places_from(0, input_ids), None
    else:
        places_BS = attention_mask.long().cumsum(dim=1) - 1
        mask = parts.masks(state[TABLE]).full_mask(attention_mask, attention_mask)
    decoded = decode(parts, state, input_ids, places_BS, mask, config=config)
    return linear(state, "lm_head", dream_reference.shift(decoded.hidden_states))


def sdar(parts: DecoderParts, state: State, input_ids: torch.Tensor, *, config: SDARConfig) -> torch.Tensor:
    """As `gaugeblock.reference.torch.sdar.sdar`, of these parts."""
    return linear(state, "lm_head", _block_causal(parts, state, input_ids, None, config).hidden_states)


def sdar_moe(
    parts: DecoderParts, state: State, input_ids: torch.Tensor, *, config: SDARMoEConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.sdar.sdar_moe`, of these parts."""
    decoded = _block_causal(parts, state, input_ids, None, config)
    router_logits_LBSE = torch.stack(decoded.router_logits).unflatten(1, input_ids.shape)
    return linear(state, "lm_head", decoded.hidden_states), router_logits_LBSE


def sdar_cached(
    parts: DecoderParts,
    state: State,
    input_ids: torch.Tensor,
    past_keys: torch.Tensor,
    past_values: torch.Tensor,
    *,
    config: SDARConfig | SDARMoEConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.sdar.sdar_cached`, of these parts."""
    decoded = _block_causal(parts, state, input_ids, (past_keys, past_values), config)
    return linear(state, "lm_head", decoded.hidden_states), decoded.keys, decoded.values


def sdar_training(
    parts: DecoderParts,
    state: State,
    noisy_ids: torch.Tensor,
    clean_ids: torch.Tensor,
    sample_ids: torch.Tensor,
    *,
    config: SDARConfig | SDARMoEConfig,
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.sdar.sdar_training`, of these parts."""
    input_ids = torch.cat([noisy_ids.long(), clean_ids.long()], dim=1)
    places_BS = places_in_samples(sample_ids).repeat(1, 2)
    mask = parts.masks(state[TABLE]).noisy_clean_mask(sample_ids, block_length=config.block_length)
    decoded = decode(parts, state, input_ids, places_BS, mask, config=config)
    return linear(state, "lm_head", decoded.hidden_states[:, : noisy_ids.shape[1]])


def _block_causal(
    parts: DecoderParts,
    state: State,
    input_ids: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    config: SDARConfig | SDARMoEConfig,
) -> Decoded:
    """Apply the layers to tokens [B, S] after a past of whole blocks; one block sees all of the past and of itself."""
    first, num_tokens, mask = 0 if past is None else past[0].shape[3], input_ids.shape[1], None
    if num_tokens > config.block_length:
        place_1T = torch.arange(first + num_tokens, device=input_ids.device)[None]
        mask = parts.masks(state[TABLE]).block_causal_mask(place_1T[:, first:], place_1T, block_length=config.block_length)
    return decode(parts, state, input_ids, places_from(first, input_ids), mask, past, config=config)


def decode(
    parts: DecoderParts,
    state: State,
    input_ids: torch.Tensor,
    places: torch.Tensor,
    mask: Any,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    config: LanguageModelConfig,
    layers: list[dict[str, torch.Tensor]] | None = None,
) -> Decoded:
    """As `gaugeblock.reference.torch.decoder.decode`, of these parts, under a mask of theirs; without one all tokens see all.

    Parameters of layers are by their own names, LLaDA's or transformers', by default those of the state.
    """
    hidden_BSD = parts.embed(state[TABLE], input_ids)
    dtype = torch.promote_types(hidden_BSD.dtype, torch.float32)
    features = (config.head_dim,)
    angles_NR = rotary_table(places.flatten()[:, None], features=features, theta=config.rope_theta, dtype=dtype)
    all_keys, all_values, router_logits = [], [], []
    for index, own in enumerate(layers or states.parts(state, "model.layers", config.num_hidden_layers)):
        seen = None if past is None else (past[0][index], past[1][index])
        found = parts.layer(layer)(parts, own, hidden_BSD, *angles_NR, mask, seen, config)
        hidden_BSD, key_BKSF, value_BKSF, *logits_NE = found
        all_keys.append(key_BKSF)
        all_values.append(value_BKSF)
        router_logits.extend(logits_NE)
    hidden_BSD = parts.entering(norm(parts, state, "model.norm", hidden_BSD, config))
    return Decoded(hidden_BSD, torch.stack(all_keys), torch.stack(all_values), tuple(router_logits))


def layer(
    parts: DecoderParts,
    state: State,
    hidden_BSD: torch.Tensor,
    cos_NR: torch.Tensor,
    sin_NR: torch.Tensor,
    mask: Any,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    config: LanguageModelConfig,
) -> tuple[torch.Tensor, ...]:
    """Return what a layer makes of [B, S, D], its tokens' keys and values, and of experts the router's logits [N, E]."""
    own = decoder_states.layer_as_transformers(state)
    hidden_BSD, key_BKSF, value_BKSF = parts.block(attend)(parts, own, hidden_BSD, cos_NR, sin_NR, mask, past, config)
    if isinstance(config, SDARMoEConfig):
        hidden_BSD, logits_NE = experts(parts, own, hidden_BSD, config)
        return hidden_BSD, key_BKSF, value_BKSF, logits_NE
    return parts.block(feed_forward)(parts, own, hidden_BSD, config), key_BKSF, value_BKSF


def attend(
    parts: DecoderParts,
    state: State,
    hidden_BSD: torch.Tensor,
    cos_NR: torch.Tensor,
    sin_NR: torch.Tensor,
    mask: Any,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    config: LanguageModelConfig,
) -> Heads:
    """Add attention to [B, S, D]; return it, and the tokens' keys and values."""
    normalized_BSD = parts.entering(norm(parts, state, "input_layernorm", hidden_BSD, config))
    query_BASF, key_BKSF = turned(parts, states.part(state, "self_attn"), normalized_BSD, cos_NR, sin_NR, config)
    value_BKSF = split_heads(linear(state, "self_attn.v_proj", normalized_BSD), config.num_key_value_heads)
    key_BKTF = key_BKSF if past is None else torch.cat([past[0], key_BKSF], dim=2)
    value_BKTF = value_BKSF if past is None else torch.cat([past[1], value_BKSF], dim=2)
    attended_BASF = parts.attention(query_BASF, key_BKTF, value_BKTF, mask, scale=config.head_dim**-0.5)
    return hidden_BSD + parts.last_linear(state, "self_attn.o_proj", join_heads(attended_BASF)), key_BKSF, value_BKSF


def turned(
    parts: DecoderParts,
    state: State,
    tokens_BSD: torch.Tensor,
    cos_NR: torch.Tensor,
    sin_NR: torch.Tensor,
    config: LanguageModelConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries [B, A, S, F] and keys [B, K, S, F], of all tokens as one sequence, normalized or not."""
    tokens_1ND = tokens_BSD.flatten(0, 1)[None]
    query_1ANF = split_heads(linear(state, "q_proj", tokens_1ND), config.num_attention_heads)
    key_1KNF = split_heads(linear(state, "k_proj", tokens_1ND), config.num_key_value_heads)
    if config.has_qk_norm:
        weights_F = state["q_norm.weight"], state["k_norm.weight"]
        query_1ANF, key_1KNF = parts.qk_norm_rotary(
            query_1ANF, key_1KNF, *weights_F, cos_NR, sin_NR, eps=config.rms_norm_eps, pairs="half-split"
        )
    else:
        query_1ANF, key_1KNF = (parts.rotate(each, cos_NR, sin_NR, pairs="half-split") for each in (query_1ANF, key_1KNF))
    query_BASF, key_BKSF = (each[0].unflatten(1, tokens_BSD.shape[:2]).transpose(0, 1) for each in (query_1ANF, key_1KNF))
    return query_BASF, key_BKSF


def feed_forward(parts: DecoderParts, state: State, hidden_BSD: torch.Tensor, config: LanguageModelConfig) -> torch.Tensor:
    """Add a gated network to [B, S, D]."""
    normalized_BSD = parts.entering(norm(parts, state, "post_attention_layernorm", hidden_BSD, config))
    gate_BSI, up_BSI = (linear(state, f"mlp.{name}", normalized_BSD) for name in ("gate_proj", "up_proj"))
    return hidden_BSD + parts.last_linear(state, "mlp.down_proj", parts.swiglu(gate_BSI, up_BSI))


def experts(
    parts: DecoderParts, state: State, hidden_BSD: torch.Tensor, config: SDARMoEConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add experts to [B, S, D]; return it, and the logits [N, E] by which they were chosen."""
    tokens_ND = norm(parts, state, "post_attention_layernorm", hidden_BSD, config).flatten(0, 1)
    options = {"top_k": config.num_experts_per_tok, "renormalize": config.norm_topk_prob}
    out_ND, logits_NE, _ = parts.qwen3_moe(tokens_ND, states.part(state, "mlp"), **options)
    return hidden_BSD + out_ND.view(hidden_BSD.shape), logits_NE


def norm(parts: DecoderParts, state: State, name: str, hidden_BSD: torch.Tensor, config: LanguageModelConfig) -> torch.Tensor:
    """Return the RMSNorm of that name of [B, S, D]."""
    return parts.rms_norm(hidden_BSD, state[f"{name}.weight"], eps=config.rms_norm_eps)
