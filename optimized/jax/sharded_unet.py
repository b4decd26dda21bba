"""The UNets in JAX over the ranks of a mesh: the parameters lie there as partition rules say, the rest is left to XLA.

Each rank has some channels between the two convolutions of each ResNet block, whole groups of the norm there, some heads of each
attention and some features of each hidden layer; images and tokens are on every rank. XLA adds the ranks' products up once for
each ResNet block and each branch of a transformer block, and moves nothing else: what is gated and the gates lie there as two
matrices, so that a rank's rows are of the same features.

    placed = sharded_models.shard_state(state, partition_rules.UNET, mesh)       once
    out = unet_of_placed(placed, *arrays, config=config, mesh=mesh)

Shapes: as in `reference.jax.unet`; I features of the hidden layer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax.sharded_models import run_on_ranks
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import UNetConfig
from gaugeblock.reference.jax import modules
from gaugeblock.reference.jax import unet as reference
from gaugeblock.reference.jax.gated_activations import geglu
from gaugeblock.reference.jax.modules import State
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.unet import BLOCK_NORM_EPS, TRANSFORMER_NORM_EPS, Conditioning
from gaugeblock.reference.unet_states import state_shapes


def unet(
    state: State,
    latents: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    encoder_attention_mask: jax.Array | None = None,
    *,
    config: UNetConfig,
    mesh: Mesh,
) -> jax.Array:
    """As `gaugeblock.reference.jax.unet.unet`, over the ranks of a mesh; arrays are global.

    Args: as of it; a state that does not lie on the mesh is brought there. And
        mesh: One axis, "ranks", whose size divides norm_num_groups and the heads of all transformers.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide the sizes above.

    Source: gaugeblock.reference.jax.unet; Shoeybi et al. 2019 (arXiv:1909.08053), section 3, also of convolutions.
    """
    arrays = latents, timesteps, encoder_hidden_states, encoder_attention_mask
    validation.unet(state, *arrays, config, state_shapes(config))
    return run_on_ranks(unet_of_placed, partition_rules.UNET, state, *arrays, config=config, mesh=mesh)


def unet_text_time(
    state: State,
    latents: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    text_embeds: jax.Array,
    time_ids: jax.Array,
    encoder_attention_mask: jax.Array | None = None,
    *,
    config: UNetConfig,
    mesh: Mesh,
) -> jax.Array:
    """As `gaugeblock.reference.jax.unet.unet_text_time`, over the ranks of a mesh; arrays are global.

    Args: as of it; a state that does not lie on the mesh is brought there. And
        mesh: As of `unet`.

    Raises: as it, and as `unet`.

    Source: gaugeblock.reference.jax.unet; Shoeybi et al. 2019 (arXiv:1909.08053), section 3, also of convolutions.
    """
    arrays = latents, timesteps, encoder_hidden_states, text_embeds, time_ids, encoder_attention_mask
    validation.unet_text_time(state, *arrays, config, state_shapes(config))
    return run_on_ranks(unet_text_time_of_placed, partition_rules.UNET, state, *arrays, config=config, mesh=mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def unet_of_placed(
    placed: State,
    latents: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    encoder_attention_mask: jax.Array | None = None,
    *,
    config: UNetConfig,
    mesh: Mesh,
) -> jax.Array:
    """Do what `unet` does with a state as `shard_state` places it by `partition_rules.UNET`; nothing is checked."""
    state = {name: at_least_float32(parameter) for name, parameter in placed.items()}
    latents_BCHW, text_BTD = at_least_float32(latents), at_least_float32(encoder_hidden_states)
    time_BE = reference.embed_times(state, timesteps.astype(latents_BCHW.dtype), config=config)
    conditioning = Conditioning(time_BE, text_BTD, encoder_attention_mask)
    return _predict(state, latents_BCHW, conditioning, config).astype(latents.dtype)


@partial(jax.jit, static_argnames=("config", "mesh"))
def unet_text_time_of_placed(
    placed: State,
    latents: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    text_embeds: jax.Array,
    time_ids: jax.Array,
    encoder_attention_mask: jax.Array | None = None,
    *,
    config: UNetConfig,
    mesh: Mesh,
) -> jax.Array:
    """Do what `unet_text_time` does with a state as `shard_state` places it by `partition_rules.UNET`; nothing is checked."""
    state = {name: at_least_float32(parameter) for name, parameter in placed.items()}
    latents_BCHW, text_BTD = at_least_float32(latents), at_least_float32(encoder_hidden_states)
    time_BE = reference.embed_times(state, timesteps.astype(latents_BCHW.dtype), config=config)
    numbers_BN = time_ids.astype(latents_BCHW.dtype)
    added_BE = reference.embed_added(state, at_least_float32(text_embeds), numbers_BN, config=config)
    conditioning = Conditioning(time_BE + added_BE, text_BTD, encoder_attention_mask)
    return _predict(state, latents_BCHW, conditioning, config).astype(latents.dtype)


def _predict(state: State, latents_BCHW: jax.Array, conditioning: Conditioning, config: UNetConfig) -> jax.Array:
    """Go down and up through the levels, as the reference does, with transformers that take `net.0.proj` in blocks."""
    kept = [modules.convolution(state, "conv_in", latents_BCHW)]
    for level in range(config.num_levels):
        block = states.part(state, f"down_blocks.{level}")
        for index in range(config.layers_per_block):
            kept.append(_layer(block, index, kept[-1], conditioning, level, config))
        if level < config.num_levels - 1:
            kept.append(modules.convolution(block, "downsamplers.0.conv", kept[-1], stride=2))
    block = states.part(state, "mid_block")
    images_BCHW = reference.resnet(states.part(block, "resnets.0"), kept[-1], conditioning, config=config)
    images_BCHW = _transformer(states.part(block, "attentions.0"), images_BCHW, conditioning, config.num_levels - 1, config)
    images_BCHW = reference.resnet(states.part(block, "resnets.1"), images_BCHW, conditioning, config=config)
    for place, level in enumerate(reversed(range(config.num_levels))):
        block = states.part(state, f"up_blocks.{place}")
        for index in range(config.layers_per_block + 1):
            both_BCHW = jnp.concatenate([images_BCHW, kept.pop()], axis=1)
            images_BCHW = _layer(block, index, both_BCHW, conditioning, level, config)
        if level > 0:
            images_BCHW = reference.upsample(block, images_BCHW, like=kept[-1])
    return modules.convolution(state, "conv_out", reference.norm_silu(state, "conv_norm_out", images_BCHW, config=config))


def _layer(
    block: State, index: int, images_BCHW: jax.Array, conditioning: Conditioning, level: int, config: UNetConfig
) -> jax.Array:
    """Apply one of a level's ResNet blocks, and the transformer behind it, if the level has any."""
    images_BCHW = reference.resnet(states.part(block, f"resnets.{index}"), images_BCHW, conditioning, config=config)
    if not config.has_transformers(level):
        return images_BCHW
    return _transformer(states.part(block, f"attentions.{index}"), images_BCHW, conditioning, level, config)


