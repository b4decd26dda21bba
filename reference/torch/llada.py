"""LLaDA: a language model that fills masked tokens in, each token seeing all others.

Parameters have the names of public checkpoints (`model.transformer.blocks.0.q_proj.weight`). Shapes: as in `decoder`.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import decoder_states, states, validation
from gaugeblock.reference.configs import LLaDAConfig
from gaugeblock.reference.torch import decoder
from gaugeblock.reference.torch.block_masks import full_mask

State = Mapping[str, torch.Tensor]


def llada(
    state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, config: LLaDAConfig
) -> torch.Tensor:
    """Predict the token at each place of sequences in which some are masked.

        x = token embedding
        x = x + attn_out(attention of all tokens to all, rotated), of attn_norm(x)
        x = x + ff_out(silu(ff_proj(y)) * up_proj(y)), y = ff_norm(x);  both num_hidden_layers times
        logits = ff_out(ln_f(x)), the model's `ff_out`

    Args:
        state: The parameters by name, shapes as in `state_shapes`, all of one floating dtype.
        input_ids: [batch_size, num_tokens], int32 or int64 in 0 .. vocab_size - 1; `mask_token_id` where a token is masked.
        attention_mask: [batch_size, num_tokens], bool, True for what is no padding; all by default. No token sees padding;
            one that sees nothing gets 0 of the attention.
        config: The model.

    Returns:
        logits: [batch_size, num_tokens, vocab_size], dtype of the state; of the token at each place itself. Computed in float32
            (float64 for a float64 state) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `config` not a LLaDAConfig.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or an id names no token.

    Source: Nie et al. 2025 (arXiv:2502.09992), section 2; ML-GSAI/LLaDA. Copies of its first model file ignore attention_mask.
    """
    validation.llada(state, input_ids, attention_mask, config=config)
    common = decoder_states.llada_as_transformers(state, config)
    is_real_BS = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    mask_BST = full_mask(torch.ones_like(is_real_BS), is_real_BS)
    decoded = decoder.decode(common, input_ids, decoder.places_from(0, input_ids), mask_BST, config=config)
    logits_BSV = decoder.logits(common, decoded, input_ids.shape[1])
    return logits_BSV.to(common["lm_head.weight"].dtype)


def state_shapes(config: LLaDAConfig) -> states.Shapes:
    """Return the shape of every parameter by name.

    Raises:
        TypeError: `config` is not a LLaDAConfig.
    """
    validation.language_model_config(config, LLaDAConfig)
    return decoder_states.llada_shapes(config)
