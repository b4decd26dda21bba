"""The text-latent MMDiT composed of connections that a realm brings, beside torch's products, norms and attention.

Everything is in the dtype of the parameters. Results of products and of attention, and the streams, are rounded to it; sums of
products, and what is inside of a norm or a connection, are float32.

Shapes: as in `reference.torch.text_latent_mmdit`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from gaugeblock.optimized.model_parts import State, linear, two_linears
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import TextLatentMMDiTConfig
from gaugeblock.reference.torch import layers
from gaugeblock.reference.torch.attention import join_heads, split_heads
from gaugeblock.reference.torch.hyper_connections import SMALLEST_NORM
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.text_latent_mmdit import (
    FREQUENCY_EMBEDDING_SIZE,
    MODALITIES,
    NORM_EPS,
    NUM_HEADS,
    embed_text,
    joint_mask,
    state_shapes,
)

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Connections:
    """How branches read residual streams and write them."""

    connect_in: Callable[[State, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Of a connection's parameters and streams [B, S, K, D]: what is read, [B, S, D], the mixed streams, and how strongly each
    will be written to, [B, S, K] in float32."""
    connect_out: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Of the last two, a branch's result, [B, S, D], and its gate, [B, 1, D]: the streams, [B, S, K, D]."""
    block: Callable[[Callable[..., Any]], Callable[..., Any]]
    """What becomes of a block of the model before it is called: it is compiled, or stays as it is."""
    reject: Callable[[str, torch.Tensor], None]
    """Raise TypeError where the tensor of that name has a dtype that these functions do not take."""


def text_latent_mmdit(
    parts: Connections,
    state: State,
    text_tokens: torch.Tensor,
    latents: torch.Tensor,
    text_timesteps: torch.Tensor,
    latent_timesteps: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    config: TextLatentMMDiTConfig,
) -> Results:
    """As `gaugeblock.reference.torch.text_latent_mmdit.text_latent_mmdit`, of these connections."""
    inputs = text_tokens, latents, text_timesteps, latent_timesteps, attention_mask
    validation.text_latent_mmdit(state, *inputs, config, state_shapes(config))
    parts.reject("latents", latents)
    validation.text_latent_tokens_in_range(text_tokens, config)
    return unchecked_text_latent_mmdit(parts, state, *inputs, config=config)


def unchecked_text_latent_mmdit(
    parts: Connections,
    state: State,
    text_tokens: torch.Tensor,
    latents: torch.Tensor,
    text_timesteps: torch.Tensor,
    latent_timesteps: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    config: TextLatentMMDiTConfig,
) -> Results:
    """As `text_latent_mmdit`, of a call that is known to be good."""
    text_BTD = embed_text(states.part(state, "text_encoder"), text_tokens.long())
    latent_B1D = embed_latents(states.part(state, "latent_encoder"), latents)
    # all that a block makes of what steers it begins with the silu
    active_BC = functional.silu(embed_times(states.part(state, "conditioning"), text_timesteps, latent_timesteps))
    mask_BASJ = joint_mask(attention_mask)
    streams = [each_BSD[:, :, None].expand(-1, -1, config.num_residual_streams, -1) for each_BSD in (text_BTD, latent_B1D)]
    for own in states.parts(state, "mmdit.blocks", config.n_blocks):
        streams = parts.block(block)(parts, own, streams, active_BC, mask_BASJ)
    text_BTD, latent_B1D = (
        last_norm(streams_BSKD, state[f"mmdit.norms.{modality}.g"]) for modality, streams_BSKD in enumerate(streams)
    )
    logits_BTV = linear(state, "text_head", text_BTD)
    clusters_BTV = linear(state, "text_head_clusters", text_BTD) if config.cluster_size else logits_BTV[..., :0]
    predicted_B1E = linear(state, "latent_head.3", functional.gelu(linear(state, "latent_head.0", latent_B1D)))
    return logits_BTV, predicted_B1E, clusters_BTV


def embed_latents(state: State, latents: torch.Tensor) -> torch.Tensor:
    """Embed latents [B, E] as one token each, [B, 1, D]."""
    inner_B1I = at_least_float32(linear(state, "projection.0", latents[:, None]))
    # in float32, as in compiled.model_parts.layer_norm_affine
    weight, bias = (at_least_float32(state[f"projection.1.{each}"]) for each in ("weight", "bias"))
    normalized_B1I = functional.layer_norm(inner_B1I, weight.shape, weight, bias, NORM_EPS)
    return linear(state, "projection.3", functional.gelu(normalized_B1I).to(latents.dtype)) + state["position_embed"][0]


