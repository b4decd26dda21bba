"""SDAR: a language model that fills blocks of masked tokens in, one block after the other.

Parameters have the names of public checkpoints, which are Qwen3's and Qwen3-MoE's (`model.layers.0.self_attn.q_proj.weight`), but
for experts, which are stacked as in `moe_layers`. Shapes: as in `decoder`.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import decoder_states, states, validation
from gaugeblock.reference.configs import SDARConfig, SDARMoEConfig
from gaugeblock.reference.expert_layouts import with_stacked_experts
from gaugeblock.reference.torch import decoder
from gaugeblock.reference.torch.block_masks import block_causal_mask, noisy_clean_mask, places_in_samples

State = Mapping[str, torch.Tensor]


def sdar(state: State, input_ids: torch.Tensor, *, config: SDARConfig) -> torch.Tensor:
    """Predict the token at each place of sequences in which some are masked; a token sees its block and those before it.

        x = token embedding
        x = x + o_proj(attention(query, key, value)), of rms_norm(x); each head of query and key normalized, then rotated
        x = x + down_proj(swiglu(gate_proj(y), up_proj(y))), y = rms_norm(x);  both num_hidden_layers times
        logits = lm_head(rms_norm(x));  q sees k where q // block_length >= k // block_length

    Args:
        state: The parameters by name, shapes as in `state_shapes`, all of one floating dtype.
        input_ids: [batch_size, num_tokens], int32 or int64 in 0 .. vocab_size - 1, from the prompt's start; `mask_token_id`
            where a token is masked. The last block may be shorter than the others.
        config: The model.

    Returns:
        logits: [batch_size, num_tokens, vocab_size], dtype of the state; of the token at each place itself. Computed in float32
            (float64 for a float64 state) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `config` not a SDARConfig.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or an id names no token.

    Source: Cheng et al. 2025 (arXiv:2510.06303); JetAstra/SDAR generate.py.
    """
    validation.sdar(state, input_ids, config=config)
    logits_BSV = decoder.logits(state, _block_causal(state, input_ids, config), input_ids.shape[1])
    return logits_BSV.to(state["lm_head.weight"].dtype)


def sdar_moe(state: State, input_ids: torch.Tensor, *, config: SDARMoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict as `sdar`, with `moe_layers.qwen3_moe` for the gated network.

        x = x + qwen3_moe(rms_norm(x)), of num_experts_per_tok experts for each token; all else as of `sdar`

    Args: as of `sdar`; `config` is a SDARMoEConfig.

    Returns:
        logits: As of `sdar`.
        router_logits: [num_hidden_layers, batch_size, num_tokens, num_experts], float32 (float64 for a float64 state), for
            `auxiliary_losses`.

    Raises: as `sdar`; TypeError where `config` is not a SDARMoEConfig.

    Source: as of `sdar`; its MoE models have the layers of Qwen3-MoE (arXiv:2505.09388).
    """
    validation.sdar_moe(state, input_ids, config=config)
    decoded = _block_causal(state, input_ids, config)
    logits_BSV = decoder.logits(state, decoded, input_ids.shape[1])
    router_logits_LBSE = torch.stack(decoded.router_logits).unflatten(1, input_ids.shape)
    return logits_BSV.to(state["lm_head.weight"].dtype), router_logits_LBSE


