"""DiT and DiT-MoE in JAX over the ranks of a mesh, on four CPU devices, against the PyTorch references."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from test_references import assert_all_equal_to_rounding, random

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax import sharded_dit, sharded_models
from gaugeblock.reference.configs import DiTConfig, DiTMoEConfig, DiTMoEModelConfig
from gaugeblock.reference.torch import dit, dit_moe

DIT = DiTConfig(
    input_size=6, in_channels=3, hidden_size=24, depth=2, num_heads=4, mlp_ratio=1.5, num_classes=5, frequency_embedding_size=16
)
DIT_MOE = DiTMoEModelConfig(
    input_size=6, in_channels=3, hidden_size=24, depth=2, num_heads=4, mlp_ratio=1.5, num_classes=5, frequency_embedding_size=16,
    num_experts=4, qk_norm=True, moe=DiTMoEConfig(aux_loss_alpha=0.5),
)  # fmt: skip
MODELS = {
    "dit": (DIT, dit.state_shapes, dit.dit, sharded_dit.dit),
    "dit_moe": (DIT_MOE, dit_moe.state_shapes, dit_moe.dit_moe, sharded_dit.dit_moe),
}


def mesh_of(num_ranks: int) -> Mesh:
    return jax.make_mesh((num_ranks,), ("ranks",), devices=jax.devices()[:num_ranks])


def state_of(config: DiTConfig, shapes) -> dict[str, torch.Tensor]:
    return {name: random(*shape, seed=seed) * max(shape) ** -0.5 for seed, (name, shape) in enumerate(shapes(config).items())}


def inputs_of(config: DiTConfig) -> list[torch.Tensor]:
    latents = random(3, config.in_channels, config.input_size, config.input_size, seed=90)
    return [latents, torch.tensor([0.0, 2.0, 1.5], dtype=torch.float64), torch.tensor([5, 0, 3])]


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


@pytest.mark.parametrize(("name", "num_ranks"), [("dit", 1), ("dit", 2), ("dit", 4), ("dit_moe", 1), ("dit_moe", 4)])
def test_models_over_ranks_are_the_reference(name, num_ranks):
    config, shapes, reference, sharded = MODELS[name]
    state, (latents, times, labels) = state_of(config, shapes), inputs_of(config)
    leaves = [each.requires_grad_() for each in (latents, *state.values())]
    expected = reference(dict(zip(state, leaves[1:], strict=True)), leaves[0], times, labels, config=config)
    expected = [expected] if name == "dit" else list(expected)
    cotangents = [random(*each.shape, seed=91) for each in expected]
    gradients = torch.autograd.grad(expected, leaves, cotangents)
    with jax.enable_x64(True):
        jax_times, jax_labels = to_jax([times, labels])

        def function(latents, *leaves):
            state_of_jax = dict(zip(state, leaves, strict=True))
            out = sharded(state_of_jax, latents, jax_times, jax_labels, config=config, mesh=mesh_of(num_ranks))
            return [out] if name == "dit" else list(out)

        actual, pull_back = jax.vjp(function, *to_jax([each.detach() for each in leaves]))
        assert_all_equal_to_rounding(actual, [each.detach() for each in expected])
        for place, (one, other) in enumerate(zip(pull_back(to_jax(cotangents)), gradients, strict=True)):
            if not ["latents", *state][place].endswith("k_norm.bias"):  # 0: it shifts all scores of a query alike
                assert_all_equal_to_rounding([one], [other])


def exchanges(function, *arguments, **options) -> Counter[str]:
    """How many of each exchange XLA has made of a function."""
    text = jax.jit(function).lower(*arguments, **options).compile().as_text()
    return Counter(re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text))


def test_a_block_of_dit_has_a_sum_for_each_branch_and_nothing_else_moves():
    mesh = mesh_of(4)
    placed = sharded_models.shard_state(
        to_jax({k: v.float() for k, v in state_of(DIT, dit.state_shapes).items()}), partition_rules.DIT, mesh
    )
    latents, times, labels = to_jax([each.float() if each.is_floating_point() else each for each in inputs_of(DIT)])

    def out(placed):
        return sharded_dit.dit_of_placed(placed, latents, times, labels, config=DIT, mesh=mesh)

    assert exchanges(out, placed) == {"all-reduce": 2 * DIT.depth}
    both = exchanges(jax.grad(lambda placed: jnp.square(out(placed)).sum()), placed)
    assert both["all-reduce"] >= 4 * DIT.depth - 1  # XLA may join some
    assert set(both) == {"all-reduce"}


def test_a_rank_holds_its_part():
    mesh, config = mesh_of(4), DIT_MOE
    placed = sharded_models.shard_state(to_jax(state_of(config, dit_moe.state_shapes)), partition_rules.DIT_MOE, mesh)
    parts = {name: each.addressable_shards[3].data for name, each in placed.items()}
    assert placed["blocks.0.attn.qkv.weight"].shape == (3, 24, 24) and parts["blocks.0.attn.qkv.weight"].shape == (3, 6, 24)
    assert parts["blocks.1.attn.proj.weight"].shape == (24, 6)
    assert parts["blocks.0.moe.experts.gate_up_proj"].shape == (1, 72, 24)
    assert parts["blocks.0.moe.shared_experts.down_proj.weight"].shape == (24, 12)
    assert parts["blocks.0.moe.gate.weight"].shape == (4, 24)
    np.testing.assert_array_equal(
        parts["blocks.1.moe.experts.down_proj"], np.asarray(placed["blocks.1.moe.experts.down_proj"])[3:]
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dit", {"num_heads": 6}, r"num_heads must be a multiple of the 4 ranks that share it, got 6"),
        ("dit", {"mlp_ratio": 1.25}, r"intermediate_size must be a multiple of the 4 ranks that share it, got 30"),
        ("dit_moe", {"num_experts": 6}, r"num_experts must be a multiple of the 4 ranks that share it, got 6"),
    ],
)
def test_what_the_ranks_do_not_divide_is_named(name, changes, message):
    config, shapes, _, sharded = MODELS[name]
    config = replace(config, **changes)
    state, inputs = to_jax(state_of(config, shapes)), to_jax(inputs_of(config))
    with pytest.raises(ValueError, match=f"^{message}"):
        sharded(state, *inputs, config=config, mesh=mesh_of(4))


def test_a_mesh_of_other_axes_is_refused():
    inputs = to_jax(inputs_of(DIT))
    mesh = jax.make_mesh((2, 2), ("data", "ranks"), devices=jax.devices())
    with pytest.raises(ValueError, match=r'^mesh must have the one axis "ranks"'):
        sharded_dit.dit(to_jax(state_of(DIT, dit.state_shapes)), *inputs, config=DIT, mesh=mesh)
