"""MoE layers in JAX over the ranks of a mesh, on four CPU devices, against the PyTorch references."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.sharding import Mesh
from test_references import assert_all_equal_to_rounding, random, value_and_grads

from gaugeblock.optimized.jax import sharded_layers
from gaugeblock.reference import moe_states
from gaugeblock.reference.configs import DiTMoEConfig
from gaugeblock.reference.torch import biased_moe_layers, dit_moe_layers, grouped_moe_layers, input_scaled_moe_layers, moe_layers

SIZES = {
    "num_experts": 8,
    "hidden_size": 12,
    "intermediate_size": 20,
    "two_intermediate_sizes": 40,
    "shared_intermediate_size": 6,
    "one": 1,
}
GROUPS = {"top_k": 3, "num_groups": 4, "topk_groups": 2, "renormalize": True, "routed_scaling_factor": 2.5}
DIT = DiTMoEConfig(top_k=2, aux_loss_alpha=0.5, per_sample=True)
LAYERS = {
    "mixtral_moe": (moe_layers, moe_states.QWEN3, {"top_k": 3}),
    "qwen3_moe": (moe_layers, moe_states.QWEN3, {"top_k": 2, "renormalize": False}),
    "qwen2_moe": (moe_layers, moe_states.QWEN2, {"top_k": 3, "renormalize": True}),
    "deepseek_v2_moe": (grouped_moe_layers, moe_states.DEEPSEEK_V2, GROUPS),
    "deepseek_v3_moe": (grouped_moe_layers, moe_states.DEEPSEEK_V3, GROUPS),
    "llama4_moe": (input_scaled_moe_layers, moe_states.LLAMA4, {"top_k": 2}),
    "gpt_oss_moe": (biased_moe_layers, moe_states.GPT_OSS, {"top_k": 2, "alpha": 1.702, "limit": 1.0}),
    "upcycled_gpt2_moe": (
        biased_moe_layers,
        moe_states.UPCYCLED_GPT2,
        {"top_k": 2, "noise_std": 0.3, "training": True},
    ),
    "dit_moe": (dit_moe_layers, moe_states.DIT_MOE, {"config": DIT}),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def mesh_of(num_ranks: int) -> Mesh:
    return jax.make_mesh((num_ranks,), ("ranks",), devices=jax.devices()[:num_ranks])


class Problem:
    """A layer's reference in PyTorch and ours over ranks, as functions of float64 arrays; all outputs are one vector."""

    def __init__(self, name: str, num_tokens: int, num_ranks: int) -> None:
        operation = next(each for each in LAYERS if name.startswith(each))
        module, axes, self.options = LAYERS[operation]
        self.layers = {
            "torch": getattr(module, operation),
            "jax": partial(getattr(sharded_layers, name), mesh=mesh_of(num_ranks)),
        }
        self.gate = next(entry for entry in axes if axes[entry] == ("num_experts", "hidden_size"))
        self.names = [entry for entry in axes if entry not in moe_states.BUFFERS]
        self.buffers = {entry: random(SIZES["num_experts"], seed=97) / 8 for entry in axes if entry in moe_states.BUFFERS}
        self.of_tokens = [random(num_tokens, SIZES["num_experts"], seed=98)] if "noise_std" in self.options else []

        tokens = (3, num_tokens // 3) if operation == "dit_moe" else (num_tokens,)
        shapes = [(*tokens, SIZES["hidden_size"]), *([SIZES[axis] for axis in axes[entry]] for entry in self.names)]
        self.arrays = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]

    def all_to_the_last_rank(self) -> list[torch.Tensor]:
        """The arrays, so that every token chooses one of the last two experts."""
        hidden_states, *entries = (each.clone() for each in self.arrays)
        hidden_states[..., 0] = 1
        entries[self.names.index(self.gate)][:, 0] = torch.tensor([-10.0] * (SIZES["num_experts"] - 2) + [10.0] * 2)
        ids = self.outputs("torch", hidden_states, *entries)[2]
        assert (ids >= SIZES["num_experts"] - 2).any(-1).all()
        return [hidden_states, *entries]

    def outputs(self, framework: str, hidden_states, *entries) -> list:
        to_framework = (lambda each: jnp.asarray(each.numpy())) if framework == "jax" else (lambda each: each)
        state = dict(zip(self.names, entries, strict=True)) | {name: to_framework(each) for name, each in self.buffers.items()}
        return self.layers[framework](hidden_states, state, *map(to_framework, self.of_tokens), **self.options)

    def on_torch(self, *arrays: torch.Tensor) -> torch.Tensor:
        return torch.cat([each.flatten() for each in self.outputs("torch", *arrays)])

    def on_ranks(self, cotangent: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        """The outputs, and gradients in all arrays."""

        def outputs(*arrays: jax.Array) -> jax.Array:
            return jnp.concatenate([each.ravel() for each in self.outputs("jax", *arrays)])

        value, pull_back = jax.vjp(outputs, *arrays)
        return [value, *pull_back(cotangent)]

    def assert_right(self, on_ranks: Callable[..., list[jax.Array]], arrays: list[torch.Tensor]) -> None:
        cotangent = random(*self.on_torch(*arrays).shape, seed=99)
        expected = value_and_grads(self.on_torch, arrays, cotangent)
        actual = on_ranks(*(jnp.asarray(each.numpy()) for each in (cotangent, *arrays)))
        assert_all_equal_to_rounding(actual, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_over_ranks_are_the_reference_wherever_tokens_go(name):
    problem = Problem(name, 9, num_ranks=4)
    on_ranks = jax.jit(problem.on_ranks)  # ids are traced: there is room for any
    for arrays in (problem.arrays, problem.all_to_the_last_rank()):
        problem.assert_right(on_ranks, arrays)


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_tokens"),
    [
        ("mixtral_moe", 2, 9),
        ("qwen3_moe", 4, 8),
        ("qwen2_moe", 1, 9),
        ("qwen2_moe_gathered_tokens", 4, 9),
        ("qwen2_moe_gathered_tokens", 4, 8),
        ("qwen2_moe_replicated_tokens", 4, 9),
        ("qwen2_moe_tensor_parallel", 4, 9),
        ("qwen2_moe", 4, 9),
        ("deepseek_v3_moe", 4, 8),
        ("llama4_moe", 4, 9),
        ("gpt_oss_moe", 2, 9),
        ("upcycled_gpt2_moe", 1, 8),
        ("upcycled_gpt2_moe", 4, 0),
        ("dit_moe", 4, 9),
        ("dit_moe", 4, 0),
    ],
)
def test_layers_over_ranks_are_the_reference_where_the_ids_decide_how_much_room_there_is(name, num_ranks, num_tokens):
    problem = Problem(name, num_tokens, num_ranks)
    problem.assert_right(problem.on_ranks, problem.arrays)


def test_what_the_ranks_do_not_divide_is_named():
    problem = Problem("upcycled_gpt2_moe", 8, num_ranks=4)
    problem.of_tokens[0] = problem.of_tokens[0][:, :6]
    hidden_states, *entries = (jnp.asarray(each.numpy()) for each in problem.arrays)
    with pytest.raises(ValueError, match=r"^num_experts must be a multiple of the ranks \(4\), got 6"):
        problem.outputs("jax", hidden_states, *(each[:6] for each in entries))