def sdar_cached(
    state: State,
    input_ids: torch.Tensor,
    past_keys: torch.Tensor,
    past_values: torch.Tensor,
    *,
    config: SDARConfig | SDARMoEConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict as `sdar` or `sdar_moe` the tokens that come after whole blocks of which keys and values are kept.

    A prompt's blocks are prefilled with an empty past. A pass that denoises a block drops what this returns; when nothing of the
    block is masked any more, one more pass over it gives the keys and values that are to be kept: those of a noisy block are not.

    Args:
        state: As of `sdar`, or of `sdar_moe`.
        input_ids: [batch_size, num_tokens], int32 or int64 in 0 .. vocab_size - 1.
        past_keys: [num_hidden_layers, batch_size, num_key_value_heads, num_past_tokens, head_dim], dtype of the state, as this
            returned them; num_past_tokens is a multiple of block_length, or 0.
        past_values: As past_keys.
        config: The model.

    Returns:
        logits: [batch_size, num_tokens, vocab_size], dtype of the state.
        keys: [num_hidden_layers, batch_size, num_key_value_heads, num_tokens, head_dim], of the tokens given alone, turned by
            their places; dtype of the state.
        values: As keys.

        Computed in float32 (float64 for a float64 state) and rounded once.

    Raises: as `sdar`; ValueError where the past is no number of whole blocks.

    Source: JetAstra/SDAR generate.py, `block_diffusion_generate`.
    """
    validation.sdar_cached(state, input_ids, past_keys, past_values, config=config)
    first, num_tokens = past_keys.shape[3], input_ids.shape[1]
    places_BS = decoder.places_from(first, input_ids)
    key_places_T = torch.arange(first + num_tokens, device=input_ids.device)
    mask_BST = block_causal_mask(key_places_T[None, first:], key_places_T[None], block_length=config.block_length)
    decoded = decoder.decode(state, input_ids, places_BS, mask_BST, (past_keys, past_values), config=config)
    logits_BSV, dtype = decoder.logits(state, decoded, num_tokens), past_keys.dtype
    return logits_BSV.to(dtype), decoded.keys.to(dtype), decoded.values.to(dtype)


def sdar_training(
    state: State,
    noisy_ids: torch.Tensor,
    clean_ids: torch.Tensor,
    sample_ids: torch.Tensor,
    *,
    config: SDARConfig | SDARMoEConfig,
) -> torch.Tensor:
    """Predict the tokens of all blocks in one pass, each from its noisy copy and the clean blocks before it.

    A row is [noisy | clean], both copies at the places 0, 1, 2, ... of their sample, under `block_masks.noisy_clean_mask`. The
    logits of a block are those that `sdar` gives where this block is noisy and all before it are clean.

    Args:
        state: As of `sdar`, or of `sdar_moe`.
        noisy_ids: [batch_size, num_tokens], int32 or int64 in 0 .. vocab_size - 1, `mask_token_id` where a token is masked.
        clean_ids: [batch_size, num_tokens], likewise, without masks.
        sample_ids: [batch_size, num_tokens], int32 or int64: which sample of its row a token belongs to, of several that are
            packed; a negative one is padding, which neither sees nor is seen.
        config: The model.

    Returns:
        logits: [batch_size, num_tokens, vocab_size] of the noisy tokens, dtype of the state; those of padding mean nothing.
            Computed in float32 (float64 for a float64 state) and rounded once.

    Raises: as `sdar`.

    Source: Arriola et al. 2025 (arXiv:2503.09573), section 3.2; Cheng et al. 2025 (arXiv:2510.06303). SDAR's code packs noisy and
    clean copies in turns, sample by sample, which is the same rows in another order.
    """
    validation.sdar_training(state, noisy_ids, clean_ids, sample_ids, config=config)
    input_ids = torch.cat([noisy_ids, clean_ids], dim=1)
    places_BS = places_in_samples(sample_ids).repeat(1, 2)
    mask_BST = noisy_clean_mask(sample_ids, block_length=config.block_length)
    decoded = decoder.decode(state, input_ids, places_BS, mask_BST, config=config)
    logits_BSV = decoder.logits(state, decoded, noisy_ids.shape[1])
    return logits_BSV.to(state["lm_head.weight"].dtype)


def _block_causal(state: State, input_ids: torch.Tensor, config: SDARConfig | SDARMoEConfig) -> decoder.Decoded:
    """Apply the layers to whole sequences [B, S]."""
    place_S = torch.arange(input_ids.shape[1], device=input_ids.device)
    mask_BST = block_causal_mask(place_S, place_S, block_length=config.block_length)[None]
    return decoder.decode(state, input_ids, decoder.places_from(0, input_ids), mask_BST, config=config)


def state_shapes(config: SDARConfig | SDARMoEConfig) -> states.Shapes:
    """Return the shape of every parameter by name.

    Raises:
        TypeError: `config` is neither a SDARConfig nor a SDARMoEConfig.
    """
    validation.language_model_config(config, SDARConfig, SDARMoEConfig)
    return decoder_states.state_shapes(config)


def load_state(state: State, *, config: SDARConfig | SDARMoEConfig) -> dict[str, torch.Tensor]:
    """Return a checkpoint as `sdar` and `sdar_moe` take it: also one with its experts one by one.

    Parameters keep their dtype.

    Args:
        state: Floating arrays by name; experts as `model.layers.0.mlp.experts.0.gate_proj.weight`, as public checkpoints have
            them, or stacked.
        config: The model.

    Raises:
        TypeError: An entry is not a floating array.
        ValueError: An entry is missing, unexpected or of another shape.

    Source: transformers models/qwen3_moe/modeling_qwen3_moe.py, before version 5 and since.
    """
    if isinstance(config, SDARMoEConfig):
        for index in range(config.num_hidden_layers):
            state = with_stacked_experts(state, f"model.layers.{index}.mlp.experts.", config.num_experts)
    shapes = state_shapes(config)
    validation.state_entries(state, shapes)
    return {name: state[name] for name in shapes}
