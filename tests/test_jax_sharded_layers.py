"""MoE layers in JAX over the ranks of a mesh, on four CPU devices, against the PyTorch references."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.sharding import Mesh
from test_references import assert_all_equal_to_rounding, jax_value_and_grads, random, value_and_grads

from gaugeblock.optimized.jax import sharded_layers
from gaugeblock.reference import moe_states
from gaugeblock.reference.torch import moe_layers

SIZES = {
    "num_experts": 8,
    "hidden_size": 12,
    "intermediate_size": 20,
    "two_intermediate_sizes": 40,
    "shared_intermediate_size": 6,
    "one": 1,
}
LAYERS = {
    "mixtral_moe": (moe_states.QWEN3, {"top_k": 3}),
    "qwen3_moe": (moe_states.QWEN3, {"top_k": 2, "renormalize": False}),
    "qwen2_moe": (moe_states.QWEN2, {"top_k": 3, "renormalize": True}),
}
WAYS = ["qwen2_moe_gathered_tokens", "qwen2_moe_replicated_tokens", "qwen2_moe_tensor_parallel"]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def mesh_of(num_ranks: int) -> Mesh:
    return jax.make_mesh((num_ranks,), ("ranks",), devices=jax.devices()[:num_ranks])


@pytest.mark.parametrize("num_tokens", [9, 8])
@pytest.mark.parametrize(
    ("name", "num_ranks"), [("mixtral_moe", 2), ("qwen3_moe", 4), ("qwen2_moe", 1), ("qwen2_moe", 4), *((way, 4) for way in WAYS)]
)
def test_layers_over_ranks_are_the_reference(name, num_ranks, num_tokens):
    operation = next(each for each in LAYERS if name.startswith(each))
    axes, options = LAYERS[operation]
    shapes = [(num_tokens, SIZES["hidden_size"]), *([SIZES[axis] for axis in each] for each in axes.values())]
    arrays = [random(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate(shapes)]
    cotangent = random(num_tokens, SIZES["hidden_size"] + SIZES["num_experts"], seed=99, dtype=torch.float64)

    def on_torch(hidden_states, *entries):
        out, logits, _ = getattr(moe_layers, operation)(hidden_states, dict(zip(axes, entries, strict=True)), **options)
        return torch.cat([out, logits], 1)

    def on_ranks(hidden_states, *entries):
        state = dict(zip(axes, entries, strict=True))
        out, logits, _ = getattr(sharded_layers, name)(hidden_states, state, **options, mesh=mesh_of(num_ranks))
        return jnp.concatenate([out, logits], 1)

    expected = value_and_grads(on_torch, arrays, cotangent)
    assert_all_equal_to_rounding(jax_value_and_grads(on_ranks, arrays, cotangent), expected)
