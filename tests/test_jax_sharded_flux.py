"""Flux in JAX over the ranks of a mesh, on four CPU devices, against the PyTorch reference."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
from test_jax_sharded_dit import exchanges, mesh_of, state_of, to_jax
from test_references import assert_all_equal_to_rounding, random

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax import sharded_flux, sharded_models
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch import flux

CONFIG = FluxConfig(
    in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=6,
    pooled_projection_dim=5, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
)  # fmt: skip


def arrays_of(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    tokens = [random(3, 6, 4, seed=90), random(3, 5, 6, seed=91), random(3, 5, seed=92)]
    steering = [torch.tensor([0.0, 0.002, 0.001]), torch.tensor([0.004, 0.001, 0.0])]
    return [each.to(dtype) for each in (*tokens, *steering, torch.arange(18.0).view(6, 3), torch.zeros(5, 3))]


def test_flux_over_ranks_is_the_reference():
    state, arrays = state_of(CONFIG, flux.state_shapes), arrays_of()
    leaves, others = [each.requires_grad_() for each in (*arrays[:3], *state.values())], arrays[3:]
    expected = flux.flux(dict(zip(state, leaves[3:], strict=True)), *leaves[:3], *others, config=CONFIG)
    cotangent = random(*expected.shape, seed=93)
    gradients = torch.autograd.grad(expected, leaves, cotangent)

    def call(mesh, *leaves):
        arrays = *leaves[:3], *to_jax(others)
        return sharded_flux.flux(dict(zip(state, leaves[3:], strict=True)), *arrays, config=CONFIG, mesh=mesh)

    with jax.enable_x64(True):
        for num_ranks in (1, 4):
            actual, pull_back = jax.vjp(partial(call, mesh_of(num_ranks)), *to_jax([each.detach() for each in leaves]))
            assert_all_equal_to_rounding([actual], [expected.detach()])
            for one, other in zip(pull_back(jnp.asarray(cotangent.numpy())), gradients, strict=True):
                assert_all_equal_to_rounding([one], [other])


def test_blocks_have_a_sum_for_each_branch_of_each_stream_and_nothing_else_moves():
    mesh = mesh_of(4)
    state = {name: each.float() for name, each in state_of(CONFIG, flux.state_shapes).items()}
    placed = sharded_models.shard_state(to_jax(state), partition_rules.FLUX, mesh)
    single = "single_transformer_blocks.0"
    assert placed[f"{single}.proj_out.weight"].addressable_shards[3].data.shape == (32, 5, 8)
    assert placed[f"{single}.proj_mlp.weight"].addressable_shards[3].data.shape == (4, 8, 32)
    assert placed["transformer_blocks.0.attn.to_q.weight"].addressable_shards[3].data.shape == (8, 32)
    arrays = to_jax(arrays_of(torch.float32))

    def out(placed):
        return sharded_flux.flux_of_placed(placed, *arrays, config=CONFIG, mesh=mesh)

    moved = exchanges(out, placed)
    assert set(moved) == {"all-reduce"} and moved["all-reduce"] <= 4 * CONFIG.num_layers + CONFIG.num_single_layers


def test_what_does_not_fit_is_named():
    config = replace(CONFIG, num_attention_heads=6)
    state, arrays = to_jax(state_of(config, flux.state_shapes)), to_jax(arrays_of())
    with pytest.raises(ValueError, match=r"^num_attention_heads must be a multiple of the 4 ranks that share it, got 6"):
        sharded_flux.flux(state, *arrays, config=config, mesh=mesh_of(4))
    mesh = jax.make_mesh((2, 2), ("data", "ranks"), devices=jax.devices())
    with pytest.raises(ValueError, match=r'^mesh must have the one axis "ranks"'):
        sharded_flux.flux(state, *arrays, config=config, mesh=mesh)
