"""Layers that choose among groups: what the gate cannot ask, and what they are made of."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_references import random

from gaugeblock.optimized.compiled import grouped_moe_layers as compiled_layers
from gaugeblock.optimized.triton import grouped_moe_layers as triton_layers
from gaugeblock.reference import moe_states
from gaugeblock.reference.jax import grouped_moe_layers as jax_layers
from gaugeblock.reference.torch import experts, grouped_moe_layers, moe_layers

SIZES = {"num_experts": 6, "hidden_size": 8, "intermediate_size": 5, "two_intermediate_sizes": 10, "shared_intermediate_size": 7}
OPTIONS = {"top_k": 2, "num_groups": 3, "topk_groups": 2, "renormalize": True, "routed_scaling_factor": 2.5}
UNGROUPED = {"top_k": 2, "num_groups": 1, "topk_groups": 1, "routed_scaling_factor": 1.0}
REALMS = {"torch": grouped_moe_layers, "triton": triton_layers, "torch-grouped": compiled_layers}


def tokens_and_state(axes_of: moe_states.StateAxes, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    state = {
        name: random(*(SIZES[axis] for axis in axes), seed=seed, dtype=dtype)
        for seed, (name, axes) in enumerate(sorted(axes_of.items()))
    }
    return SimpleNamespace(tokens=random(9, SIZES["hidden_size"], seed=99, dtype=dtype), state=state)


@pytest.mark.parametrize("module", REALMS.values(), ids=REALMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_bias_may_have_any_floating_dtype_and_gets_no_gradient(module, dtype):
    given = tokens_and_state(moe_states.DEEPSEEK_V3)
    bias = given.state[moe_states.CORRECTION_BIAS].to(torch.bfloat16)  # of which all of these dtypes hold every value
    plain = module.deepseek_v3_moe(given.tokens, {**given.state, moe_states.CORRECTION_BIAS: bias.float()}, **OPTIONS)
    leaves = {name: each.detach().requires_grad_() for name, each in given.state.items()}
    leaves[moe_states.CORRECTION_BIAS] = bias.to(dtype).requires_grad_()
    out, logits, ids = module.deepseek_v3_moe(given.tokens, leaves, **OPTIONS)
    (out.sum() + logits.sum()).backward()
    assert torch.equal(out, plain[0]) and torch.equal(ids, plain[2])
    assert [name for name, each in leaves.items() if each.grad is None] == [moe_states.CORRECTION_BIAS]


def test_the_bias_has_no_gradient_in_jax():
    given = tokens_and_state(moe_states.DEEPSEEK_V3)
    state = {name: jnp.asarray(each.numpy()) for name, each in given.state.items()}

    def total(state):
        out, logits, _ = jax_layers.deepseek_v3_moe(jnp.asarray(given.tokens.numpy()), state, **OPTIONS)
        return out.sum() + logits.sum()

    gradients = jax.grad(total)(state)
    assert [name for name, each in gradients.items() if not np.asarray(each).any()] == [moe_states.CORRECTION_BIAS]


@pytest.mark.parametrize("renormalize", [False, True])
def test_one_group_of_deepseek_v2_is_qwen3_with_shared_experts(renormalize):
    given = tokens_and_state(moe_states.DEEPSEEK_V2, torch.float64)
    out, logits, ids = grouped_moe_layers.deepseek_v2_moe(given.tokens, given.state, **UNGROUPED, renormalize=renormalize)
    routed = {name: given.state[name] for name in moe_states.QWEN3}
    expected = moe_layers.qwen3_moe(given.tokens, routed, top_k=2, renormalize=renormalize)
    shared = experts.shared_swiglu(given.tokens, *moe_layers.shared_weights(given.state, "shared_experts"))
    assert torch.equal(out, expected[0] + shared) and torch.equal(logits, expected[1]) and torch.equal(ids, expected[2])


@pytest.mark.parametrize("layer", ["deepseek_v2_moe", "deepseek_v3_moe"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_scaling_factor_is_of_the_routed_experts_alone(layer, renormalize):
    given = tokens_and_state(getattr(moe_states, layer.removesuffix("_moe").upper()), torch.float64)
    options = {**OPTIONS, "renormalize": renormalize, "routed_scaling_factor": 0.0}
    out, _, _ = getattr(grouped_moe_layers, layer)(given.tokens, given.state, **options)
    assert torch.equal(out, experts.shared_swiglu(given.tokens, *moe_layers.shared_weights(given.state, "shared_experts")))


@pytest.mark.parametrize(
    ("top_k", "renormalize", "weight"), [(1, False, 3 / 2), (1, True, 3), (2, False, 3 / 2), (2, True, 3 / 2)]
)
def test_worked_example_of_deepseek_v3(top_k, renormalize, weight):
    """Two groups of two. Sigmoids are 1/2, 1/2 and 3/4, 1/4: biases make the first group the best, and the choice 1, then 0."""
    state = {
        "gate.weight": torch.tensor([1.0, 1.0, 3.0, 1 / 3]).log()[:, None],
        moe_states.CORRECTION_BIAS: torch.tensor([-0.75, -0.5, -0.875, -0.5]),
        "experts.gate_up_proj": torch.tensor([41.0, 1.0]).repeat(4, 1)[..., None],  # silu(41) is 41 in float32
        "experts.down_proj": torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None],
        "shared_experts.gate_proj.weight": torch.tensor([[41.0]]),
        "shared_experts.up_proj.weight": torch.tensor([[1.0]]),
        "shared_experts.down_proj.weight": torch.tensor([[3.0]]),
    }
    options = {"num_groups": 2, "topk_groups": 1, "routed_scaling_factor": 3.0}
    hidden_states = torch.ones(1, 1)
    out, logits, ids = grouped_moe_layers.deepseek_v3_moe(hidden_states, state, top_k=top_k, renormalize=renormalize, **options)
    assert torch.equal(logits, state["gate.weight"].mT) and ids.tolist() == [[1, 0][:top_k]]
    assert out.item() == 41 * (weight * (2 + 1 if top_k == 2 else 2) + 3)
