"""The layer of upcycled GPT-2: worked examples of moe-emergence, float32 on a CPU, to as many digits as were printed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.optimized.triton import biased_moe_layers as triton_biased_moe_layers
from gaugeblock.reference.jax import biased_moe_layers as jax_biased_moe_layers
from gaugeblock.reference.torch import auxiliary_losses, biased_moe_layers

LOGITS = torch.tensor([[2, 1, 0, -1], [0, 0.5, 1, 0], [-1, 3, 1, 2]])
NO_NOISE = torch.zeros_like(LOGITS)
ENTROPY = [0.947537, 1.294722, 0.887543]
STATE = {
    "router.gate.weight": torch.eye(4),  # tokens are their logits
    "experts.c_fc.weight": torch.zeros(4, 4, 5),
    "experts.c_fc.bias": torch.ones(4, 5),
    "experts.c_proj.weight": torch.zeros(4, 5, 4),
    "experts.c_proj.bias": torch.eye(4),  # expert e returns 1 in column e, so that outputs are weights
}
SAME = {**STATE, "experts.c_proj.bias": torch.eye(4)[:1].repeat(4, 1)}  # every expert returns 1 in the first column


def in_jax(hidden_states, state, noise, **options):
    given = [jax.tree.map(lambda each: jnp.asarray(each.detach().numpy()), each) for each in (hidden_states, state, noise)]
    outputs = jax_biased_moe_layers.upcycled_gpt2_moe(*given, **options)
    return [torch.from_numpy(np.array(each)) for each in outputs]


LAYERS = {
    "torch": biased_moe_layers.upcycled_gpt2_moe,
    "jax": in_jax,
    "triton": triton_biased_moe_layers.upcycled_gpt2_moe,
}
FORWARD = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
BACKWARD = pytest.mark.parametrize("layer", [LAYERS["torch"], LAYERS["triton"]], ids=["torch", "triton"])


def assert_printed(actual, printed):
    # of what was printed, and float32's own rounding
    torch.testing.assert_close(actual.detach(), torch.tensor(printed), rtol=0, atol=0.6e-6)


@FORWARD
@pytest.mark.parametrize(
    ("top_k", "ids", "weights", "load", "balance"),
    [
        (1, [[0], [2], [1]], [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]], [1 / 3, 1 / 3, 1 / 3, 0], 1.141822),
        (
            2,
            [[0, 1], [2, 1], [1, 3]],
            [[0.731059, 0.268941, 0, 0], [0, 0.377541, 0.622459, 0], [0, 0.731059, 0, 0.268941]],
            [1 / 6, 1 / 2, 1 / 6, 1 / 6],
            1.179139,
        ),
    ],
)
def test_the_example_without_noise(layer, top_k, ids, weights, load, balance):
    out, logits, found, probs, entropy, share = layer(LOGITS, STATE, NO_NOISE, top_k=top_k, noise_std=0.0, training=True)
    assert found.tolist() == ids and torch.equal(logits, LOGITS)
    assert_printed(out, [[float(each) for each in row] for row in weights])
    assert top_k > 1 or out.unique().tolist() == [0.0, 1.0]
    assert_printed(probs[1], [0.157060, 0.258948, 0.426933, 0.157060])
    assert_printed(entropy, ENTROPY)
    assert_printed(share, load)
    assert_printed(4 * (share * probs.mean(0)).sum(), balance)
    z = auxiliary_losses.router_z_loss(logits, torch.ones(3, dtype=torch.bool))
    assert_printed(z, 7.025221)


@FORWARD
def test_noise_of_the_example_chooses_another_expert_and_leaves_logits_and_entropy_alone(layer):
    noise = torch.tensor([[0.0, 8, 0, 0]])
    out, logits, ids, probs, entropy, load = layer(LOGITS[1:2], STATE, noise, top_k=1, noise_std=0.075, training=True)
    assert ids.tolist() == [[1]] and out.tolist() == [[0.0, 1, 0, 0]] and load.tolist() == [0.0, 1, 0, 0]
    assert_printed(probs, [[0.129493, 0.389017, 0.351997, 0.129493]])
    assert torch.equal(logits, LOGITS[1:2])
    assert_printed(entropy, ENTROPY[1:2])


@FORWARD
def test_noise_is_off_outside_of_training(layer):
    noise = 100 * torch.rand(LOGITS.shape, generator=torch.Generator().manual_seed(0))
    quiet = layer(LOGITS, STATE, NO_NOISE, top_k=2, noise_std=1.0, training=False)
    assert all(map(torch.equal, layer(LOGITS, STATE, noise, top_k=2, noise_std=1.0, training=False), quiet))


@BACKWARD
def test_gradients_of_the_example_go_straight_through(layer):
    tokens, of_out = LOGITS.clone().requires_grad_(), torch.zeros(3, 4)
    of_out[:, 0] = torch.tensor([1.0, 2, -1])
    out = layer(tokens, SAME, NO_NOISE, top_k=1, noise_std=0.0, training=True)[0]
    printed = [[0.229289, -0.152532, -0.056113, -0.020643], [-0.134108, -0.221107, 0.489322, -0.134108],
               [0.007912, -0.225278, 0.058459, 0.158907]]  # fmt: skip
    assert_printed(torch.autograd.grad(out, tokens, of_out)[0], printed)


@BACKWARD
def test_gradients_of_two_experts_leave_the_others_alone(layer):
    tokens, of_out = LOGITS.clone().requires_grad_(), torch.zeros(3, 4)
    of_out[0, :2] = torch.tensor([1.0, 0.5])
    out = layer(tokens, STATE, NO_NOISE, top_k=2, noise_std=0.0, training=True)[0]
    assert_printed(torch.autograd.grad(out, tokens, of_out)[0][0], [0.098306, -0.098306, 0.0, 0.0])


@BACKWARD
def test_one_expert_sends_no_gradient_to_the_gate_outside_of_training(layer):
    gate = STATE["router.gate.weight"].clone().requires_grad_()
    state = {**STATE, "router.gate.weight": gate}
    out = layer(LOGITS, state, NO_NOISE, top_k=1, noise_std=0.1, training=False)[0]
    assert not out.requires_grad or not torch.autograd.grad(out.sum(), gate)[0].any()


@FORWARD
def test_no_tokens_are_no_load(layer):
    *_, entropy, load = layer(LOGITS[:0], STATE, NO_NOISE[:0], top_k=2, noise_std=0.1, training=True)
    assert entropy.shape == (0,) and load.tolist() == [0.0] * 4
