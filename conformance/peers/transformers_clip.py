"""transformers' CLIPTextModel on trial; imported only where transformers is installed."""

import functools
from typing import Any

import torch
import transformers
from torch.func import functional_call

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.modules import with_buffers_alone
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.configs import CLIPTextConfig


@functools.cache
def model(config: CLIPTextConfig) -> Any:
    """Of any parameters."""
    theirs = transformers.CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings, hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps, eos_token_id=config.eos_token_id, projection_dim=config.pooled_size,
        bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    has_projection = config.projection_dim is not None
    return with_buffers_alone(transformers.CLIPTextModelWithProjection if has_projection else transformers.CLIPTextModel, theirs)


@peer("clip_text.clip_text", dtypes=DTYPES, rounding="eager", oracle=True)
class TransformersClip:
    """CLIPTextModel or CLIPTextModelWithProjection; pipelines take a hidden state of theirs, and normalize it or do not."""

    def __call__(self, state, input_ids, attention_mask=None, *, config):
        has_projection = config.projection_dim is not None
        names = {name: name if has_projection else name.removeprefix("text_model.") for name in state}
        parameters = {names[name]: each for name, each in state.items()}
        mask = None if attention_mask is None else attention_mask.long()
        out = functional_call(model(config), parameters, (input_ids, mask), {"output_hidden_states": True})
        hidden = out.hidden_states[config.returned_layer]
        if config.normalize_returned:
            scale, shift = (state[f"text_model.final_layer_norm.{each}"] for each in ("weight", "bias"))
            hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], scale, shift, config.layer_norm_eps)
        return hidden, out.text_embeds if has_projection else out.pooler_output
