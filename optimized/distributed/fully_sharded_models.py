"""Diffusion models, what is around them, and language models, each rank with a part of every parameter and of the batch (FSDP2).

Each is the operation of its name in `gaugeblock.reference.torch`, called on every rank with the whole state, its own examples,
and `mesh`, which has one dimension and the device type of the tensors. Any rank may have any number of examples, also none. It
computes in float32 (float64 for a float64 state) and rounds once. Differentiable once, by the state and what the reference is
differentiated by; gradients of the state are those of all ranks' examples, the same on every rank. A call that is bad on one rank
raises on all. It scatters and gathers the whole state in each call; a training run keeps the module, which does not:

    model = fully_sharded_models.unet.sharded(state, config=config, mesh=mesh)
    model(latents, timesteps, encoder_hidden_states)

DiT-MoE's auxiliary loss is that of all ranks' examples, the same on every rank. It takes the same cotangent on every rank, as
where each adds it to the loss of its own examples: it counts once, not once a rank.

Source: Rajbhandari et al. 2020 (arXiv:1910.02054), section 5, stage 3, by torch.distributed.fsdp.fully_shard.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized import (
    clip_text_composition,
    decoder_composition,
    moe_composition,
    text_latent_mmdit_composition,
    unet_composition,
    upcycled_gpt2_composition,
    vae_composition,
)
from gaugeblock.optimized.compiled import dit as of_dit
from gaugeblock.optimized.compiled import dit_moe as of_dit_moe
from gaugeblock.optimized.compiled import flux as of_flux
from gaugeblock.optimized.compiled import mmdit as of_mmdit
from gaugeblock.optimized.compiled.biased_moe_layers import upcycled_gpt2_moe
from gaugeblock.optimized.compiled.decoder_parts import LIBRARY as OF_DECODERS
from gaugeblock.optimized.compiled.dit_moe_layers import PARTS as OF_MOE
from gaugeblock.optimized.compiled.library_layers import Fuse
from gaugeblock.optimized.compiled.model_parts import LIBRARY
from gaugeblock.optimized.compiled.text_latent_mmdit import LIBRARY as OF_TEXT_LATENT
from gaugeblock.optimized.distributed import auxiliary_losses
from gaugeblock.optimized.distributed.fully_sharded import FullyShardedModel, Plan, State, run_sharded
from gaugeblock.optimized.distributed.model_calls import agree_on_model_call
from gaugeblock.optimized.model_parts import as_it_is
from gaugeblock.reference import unet_states, validation
from gaugeblock.reference.torch import clip_text as clip_text_reference
from gaugeblock.reference.torch import dit as dit_reference
from gaugeblock.reference.torch import dit_moe as dit_moe_reference
from gaugeblock.reference.torch import dream as dream_reference
from gaugeblock.reference.torch import flux as flux_reference
from gaugeblock.reference.torch import llada as llada_reference
from gaugeblock.reference.torch import mmdit as mmdit_reference
from gaugeblock.reference.torch import sdar as sdar_reference
from gaugeblock.reference.torch import text_latent_mmdit as text_latent_mmdit_reference
from gaugeblock.reference.torch import upcycled_gpt2 as upcycled_gpt2_reference
from gaugeblock.reference.torch import vae as vae_reference

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Shardable:
    """What runs on a state whose parts the ranks share out."""

    predict: Callable[..., Any]
    """Takes `gathered`, as of `Plan`, the state, the arrays, `config` and `mesh`; nothing is checked. Other options of an
    operation are by default those of a training run."""
    blocks: str
    """As of `Plan`."""

    def plan(self, config: Any, mesh: DeviceMesh, **options: Any) -> Plan:
        """How the model of a config runs."""
        return Plan(partial(self.predict, config=config, mesh=mesh, **options), self.blocks)

    def sharded(self, state: State, *, config: Any, mesh: DeviceMesh, **how: Any) -> FullyShardedModel:
        """Return the module that keeps this rank's parts of a state, which all ranks have whole, and alike; `how` as of it."""
        return FullyShardedModel(self.plan(config, mesh), state, mesh=mesh, **how)


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(Shardable):
    """An operation whose ranks share out the parameters and the batch."""

    shapes: Callable[[Any], Shapes]
    """Of the parameters that are used, by name, of a config."""
    check: Callable[..., None]
    """Takes what the operation takes, and raises what it raises."""
    num_wide: int = 0
    """How many of the results, the last ones, are not rounded to the dtype of the state."""

    def __call__(
        self, state: State, *arrays: torch.Tensor | None, config: Any, mesh: DeviceMesh, **options: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the operation on this rank's examples, as the module says."""
        check = partial(self.check, state, *arrays, config=config)
        agree_on_model_call("state", lambda: next(iter(state.values())), check, {}, mesh)
        used = {name: state[name] for name in self.shapes(config)}
        outputs = run_sharded(self.plan(config, mesh, **options), used, *arrays, mesh=mesh)
        dtype = next(iter(used.values())).dtype
        num_rounded = len(outputs) - self.num_wide
        outputs = *(each.to(dtype) for each in outputs[:num_rounded]), *outputs[num_rounded:]
        return outputs if len(outputs) > 1 else outputs[0]


def _of_parts(composed: Callable[..., Any], parts: Any = LIBRARY) -> Callable[..., Any]:
    """What a function of a module `..._composition` predicts."""

    def predict(gathered: Fuse, state: State, *arrays: torch.Tensor | None, config: Any, mesh: DeviceMesh) -> Any:
        return composed(replace(parts, block=gathered), state, *arrays, config=config)

    return predict


def _of_decoder(composed: Callable[..., Any]) -> Callable[..., Any]:
    """What a function of `decoder_composition` predicts."""

    def predict(gathered: Fuse, state: State, *arrays: torch.Tensor | None, config: Any, mesh: DeviceMesh) -> Any:
        return composed(replace(OF_DECODERS, layer=gathered), state, *arrays, config=config)

    return predict


def _predict_dit(
    gathered: Fuse, state: State, latents: Any, timesteps: Any, class_labels: Any, *, config: Any, mesh: DeviceMesh
) -> torch.Tensor:
    return of_dit.model_of_blocks(state, latents, timesteps, class_labels, config, gathered(of_dit.block))


def _predict_dit_moe(
    gathered: Fuse, state: State, latents: Any, timesteps: Any, class_labels: Any, *, config: Any, mesh: DeviceMesh
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = partial(auxiliary_losses.balance_loss, group=mesh.get_group())
    moe_layer = partial(moe_composition.dit_moe, SimpleNamespace(**vars(OF_MOE) | {"balance_loss": loss}))
    block = gathered(partial(of_dit_moe.block, as_it_is, moe_layer))
    return of_dit_moe.model_of_blocks(state, latents, timesteps, class_labels, config, block)


def _predict_mmdit(
    gathered: Fuse, state: State, latents: Any, texts: Any, pooled: Any, timesteps: Any, *, config: Any, mesh: DeviceMesh
) -> torch.Tensor:
    return of_mmdit.model_of_blocks(state, latents, texts, pooled, timesteps, config, gathered(of_mmdit.block))


def _predict_flux(gathered: Fuse, state: State, *arrays: torch.Tensor, config: Any, mesh: DeviceMesh) -> torch.Tensor:
    blocks = (partial(gathered(each), num_heads=config.num_attention_heads) for each in (of_flux.block, of_flux.single_block))
    return of_flux.model_of_blocks(state, arrays, config, *blocks)


def _check(
    check: Callable[..., None], shapes: Callable[[Any], Shapes], state: State, *arrays: torch.Tensor | None, config: Any
) -> None:
    """Check a call by a function of `validation` that takes state, arrays, config and shapes."""
    check(state, *arrays, config, shapes(config))


def _check_labeled(
    shapes: Callable[[Any], Shapes], state: State, latents: Any, timesteps: Any, class_labels: Any, *, config: Any
) -> None:
    _check(validation.dit, shapes, state, latents, timesteps, class_labels, config=config)
    validation.class_labels_in_range(class_labels, config.num_classes)


def _check_unet(state: State, latents: Any, timesteps: Any, texts: Any, mask: Any = None, *, config: Any) -> None:
    _check(validation.unet, unet_states.state_shapes, state, latents, timesteps, texts, mask, config=config)


def _check_unet_text_time(
    state: State, latents: Any, timesteps: Any, texts: Any, text_embeds: Any, time_ids: Any, mask: Any = None, *, config: Any
) -> None:
    arrays = latents, timesteps, texts, text_embeds, time_ids, mask
    _check(validation.unet_text_time, unet_states.state_shapes, state, *arrays, config=config)


def _check_encode(state: State, images: Any, *, config: Any) -> None:
    validation.vae_encode(state, images, config, vae_reference.encoder_shapes(config), vae_reference.decoder_shapes(config))


def _check_decode(state: State, latents: Any, *, config: Any) -> None:
    validation.vae_decode(state, latents, config, vae_reference.decoder_shapes(config), vae_reference.encoder_shapes(config))


def _check_clip_text(state: State, input_ids: Any, attention_mask: Any = None, *, config: Any) -> None:
    _check(validation.clip_text, clip_text_reference.state_shapes, state, input_ids, attention_mask, config=config)
    validation.clip_input_ids_in_range(input_ids, config)


def _check_text_latent_mmdit(
    state: State, text_tokens: Any, latents: Any, text_timesteps: Any, latent_timesteps: Any, attention_mask: Any = None, *,
    config: Any,
) -> None:  # fmt: skip
    arrays = text_tokens, latents, text_timesteps, latent_timesteps, attention_mask
    _check(validation.text_latent_mmdit, text_latent_mmdit_reference.state_shapes, state, *arrays, config=config)
    validation.text_latent_tokens_in_range(text_tokens, config)


def _predict_upcycled_gpt2(
    gathered: Fuse, state: State, input_ids: Any, noise: Any, *, training: bool = True, config: Any, mesh: DeviceMesh
) -> tuple[torch.Tensor, ...]:
    parts = replace(LIBRARY, block=gathered)
    composed = upcycled_gpt2_composition.unchecked_upcycled_gpt2
    return composed(parts, upcycled_gpt2_moe, state, input_ids, noise, training=training, config=config)


def _check_upcycled_gpt2(state: State, input_ids: Any, noise: Any, *, config: Any) -> None:
    _check(validation.upcycled_gpt2, upcycled_gpt2_reference.state_shapes, state, input_ids, noise, config=config)
    validation.gpt2_input_ids_in_range(input_ids, config)


DIT_BLOCKS = r"blocks\.\d+"
UNET_BLOCKS = r"(?:\w+\.)+?(?:resnets|transformer_blocks)\.\d+"
CLIP_LAYERS = r"text_model\.encoder\.layers\.\d+"
DECODER_LAYERS = r"model\.(?:layers|transformer\.blocks)\.\d+"
VAE_BLOCKS = r"(?:\w+\.)+?(?:resnets|attentions)\.\d+"

dit = Model(
    predict=_predict_dit,
    blocks=DIT_BLOCKS,
    shapes=dit_reference.state_shapes,
    check=partial(_check_labeled, dit_reference.state_shapes),
)
dit_moe = Model(
    predict=_predict_dit_moe,
    blocks=DIT_BLOCKS,
    shapes=dit_moe_reference.state_shapes,
    check=partial(_check_labeled, dit_moe_reference.state_shapes),
    num_wide=1,
)
flux = Model(
    predict=_predict_flux,
    blocks=r"(?:single_)?transformer_blocks\.\d+",
    shapes=flux_reference.state_shapes,
    check=partial(_check, validation.flux, flux_reference.state_shapes),
)
mmdit = Model(
    predict=_predict_mmdit,
    blocks=r"transformer_blocks\.\d+",
    shapes=mmdit_reference.state_shapes,
    check=partial(_check, validation.mmdit, mmdit_reference.state_shapes),
)
unet = Model(
    predict=_of_parts(unet_composition.unchecked_unet), blocks=UNET_BLOCKS, shapes=unet_states.state_shapes, check=_check_unet
)
unet_text_time = Model(
    predict=_of_parts(unet_composition.unchecked_unet_text_time),
    blocks=UNET_BLOCKS,
    shapes=unet_states.state_shapes,
    check=_check_unet_text_time,
)
encode = Model(
    predict=_of_parts(vae_composition.unchecked_encode),
    blocks=VAE_BLOCKS,
    shapes=vae_reference.encoder_shapes,
    check=_check_encode,
)
decode = Model(
    predict=_of_parts(vae_composition.unchecked_decode),
    blocks=VAE_BLOCKS,
    shapes=vae_reference.decoder_shapes,
    check=_check_decode,
)
clip_text = Model(
    predict=_of_parts(clip_text_composition.unchecked_clip_text),
    blocks=CLIP_LAYERS,
    shapes=clip_text_reference.state_shapes,
    check=_check_clip_text,
)
llada = Model(
    predict=_of_decoder(decoder_composition.llada),
    blocks=DECODER_LAYERS,
    shapes=llada_reference.state_shapes,
    check=validation.llada,
)
dream = Model(
    predict=_of_decoder(decoder_composition.dream),
    blocks=DECODER_LAYERS,
    shapes=dream_reference.state_shapes,
    check=validation.dream,
)
sdar = Model(
    predict=_of_decoder(decoder_composition.sdar),
    blocks=DECODER_LAYERS,
    shapes=sdar_reference.state_shapes,
    check=validation.sdar,
)
sdar_moe = Model(
    predict=_of_decoder(decoder_composition.sdar_moe),
    blocks=DECODER_LAYERS,
    shapes=sdar_reference.state_shapes,
    check=validation.sdar_moe,
    num_wide=1,
)
sdar_cached = Model(
    predict=_of_decoder(decoder_composition.sdar_cached),
    blocks=DECODER_LAYERS,
    shapes=sdar_reference.state_shapes,
    check=validation.sdar_cached,
)
sdar_training = Model(
    predict=_of_decoder(decoder_composition.sdar_training),
    blocks=DECODER_LAYERS,
    shapes=sdar_reference.state_shapes,
    check=validation.sdar_training,
)
text_latent_mmdit = Model(
    predict=_of_parts(text_latent_mmdit_composition.unchecked_text_latent_mmdit, OF_TEXT_LATENT),
    blocks=r"mmdit\.blocks\.\d+",
    shapes=text_latent_mmdit_reference.state_shapes,
    check=_check_text_latent_mmdit,
)
upcycled_gpt2 = Model(
    predict=_predict_upcycled_gpt2,
    blocks=r"transformer\.h\.\d+",
    shapes=upcycled_gpt2_reference.state_shapes,
    check=_check_upcycled_gpt2,
    num_wide=4,
)
