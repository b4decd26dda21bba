"""MMDiT in JAX over the ranks of a mesh, on four CPU devices, against the PyTorch reference."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
import torch
from agreement import assert_agree
from jax.sharding import Mesh
from test_references import random

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax import sharded_mmdit
from gaugeblock.optimized.jax.sharded_models import shard_state
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.torch import mmdit

CONFIG = MMDiTConfig(
    in_channels=3, num_layers=2, attention_head_dim=6, num_attention_heads=4, joint_attention_dim=7, caption_projection_dim=24,
    pooled_projection_dim=5, out_channels=3, pos_embed_max_size=4, dual_attention_layers=(0,), qk_norm="rms_norm",
)  # fmt: skip


def mesh_of(num_ranks: int) -> Mesh:
    return jax.make_mesh((num_ranks,), ("ranks",), devices=jax.devices()[:num_ranks])


def state_of(config: MMDiTConfig) -> dict[str, torch.Tensor]:
    shapes = mmdit.state_shapes(config)
    return {name: random(*shape, seed=seed) * max(shape) ** -0.5 for seed, (name, shape) in enumerate(shapes.items())}


def inputs_of(config: MMDiTConfig) -> list[torch.Tensor]:
    return [
        random(3, config.in_channels, 4, 6, seed=90),
        random(3, 5, config.joint_attention_dim, seed=91),
        random(3, config.pooled_projection_dim, seed=92),
        torch.tensor([0.0, 999.0, 1.5], dtype=torch.float64),
    ]


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_model_over_ranks_is_the_reference(num_ranks):
    state, (*inputs, times) = state_of(CONFIG), inputs_of(CONFIG)
    leaves = [each.requires_grad_() for each in (*inputs, *state.values())]
    expected = mmdit.mmdit(dict(zip(state, leaves[3:], strict=True)), *leaves[:3], times, config=CONFIG)
    cotangent = random(*expected.shape, seed=93)
    gradients = torch.autograd.grad(expected, leaves, cotangent)
    with jax.enable_x64(True):
        jax_times = to_jax(times)

        def function(*leaves):
            state_of_jax = dict(zip(state, leaves[3:], strict=True))
            return sharded_mmdit.mmdit(state_of_jax, *leaves[:3], jax_times, config=CONFIG, mesh=mesh_of(num_ranks))

        actual, pull_back = jax.vjp(function, *to_jax([each.detach() for each in leaves]))
        names = ["out", "latents", "encoder_hidden_states", "pooled_projections", *state]
        ours, theirs = (actual, *pull_back(to_jax(cotangent))), (expected.detach(), *gradients)
        assert_agree(dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)))


def exchanges(function, *arguments) -> Counter[str]:
    """How many of each exchange XLA has made of a function."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return Counter(re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text))


def test_a_branch_has_a_sum_and_nothing_else_moves():
    placed = shard_state(to_jax({k: v.float() for k, v in state_of(CONFIG).items()}), partition_rules.MMDIT, mesh_of(4))
    inputs = to_jax([each.float() for each in inputs_of(CONFIG)])

    def out(placed):
        return sharded_mmdit.mmdit_of_placed(placed, *inputs, config=CONFIG, mesh=mesh_of(4))

    # joint attention, the image's own and the feed-forward networks, whose two streams travel together; in the last block two
    assert exchanges(out, placed) == {"all-reduce": 5}
    assert set(exchanges(jax.grad(lambda placed: jnp.square(out(placed)).sum()), placed)) == {"all-reduce"}


def test_a_rank_holds_its_part():
    placed = shard_state(to_jax(state_of(CONFIG)), partition_rules.MMDIT, mesh_of(4))
    parts = {name: each.addressable_shards[3].data for name, each in placed.items()}
    block = "transformer_blocks.0"
    assert placed[f"{block}.attn.add_k_proj.weight"].shape == (24, 24)
    assert parts[f"{block}.attn.add_k_proj.weight"].shape == (6, 24) == parts[f"{block}.attn2.to_v.weight"].shape
    assert parts[f"{block}.attn.to_add_out.weight"].shape == (24, 6)
    assert parts[f"{block}.ff_context.net.0.proj.bias"].shape == (24,)
    assert parts[f"{block}.ff.net.2.weight"].shape == (24, 24)
    assert parts[f"{block}.attn.norm_added_k.weight"].shape == (6,)


def test_heads_that_the_ranks_do_not_divide_are_told():
    config = replace(CONFIG, num_attention_heads=6, attention_head_dim=4)
    with pytest.raises(ValueError, match=r"^num_attention_heads must be a multiple of the 4 ranks that share it, got 6"):
        sharded_mmdit.mmdit(to_jax(state_of(config)), *to_jax(inputs_of(config)), config=config, mesh=mesh_of(4))


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((2, 2), ("data", "ranks"), devices=jax.devices())
    with pytest.raises(ValueError, match=r'^mesh must have the one axis "ranks"'):
        sharded_mmdit.mmdit(to_jax(state_of(CONFIG)), *to_jax(inputs_of(CONFIG)), config=CONFIG, mesh=mesh)