def _transformer(state: State, images_BCHW: jax.Array, conditioning: Conditioning, level: int, config: UNetConfig) -> jax.Array:
    """Let the pixels look at each other and at the text, and add the images."""
    batch_size, channels, height, width = images_BCHW.shape
    normalized_BCHW = modules.group_norm(state, "norm", images_BCHW, num_groups=config.norm_num_groups, eps=TRANSFORMER_NORM_EPS)
    tokens_BSC = reference.project(state, "proj_in", normalized_BCHW.reshape(batch_size, channels, height * width).mT)
    num_heads = config.attention_head_dim[level]
    mask = None if conditioning.mask is None else conditioning.mask[:, None, None]
    for index in range(config.transformer_layers_per_block[level]):
        block = states.part(state, f"transformer_blocks.{index}")
        normalized_BSC = modules.layer_norm(block, "norm1", tokens_BSC, eps=BLOCK_NORM_EPS)
        own, cross = states.part(block, "attn1"), states.part(block, "attn2")
        tokens_BSC = tokens_BSC + reference.attend(own, normalized_BSC, normalized_BSC, num_heads=num_heads)
        normalized_BSC = modules.layer_norm(block, "norm2", tokens_BSC, eps=BLOCK_NORM_EPS)
        tokens_BSC = tokens_BSC + reference.attend(cross, normalized_BSC, conditioning.text, mask=mask, num_heads=num_heads)
        normalized_BSC = modules.layer_norm(block, "norm3", tokens_BSC, eps=BLOCK_NORM_EPS)
        tokens_BSC = tokens_BSC + _feed_forward(states.part(block, "ff"), normalized_BSC)
    return images_BCHW + reference.project(state, "proj_out", tokens_BSC).mT.reshape(images_BCHW.shape)


def _feed_forward(state: State, tokens_BSC: jax.Array) -> jax.Array:
    """Apply the network of one hidden layer, whose `net.0.proj` is two matrices [2, I, C]: first of what is gated."""
    products_2BSI = jnp.einsum("bsc,nic->nbsi", tokens_BSC, state["net.0.proj.weight"], precision="highest")
    up_BSI, gate_BSI = products_2BSI + state["net.0.proj.bias"][:, None, None]
    return modules.linear(state, "net.2", geglu(gate_BSI, up_BSI, approximation="none"))
