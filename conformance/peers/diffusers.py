"""diffusers' own modules on trial; imported only where diffusers is installed."""

import functools
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from torch.func import functional_call

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch.dit import diffusers_names


@functools.cache
def model(config: DiTConfig) -> Any:
    """Of any parameters; times are embedded as wide as the config says, not 256."""
    made: Any = DiTTransformer2DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels, out_channels=config.out_channels, num_layers=config.depth,
        sample_size=config.input_size, patch_size=config.patch_size, num_embeds_ada_norm=config.num_classes,
        norm_eps=config.norm_eps,
    )  # fmt: skip
    for block in made.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(config.frequency_embedding_size, True, 1)
    return made.eval()


@peer("dit.dit", only="frequency_shift == 1 and mlp_ratio == 4", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersDit:
    """DiTTransformer2DModel, whose blocks embed the times each by itself, all by the same parameters; its labels are int64."""

    def __call__(self, state, latents, timesteps, class_labels, *, config):
        renamed: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            theirs = diffusers_names(name, config=config)
            parts = tensor.chunk(3) if "attn.qkv" in name else [tensor] * len(theirs)
            renamed |= dict(zip(theirs, parts, strict=True))
        return functional_call(model(config), renamed, (latents, timesteps, class_labels.long())).sample


@peer("layers.layer_norm_modulate", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersAdaLayerNorm:
    """AdaLayerNormContinuous, without the linear layer that makes shift and scale."""

    def __call__(self, hidden_states, shift, scale, *, eps):
        width = hidden_states.shape[-1]
        with torch.device("meta"):
            module: Any = AdaLayerNormContinuous(width, 1, elementwise_affine=False, eps=eps, bias=False)
        module.silu, module.linear = torch.nn.Identity(), torch.nn.Identity()
        return module(hidden_states, torch.cat([scale, shift], 1))


@peer("norms.rms_norm", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersRmsNorm:
    """RMSNorm, as the attention of Flux and Stable Diffusion 3 has it."""

    def __call__(self, hidden_states, weight, *, eps):
        with torch.device("meta"):
            module: Any = RMSNorm(weight.shape[0], eps)
        return functional_call(module, {"weight": weight}, (hidden_states,))
