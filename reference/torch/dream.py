"""Dream: a language model that fills masked tokens in, each token predicted by the one before it.

Parameters have the names of public checkpoints, which are Qwen2's (`model.layers.0.self_attn.q_proj.weight`). Shapes: as in
`decoder`.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import decoder_states, states, validation
from gaugeblock.reference.configs import DreamConfig
from gaugeblock.reference.torch import decoder
from gaugeblock.reference.torch.block_masks import full_mask

State = Mapping[str, torch.Tensor]


def dream(
    state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, config: DreamConfig
) -> torch.Tensor:
    """Predict the token at each place of sequences in which some are masked.

        x = token embedding
        x = x + o_proj(attention of all tokens to all, rotated; q, k, v with bias), of rms_norm(x)
        x = x + down_proj(swiglu(gate_proj(y), up_proj(y))), y = rms_norm(x);  both num_hidden_layers times
        logits[i] = lm_head(rms_norm(x))[i - 1], and logits[0] = lm_head(rms_norm(x))[0]

    Args:
        state: The parameters by name, shapes as in `state_shapes`, all of one floating dtype.
        input_ids: [batch_size, num_tokens], int32 or int64 in 0 .. vocab_size - 1; `mask_token_id` where a token is masked.
        attention_mask: [batch_size, num_tokens], bool, True for what is no padding; all by default. Padding neither sees nor is
            seen, and tokens are placed as if there were none; one that sees nothing gets 0 of the attention.
        config: The model.

    Returns:
        logits: [batch_size, num_tokens, vocab_size], dtype of the state; of the token at each place itself, shifted already.
            Computed in float32 (float64 for a float64 state) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `config` not a DreamConfig.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or an id names no token.

    Source: Ye et al. 2025 (arXiv:2508.15487), section 3; the shift: HKUNLP/Dream, `diffusion_generate`.
    """
    validation.dream(state, input_ids, attention_mask, config=config)
    is_real_BS = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    places_BS = is_real_BS.long().cumsum(dim=1) - 1
    decoded = decoder.decode(state, input_ids, places_BS, full_mask(is_real_BS, is_real_BS), config=config)
    logits_BSV = decoder.logits(state, decoded, input_ids.shape[1])
    return shift(logits_BSV).to(state["lm_head.weight"].dtype)


def shift(logits: torch.Tensor) -> torch.Tensor:
    """Move logits [B, S, V] one place on; the first ones stay as well."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def state_shapes(config: DreamConfig) -> states.Shapes:
    """Return the shape of every parameter by name.

    Raises:
        TypeError: `config` is not a DreamConfig.
    """
    validation.language_model_config(config, DreamConfig)
    return decoder_states.state_shapes(config)
