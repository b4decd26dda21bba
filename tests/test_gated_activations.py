"""The Triton gated activations: what the conformance suite does not ask of every implementation."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from functools import partial

import pytest
import torch

from gaugeblock.conformance.engine.triton.interpreter import watch
from gaugeblock.optimized.triton import gated_activations, launch
from gaugeblock.reference.torch import gated_activations as reference

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
KINDS = {
    "swiglu": ("swiglu", {}),
    "geglu": ("geglu", {"approximation": "none"}),
    "geglu by tanh": ("geglu", {"approximation": "tanh"}),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def of(module, kind):
    name, options = KINDS[kind]
    return partial(getattr(module, name), **options)


def product(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def value_and_gradient(function, whole: torch.Tensor, gate_first: bool) -> list[torch.Tensor]:
    leaf = whole.detach().requires_grad_()
    halves = leaf.chunk(2, -1)
    out = function(*(halves if gate_first else halves[::-1]))
    return [out, *torch.autograd.grad(out, leaf, out.detach())]


@EVERY
@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_of_one_product_are_read_in_place(kind, gate_first):
    whole = product(2, 5, 2 * 70)
    with watch() as seen:
        ours = value_and_gradient(of(gated_activations, kind), whole, gate_first)
    for each, expected in zip(ours, value_and_gradient(of(reference, kind), whole, gate_first), strict=True):
        torch.testing.assert_close(each, expected)
    assert seen.launches == {"_forward_kernel": 1, "_backward_kernel": 1}


@EVERY
def test_one_gradient_alone_is_that_of_both(kind):
    gate, up = product(1, 3, 2 * 33).chunk(2, -1)
    function = of(gated_activations, kind)
    with watch():
        both = [each.detach().requires_grad_() for each in (gate, up)]
        expected = torch.autograd.grad(function(*both).sum(), both)
        for place in range(2):
            leaves = [each.detach().requires_grad_(place == index) for index, each in enumerate((gate, up))]
            (alone,) = torch.autograd.grad(function(*leaves).sum(), leaves[place])
            assert torch.equal(alone, expected[place])


@EVERY
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_any_size_may_be_0(kind, shape):
    gate, up = product(*shape), product(*shape).requires_grad_()
    with watch():
        out = of(gated_activations, kind)(gate, up)
    assert out.shape == shape
    assert torch.equal(torch.autograd.grad(out.sum(), up)[0], torch.zeros(shape))


@EVERY
def test_gates_far_from_zero_neither_overflow_nor_lose_what_is_left(kind):
    gate = torch.tensor([[[-3e4, -200.0, -100.0, 100.0, 200.0, 3e4]]], device=DEVICE).requires_grad_()
    up = torch.full_like(gate, 3.0)
    with watch():
        out = of(gated_activations, kind)(gate, up)
        (gradient,) = torch.autograd.grad(out.sum(), gate)
    assert torch.equal(out[..., 3:], 3 * gate[..., 3:]) and torch.equal(gradient[..., 3:], up[..., 3:])
    assert out[..., :3].abs().max() < 1e-37 and gradient[..., :3].abs().max() < 1e-37


def test_float64_is_rejected():
    gate, up = product(1, 2, 6, dtype=torch.float64).chunk(2, -1)
    with pytest.raises(TypeError, match=r"^gate must be .* got float64"):
        gated_activations.swiglu(gate, up)


@EVERY
def test_differentiates_only_once(kind):
    gate, up = (each.detach().requires_grad_() for each in product(1, 2, 6).chunk(2, -1))
    with watch():
        out = of(gated_activations, kind)(gate, up)
        (gradient,) = torch.autograd.grad(out.square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
