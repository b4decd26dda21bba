"""Flux with the backward pass of flash attention (`flash_attention`): equal in exact arithmetic, with other rounding."""

import torch

from gaugeblock.conformance.contracts.flash_attention import FlashAttention
from gaugeblock.reference import states
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch import flux as model
from gaugeblock.reference.torch import layers, modules
from gaugeblock.reference.torch.attention import join_heads
from gaugeblock.reference.torch.rotary import rotary_table

Table = tuple[torch.Tensor, torch.Tensor]


def flux(
    state: model.State,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    guidance: torch.Tensor,
    img_ids: torch.Tensor,
    txt_ids: torch.Tensor,
    *,
    config: FluxConfig,
) -> torch.Tensor:
    """`flux.flux` with that attention; arguments and result are its own, all of one dtype."""
    image = modules.linear(state, "x_embedder", hidden_states)
    text = modules.linear(state, "context_embedder", encoder_hidden_states)
    conditioning = model.embed_conditions(state, pooled_projections, timesteps, guidance, config=config)
    ids = torch.cat([txt_ids, img_ids])
    table = rotary_table(ids, features=config.axes_dims_rope, theta=model.THETA, dtype=image.dtype)
    active = torch.nn.functional.silu(conditioning)
    for index in range(config.num_layers):
        image, text = _block(states.part(state, f"transformer_blocks.{index}"), image, text, active, table, config)
    joint = torch.cat([text, image], dim=1)
    for index in range(config.num_single_layers):
        joint = _single_block(states.part(state, f"single_transformer_blocks.{index}"), joint, active, table, config)
    return model.final_layer(state, joint[:, text.shape[1] :], conditioning)


def _block(
    state: model.State, image: torch.Tensor, text: torch.Tensor, active: torch.Tensor, table: Table, config: FluxConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    size = text.shape[1]
    cos, sin = table
    of_image, of_text = (modules.linear(state, f"{name}.linear", active).chunk(6, dim=-1) for name in ("norm1", "norm1_context"))
    image_inputs = layers.layer_norm_modulate(image, *of_image[:2], eps=model.NORM_EPS)
    text_inputs = layers.layer_norm_modulate(text, *of_text[:2], eps=model.NORM_EPS)
    image_heads = model.heads(state, model.HEADS, image_inputs, cos[size:], sin[size:], config=config)
    text_heads = model.heads(state, model.TEXT_HEADS, text_inputs, cos[:size], sin[:size], config=config)
    both = (torch.cat(each, dim=2) for each in zip(text_heads, image_heads, strict=True))
    attended = join_heads(FlashAttention.apply(*both))
    image_branch = modules.linear(state, "attn.to_out.0", attended[:, size:])
    text_branch = modules.linear(state, "attn.to_add_out", attended[:, :size])
    image = model.end_block(state, "ff", image, image_branch, *of_image[2:])
    return image, model.end_block(state, "ff_context", text, text_branch, *of_text[2:])


def _single_block(
    state: model.State, joint: torch.Tensor, active: torch.Tensor, table: Table, config: FluxConfig
) -> torch.Tensor:
    shift, scale, gate = modules.linear(state, "norm.linear", active).chunk(3, dim=-1)
    inputs = layers.layer_norm_modulate(joint, shift, scale, eps=model.NORM_EPS)
    attended = join_heads(FlashAttention.apply(*model.heads(state, model.HEADS, inputs, *table, config=config)))
    inner = layers.gelu(modules.linear(state, "proj_mlp", inputs))
    return layers.gated_residual(joint, modules.linear(state, "proj_out", torch.cat([attended, inner], dim=-1)), gate)