def embed_times(state: State, text_timesteps: torch.Tensor, latent_timesteps: torch.Tensor) -> torch.Tensor:
    """Embed a time [B] of the text and one of the latent, together, as what steers the blocks, [B, C]."""
    embedded = []
    for name, times_B in (("text_sigma_map", text_timesteps), ("latent_sigma_map", latent_timesteps)):
        waves_BF = layers.timestep_embedding(times_B, embedding_size=FREQUENCY_EMBEDDING_SIZE, frequency_shift=0)
        own = states.part(state, f"{name}.mlp")
        embedded.append(two_linears(own, ("0", "2"), waves_BF.to(own["0.weight"].dtype)))
    return two_linears(state, ("combine.0", "combine.2"), functional.silu(torch.cat(embedded, dim=-1)))


def block(
    parts: Connections, state: State, streams: Sequence[torch.Tensor], active_BC: torch.Tensor, mask_BASJ: torch.Tensor | None
) -> list[torch.Tensor]:
    """Apply a block to the streams of text and latent, [B, S, K, D] each."""
    gates = linear(state, "to_post_branch_gammas.2", active_BC)[:, None].chunk(2 * MODALITIES, dim=-1)
    attention = states.part(state, "joint_attn")
    streams = apply_branch(
        parts, state, "attn", streams, active_BC, gates[:MODALITIES], lambda tokens: joint_attention(attention, tokens, mask_BASJ)
    )
    feed_forwards = [states.part(state, f"feedforwards.{modality}.ff") for modality in range(MODALITIES)]
    return apply_branch(
        parts, state, "ff", streams, active_BC, gates[MODALITIES:],
        lambda tokens: [feed_forward(own, each) for own, each in zip(feed_forwards, tokens, strict=True)],
    )  # fmt: skip


def apply_branch(
    parts: Connections,
    state: State,
    name: str,
    streams: Sequence[torch.Tensor],
    active_BC: torch.Tensor,
    gates: Sequence[torch.Tensor],
    branch: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """Read the streams of text and latent, apply a branch to both, and write its results."""
    normalized, written = [], []
    for modality, streams_BSKD in enumerate(streams):
        read_BSD, *to_write = parts.connect_in(states.part(state, f"{name}_residual_fns.{modality}"), streams_BSKD)
        steering_B1I = linear(state, f"{name}_layernorms.{modality}.to_cond.2", active_BC)[:, None]
        normalized.append(modulated(read_BSD, *steering_B1I.chunk(2, dim=-1)))
        written.append(to_write)
    results = branch(normalized)
    return [parts.connect_out(*to_write, *each) for to_write, *each in zip(written, results, gates, strict=True)]


def modulated(tokens_BSD: torch.Tensor, scale_B1D: torch.Tensor, shift_B1D: torch.Tensor) -> torch.Tensor:
    """Normalize tokens, then scale and shift them."""
    return torch.addcmul(shift_B1D, functional.layer_norm(tokens_BSD, tokens_BSD.shape[-1:], eps=NORM_EPS), scale_B1D)


def joint_attention(state: State, tokens: Sequence[torch.Tensor], mask_BASJ: torch.Tensor | None) -> list[torch.Tensor]:
    """Let all tokens of text and latent attend to all that the mask shows."""
    thirds = [
        [split_heads(third, NUM_HEADS) for third in linear(state, f"to_qkv.{modality}", each_BSD).chunk(3, dim=-1)]
        for modality, each_BSD in enumerate(tokens)
    ]
    query, key, value = (torch.cat(both, dim=2) for both in zip(*thirds, strict=True))
    attended_BJI = join_heads(functional.scaled_dot_product_attention(query, key, value, attn_mask=mask_BASJ))
    split = attended_BJI.split([each_BSD.shape[1] for each_BSD in tokens], dim=1)
    return [linear(state, f"to_out.{modality}", each_BSI) for modality, each_BSI in enumerate(split)]


def feed_forward(state: State, tokens_BSD: torch.Tensor) -> torch.Tensor:
    """Apply a feed-forward network."""
    return linear(state, "2", functional.gelu(linear(state, "0.0", tokens_BSD)))


def last_norm(streams_BSKD: torch.Tensor, scale_D: torch.Tensor) -> torch.Tensor:
    """Sum the streams up and bring what they are to a root mean square of 1, times a scale; [B, S, D]."""
    summed_BSD = at_least_float32(streams_BSKD).sum(dim=2)
    squares_BS1 = (summed_BSD * summed_BSD).sum(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM**2)
    out_BSD = summed_BSD * (torch.rsqrt(squares_BS1) * summed_BSD.shape[-1] ** 0.5) * at_least_float32(scale_D)
    return out_BSD.to(streams_BSKD.dtype)
