"""diffusers' own modules on trial; imported only where diffusers is installed."""

import functools
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.embeddings import Timesteps, apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from torch.func import functional_call

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.modules import with_buffers_alone, without_parameters
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch.dit import diffusers_names


@functools.cache
def model(config: DiTConfig) -> Any:
    """Of any parameters; times are embedded as wide as the config says, not 256, and of as many frequencies."""
    made = with_buffers_alone(
        DiTTransformer2DModel, num_attention_heads=config.num_heads, attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels, out_channels=config.out_channels, num_layers=config.depth,
        sample_size=config.input_size, patch_size=config.patch_size, num_embeds_ada_norm=config.num_classes,
        norm_eps=config.norm_eps,
    )  # fmt: skip
    for block in made.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(config.frequency_embedding_size, True, config.frequency_shift)
    return made


@peer("dit.dit", only="mlp_ratio == 4", dtypes=DTYPES, rounding="eager", oracle=True)
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


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: str) -> torch.Tensor:
    """By its rotation, which takes an angle for each feature: neighbours as in Flux, halves as in CogView4."""
    if pairs == "interleaved":
        return apply_rotary_emb(heads, (cos.repeat_interleave(2, 1), sin.repeat_interleave(2, 1)))
    return apply_rotary_emb(heads, (torch.cat([cos, cos], 1), torch.cat([sin, sin], 1)), use_real_unbind_dim=-2)


@peer("rotary.rotate", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersRotary:
    """apply_rotary_emb, which computes in float32; backward, the gradients through x and y are rounded before they are added."""

    def __call__(self, heads, cos, sin, *, pairs):
        return turned(heads, cos, sin, pairs)


@peer("rotary.qk_norm_rotary", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersFluxQkNorm:
    """Flux' norms of queries and keys, which are torch's, and apply_rotary_emb."""

    def __call__(self, query, key, query_weight, key_weight, cos, sin, *, eps, pairs):
        norm = without_parameters(torch.nn.RMSNorm, query.shape[-1], eps)
        normed = [functional_call(norm, {"weight": each[1]}, each[0]) for each in ((query, query_weight), (key, key_weight))]
        return turned(normed[0], cos, sin, pairs), turned(normed[1], cos, sin, pairs)


def gated(module_class: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """A gated activation without its product, whose second half is the gate."""
    module = without_parameters(module_class, 1, 1)
    module.proj = torch.nn.Identity()
    return module(torch.cat([up, gate], -1))


@peer("gated_activations.swiglu", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersSwiGlu:
    """SwiGLU, without its product."""

    def __call__(self, gate, up):
        return gated(SwiGLU, gate, up)


@peer("gated_activations.geglu", dtypes=DTYPES, only="approximation == 'none'", rounding="eager", oracle=True)
class DiffusersGeGlu:
    """GEGLU, without its product: a UNet's transformers have it."""

    def __call__(self, gate, up, *, approximation):
        return gated(GEGLU, gate, up)


@peer("norms.rms_norm", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersRmsNorm:
    """RMSNorm, as the attention of Flux and Stable Diffusion 3 has it."""

    def __call__(self, hidden_states, weight, *, eps):
        with torch.device("meta"):
            module: Any = RMSNorm(weight.shape[0], eps)
        return functional_call(module, {"weight": weight}, (hidden_states,))
