"""diffusers' UNet2DConditionModel on trial; imported only where diffusers is installed."""

import functools
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.func import functional_call

from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.configs import UNetConfig


def module_of(config: UNetConfig) -> Any:
    """Without parameters."""
    added: dict[str, Any] = {}
    if config.addition_time_embed_dim:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.addition_time_embed_dim,
            "projection_class_embeddings_input_dim": config.projection_class_embeddings_input_dim,
        }
    with torch.device("meta"):
        model: Any = UNet2DConditionModel(
            in_channels=config.in_channels, out_channels=config.out_channels, block_out_channels=config.block_out_channels,
            down_block_types=config.down_block_types,
            up_block_types=tuple(each.replace("Down", "Up") for each in reversed(config.down_block_types)),
            layers_per_block=config.layers_per_block, transformer_layers_per_block=config.transformer_layers_per_block,
            attention_head_dim=config.attention_head_dim, cross_attention_dim=config.cross_attention_dim,
            use_linear_projection=config.use_linear_projection, norm_num_groups=config.norm_num_groups, norm_eps=config.norm_eps,
            **added,
        )  # fmt: skip
    return model


@functools.cache
def made(config: UNetConfig) -> Any:
    """Of any parameters."""
    return module_of(config).eval()


def has_text(case: Case) -> bool:
    """Whether every example has text to look at; where there is none, this model looks at all of it."""
    return "nothing by the first" not in case.traits


def predict(state: Any, latents: Any, timesteps: Any, text: Any, mask: Any, config: UNetConfig, **others: Any) -> torch.Tensor:
    """Its call; of a batch its mask must be a batch too."""
    kwargs = {"encoder_attention_mask": mask, **others}
    return functional_call(made(config), dict(state), (latents, timesteps, text), kwargs).sample


@peer("unet.unet", dtypes=DTYPES, rounding="eager", fits=has_text, oracle=True)
class DiffusersUnet:
    """UNet2DConditionModel of SD 1 and 2."""

    def __call__(self, state, latents, timesteps, encoder_hidden_states, encoder_attention_mask=None, *, config):
        return predict(state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config)


@peer("unet.unet_text_time", dtypes=DTYPES, rounding="eager", fits=has_text, oracle=True)
class DiffusersUnetTextTime:
    """UNet2DConditionModel of SDXL."""

    def __call__(
        self, state, latents, timesteps, encoder_hidden_states, text_embeds, time_ids, encoder_attention_mask=None, *, config
    ):
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        mask = encoder_attention_mask
        return predict(state, latents, timesteps, encoder_hidden_states, mask, config, added_cond_kwargs=added)
