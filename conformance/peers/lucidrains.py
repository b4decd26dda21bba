"""mmdit's MMDiT of several modalities on trial, inside of LGDLM's text-latent model; imported only where mmdit is installed.

What surrounds it there (embeddings, heads) is on no package index: here it is made of torch's modules, under the same names.
"""

import functools
import math
from typing import Any

import torch
from mmdit.mmdit_generalized_pytorch import MMDiT
from torch import nn
from torch.func import functional_call

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.modules import with_buffers_alone
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.configs import TextLatentMMDiTConfig


class TextEncoder(nn.Module):
    """Tokens and places."""

    def __init__(self, config: TextLatentMMDiTConfig) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embed = nn.Parameter(torch.empty(1, config.max_seq_len, config.hidden_size))

    def forward(self, tokens):
        return self.token_embed(tokens) + self.position_embed[:, : tokens.shape[1]]


class LatentEncoder(nn.Module):
    """One token."""

    def __init__(self, config: TextLatentMMDiTConfig) -> None:
        super().__init__()
        inner_size = 2 * config.hidden_size
        self.projection = nn.Sequential(
            nn.Linear(config.latent_dim, inner_size),
            nn.LayerNorm(inner_size),
            nn.GELU(),
            nn.Linear(inner_size, config.hidden_size),
        )
        self.position_embed = nn.Parameter(torch.empty(1, 1, config.hidden_size))

    def forward(self, latents):
        return self.projection(latents[:, None]) + self.position_embed


class SigmaMap(nn.Module):
    """A time."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, times):
        angles = times[:, None] * torch.exp(torch.arange(128, dtype=times.dtype) * (-math.log(10000) / 128))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(next(self.parameters()).dtype))


class Conditioning(nn.Module):
    """Both times."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.text_sigma_map, self.latent_sigma_map = SigmaMap(cond_dim), SigmaMap(cond_dim)
        self.combine = nn.Sequential(nn.Linear(2 * cond_dim, 4 * cond_dim), nn.SiLU(), nn.Linear(4 * cond_dim, cond_dim))

    def forward(self, text_times, latent_times):
        both = torch.cat([self.text_sigma_map(text_times), self.latent_sigma_map(latent_times)], 1)
        return self.combine(nn.functional.silu(both))


class TextLatentModel(nn.Module):
    """The library's backbone between embeddings and heads."""

    def __init__(self, config: TextLatentMMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.text_encoder, self.latent_encoder = TextEncoder(config), LatentEncoder(config)
        self.conditioning = Conditioning(config.cond_dim)
        self.mmdit = MMDiT(
            depth=config.n_blocks, dim_modalities=(width, width), dim_cond=config.cond_dim, qk_rmsnorm=True,
            num_residual_streams=config.num_residual_streams,
        )  # fmt: skip
        self.text_head = nn.Linear(width, config.vocab_size)
        self.latent_head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(), nn.Linear(2 * width, config.latent_dim)
        )
        self.text_head_clusters = nn.Linear(width, config.vocab_size) if config.cluster_size else None

    def forward(self, tokens, latents, text_times, latent_times, mask):
        text, latent = self.mmdit(
            modality_tokens=(self.text_encoder(tokens), self.latent_encoder(latents)),
            modality_masks=(mask, None),
            time_cond=self.conditioning(text_times, latent_times),
        )
        logits = self.text_head(text)
        clusters = logits[..., :0] if self.text_head_clusters is None else self.text_head_clusters(text)
        return logits, self.latent_head(latent), clusters


@functools.cache
def model(config: TextLatentMMDiTConfig) -> Any:
    """Of any parameters."""
    return with_buffers_alone(TextLatentModel, config)


@peer("text_latent_mmdit.text_latent_mmdit", dtypes=DTYPES, rounding="eager", oracle=True)
class Mmdit:
    """MMDiT with manifold-constrained hyper-connections; an option `qk_rmsnorm` is accepted and handed to nobody."""

    def __call__(self, state, text_tokens, latents, text_timesteps, latent_timesteps, attention_mask=None, *, config):
        inputs = text_tokens, latents, text_timesteps, latent_timesteps, attention_mask
        return functional_call(model(config), dict(state), inputs)
