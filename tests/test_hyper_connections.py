"""Hyper-connections: worked examples, Sinkhorn's rounds, and streams that are 0."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_references import random

from gaugeblock.optimized.triton import hyper_connections as triton_model
from gaugeblock.reference import states
from gaugeblock.reference.jax import hyper_connections as jax_model
from gaugeblock.reference.torch import hyper_connections as model

ROUNDED = 8 * 2.0**-23  # some operations of float32
CONVERGED = 1e-3  # of columns, after 20 rounds that end with rows: how far they go depends on the scores

EACH_TWIN = pytest.mark.parametrize("module", [model, jax_model], ids=["torch", "jax"])
EACH = pytest.mark.parametrize("module", [model, jax_model, triton_model], ids=["torch", "jax", "triton"])


def to_jax(tensors):
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors)


def call(module, state, streams):
    out = module.hyper_connection(*to_jax((state, streams)) if module is jax_model else (state, streams))
    return [np.asarray(each) for each in out]


def nothing(num_streams: int, hidden_size: int) -> dict[str, torch.Tensor]:
    """Parameters that are 0."""
    return {name: torch.zeros(shape) for name, shape in states.connection_shapes(num_streams, hidden_size).items()}


@EACH
def test_without_parameters_all_streams_are_averaged(module):
    streams = random(2, 3, 4, 5, seed=1, dtype=torch.float32)
    read, mixed, write = call(module, nothing(4, 5), streams)
    np.testing.assert_allclose(read, streams.sum(dim=2) / 2, rtol=ROUNDED)
    np.testing.assert_allclose(mixed, streams.mean(dim=2, keepdim=True).expand_as(streams), atol=ROUNDED)
    np.testing.assert_array_equal(write, np.ones((2, 3, 4)))


@EACH
def test_a_worked_example(module):
    # both streams have a root mean square of 1 after the norm: (3, 4) is (0.6, 0.8) * sqrt(2), (0, 2) is (0, 1) * sqrt(2)
    state = nothing(2, 2)
    state["norm.gamma"] = torch.tensor([0.0, 1.0])
    state["pre_branch_scale"] += 1
    state["h_post_scale"] += 2
    state["dynamic_alpha_fn"][0, 1, 0] = 2**-0.5
    state["dynamic_beta_fn"][0, 0] = 2**-0.5
    state["static_alpha"][0, 1] = math.log(4)  # shares [[4, 1], [1, 1]] become [[2, 1], [1, 2]] / 3
    streams = torch.tensor([[[[3.0, 4.0], [0.0, 2.0]]]])
    read, mixed, write = call(module, state, streams)
    first, second = (1 / (1 + math.exp(-each)) for each in (1.6, 2.0))
    np.testing.assert_allclose(read[0, 0], [3 * first, 4 * first + 2 * second], rtol=ROUNDED)
    np.testing.assert_allclose(mixed[0, 0], [[2, 10 / 3], [1, 8 / 3]], rtol=20 * ROUNDED)
    np.testing.assert_allclose(write[0, 0], [2 / (1 + math.exp(-1.2)), 1], rtol=ROUNDED)


@EACH_TWIN
def test_shares_of_streams_are_doubly_stochastic(module):
    scores = random(5, 4, 4, seed=1, dtype=torch.float32)
    shares = module.doubly_stochastic(to_jax(scores) if module is jax_model else scores)
    np.testing.assert_allclose(np.asarray(shares).sum(axis=-1), 1, atol=ROUNDED)
    np.testing.assert_allclose(np.asarray(shares).sum(axis=-2), 1, atol=CONVERGED)


@EACH_TWIN
def test_streams_that_are_zero_have_finite_gradients(module):
    vectors = torch.zeros(2, 6)
    vectors[1] = 1e-7
    if module is jax_model:
        out, pull_back = jax.vjp(module.divided_by_norm, to_jax(vectors))
        (gradient,) = pull_back(jnp.ones((2, 6)))
    else:
        out = module.divided_by_norm(vectors.requires_grad_())
        (gradient,) = torch.autograd.grad(out.sum(), vectors)
        out = out.detach()
    np.testing.assert_allclose(np.asarray(out), [[0.0] * 6, [1.0] * 6], rtol=ROUNDED)
    np.testing.assert_allclose(np.asarray(gradient)[0], 6**0.5 * 1e12, rtol=ROUNDED)


@pytest.mark.parametrize("hidden_size", [*range(2, 12), 1100])
def test_a_kernel_has_the_gradient_of_streams_about_as_short_as_the_least_norm(hidden_size):
    """What shorter ones are divided by does not depend on them, however the least norm is rounded; of any width."""
    shapes = enumerate(states.connection_shapes(4, hidden_size).items())
    state = {name: random(*shape, seed=seed, dtype=torch.float32) for seed, (name, shape) in shapes}
    streams = random(1, 2, 4, hidden_size, seed=99, dtype=torch.float32)
    streams *= torch.tensor([1.1e-12, 0.9e-12])[:, None, None] / streams.norm(dim=-1, keepdim=True)

    def gradient(function, dtype):
        leaf = streams.to(dtype).requires_grad_()
        read, *_ = function({name: each.to(dtype) for name, each in state.items()}, leaf)
        return torch.autograd.grad(read.sum(), leaf)[0].double()

    expected = gradient(model.hyper_connection, torch.float64)
    actual = gradient(triton_model.hyper_connection, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@EACH
def test_a_stream_that_is_zero_is_read_as_zero_in_half_precision(module):
    state = {name: (each + 0.5).half() for name, each in nothing(2, 4).items()}
    if module is jax_model:
        out = module.hyper_connection(*to_jax((state, torch.zeros(1, 1, 2, 4).half())))
    else:
        out = module.hyper_connection(state, torch.zeros(1, 1, 2, 4).half())
    read, mixed, write = (np.asarray(each, dtype=np.float32) for each in out)
    assert not read.any() and not mixed.any() and (write == np.float32(2 / (1 + math.exp(-0.5)))).all()


@EACH_TWIN
def test_bad_calls_name_the_argument(module):
    streams, state = torch.zeros(1, 2, 2, 4), nothing(2, 4)
    bad = nothing(2, 4)
    del bad["norm.gamma"]
    for own, given, message in (
        (state, streams[0], "streams must be"),
        (state, streams[..., :0], "streams must have one feature at least"),
        (state, streams[:, :, :0], "streams must have one stream at least"),
        (nothing(3, 4), streams, "state must have static_alpha of shape"),
        (bad, streams, "norm.gamma"),
    ):
        with pytest.raises(ValueError, match=message):
            call(module, own, given)
