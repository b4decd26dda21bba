"""AutoencoderKL in JAX over the ranks of a mesh, on four CPU devices, against the PyTorch reference."""

from dataclasses import replace

import jax
import pytest
from on_jax_ranks import assert_is_reference, exchanges_of, parts_of
from test_jax_sharded_dit import mesh_of, state_of, to_jax
from test_references import random

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax import sharded_vae
from gaugeblock.reference.configs import VAEConfig
from gaugeblock.reference.torch import vae

CONFIG = VAEConfig(latent_channels=2, block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4)
HALVES = {
    "encode": (vae.encode, sharded_vae.encode, sharded_vae.encode_of_placed, vae.encoder_shapes, random(2, 3, 6, 5, seed=90)),
    "decode": (vae.decode, sharded_vae.decode, sharded_vae.decode_of_placed, vae.decoder_shapes, random(2, 2, 3, 2, seed=90)),
}


@pytest.mark.parametrize("name", HALVES)
def test_a_half_over_ranks_is_the_reference(name):
    reference, sharded, _, shapes, inputs = HALVES[name]
    assert_is_reference(reference, sharded, state_of(CONFIG, shapes), [inputs], config=CONFIG)


@pytest.mark.parametrize(("name", "blocks"), [("encode", 4), ("decode", 6)])
def test_a_residual_block_has_a_sum_and_nothing_else_moves(name, blocks):
    _, _, of_placed, shapes, inputs = HALVES[name]
    moved = exchanges_of(of_placed, partition_rules.VAE, state_of(CONFIG, shapes), [inputs], config=CONFIG)
    assert moved == {"all-reduce": blocks}


def test_the_whole_state_will_do():
    """And of what is not asked for nothing lies on the ranks."""
    reference, sharded, _, _, images = HALVES["encode"]
    state = state_of(CONFIG, vae.state_shapes)
    assert_is_reference(reference, sharded, state, [images], config=CONFIG, ranks=(4,))


def test_a_rank_holds_its_part():
    parts = parts_of(state_of(CONFIG, vae.state_shapes), partition_rules.VAE, rank=3)
    block = "encoder.down_blocks.1.resnets.0"
    assert parts[f"{block}.conv1.weight"] == (3, 8, 3, 3) and parts[f"{block}.conv1.bias"] == (3,)
    assert parts[f"{block}.norm2.weight"] == (3,) and parts[f"{block}.norm1.weight"] == (8,)
    assert parts[f"{block}.conv2.weight"] == (12, 3, 3, 3) and parts[f"{block}.conv2.bias"] == (12,)
    assert parts[f"{block}.conv_shortcut.weight"] == (12, 8, 1, 1)
    assert parts["decoder.mid_block.attentions.0.to_q.weight"] == (12, 12)


@pytest.mark.parametrize("name", HALVES)
def test_what_does_not_fit_is_named(name):
    _, sharded, _, shapes, inputs = HALVES[name]
    config = replace(CONFIG, norm_num_groups=2)
    state, inputs = to_jax(state_of(config, shapes)), to_jax(inputs)
    with pytest.raises(ValueError, match=r"^norm_num_groups must be a multiple of the 4 ranks that share it, got 2"):
        sharded(state, inputs, config=config, mesh=mesh_of(4))
    mesh = jax.make_mesh((2, 2), ("data", "ranks"), devices=jax.devices())
    with pytest.raises(ValueError, match=r'^mesh must have the one axis "ranks"'):
        sharded(state, inputs, config=config, mesh=mesh)
