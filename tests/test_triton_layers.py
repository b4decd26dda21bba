"""The Triton adaptive LayerNorms and the DiT made of them: what the conformance suite does not ask of every implementation."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gaugeblock.conformance.engine.triton.interpreter import watch
from gaugeblock.optimized.triton import launch, partial_sums
from gaugeblock.optimized.triton.dit import dit
from gaugeblock.optimized.triton.layers import gated_residual_layer_norm_modulate, layer_norm_modulate
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch import dit as reference_dit
from gaugeblock.reference.torch import layers as reference

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
EPS = 1e-6
TINY = DiTConfig(input_size=4, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3, frequency_embedding_size=8)


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels run as the gate runs them."""
    with watch():
        yield


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def arguments(batch_size=2, num_tokens=17, hidden_size=70, dtype=torch.float32) -> list[torch.Tensor]:
    """residual, branch, gate, shift and scale."""
    tokens, steering = (batch_size, num_tokens, hidden_size), (batch_size, hidden_size)
    return [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate((tokens, tokens, *[steering] * 3))]


def gradients(function, tensors: list[torch.Tensor], wanted=range(5), used=(0, 1)) -> list[Any]:
    """Of the tensors at the places `wanted`, through the results at the places `used`; the results are their own cotangents."""
    leaves = [tensor.detach().requires_grad_(place in wanted) for place, tensor in enumerate(tensors)]
    every = function(*leaves, eps=EPS)
    results = [every[place] for place in used]
    cotangents = [result.detach().clone() for result in results]
    return list(torch.autograd.grad(results, [leaves[place] for place in wanted], cotangents, allow_unused=True))


def dit_arguments() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """state, latents, timesteps and class_labels."""
    shapes = reference_dit.state_shapes(TINY)
    state = {name: 0.2 * draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    steering = torch.tensor([3.0, 997.0], device=DEVICE), torch.tensor([0, 3], device=DEVICE)
    return state, draw(2, 2, 4, 4, seed=99), *steering


class Readings(TorchDispatchMode):
    """Counts what reads values on the host, for which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
        return func(*args, **(kwargs or {}))


def test_sums_over_more_tokens_than_the_two_kernels_take_at_once(monkeypatch):
    """70 tokens are 3 chunks, of which the second kernel takes 2 at a time."""
    tensors = arguments(num_tokens=70, hidden_size=5)
    expected = gradients(gated_residual_layer_norm_modulate, tensors)
    monkeypatch.setattr(partial_sums, "SUM_BLOCK", (2, 64))
    for gradient, other in zip(gradients(gated_residual_layer_norm_modulate, tensors), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_bits_of_an_example_do_not_depend_on_its_batch_nor_on_the_run():
    tensors = arguments(batch_size=3, num_tokens=33)
    alone = gradients(gated_residual_layer_norm_modulate, [tensor[:1] for tensor in tensors])
    for run in range(2):
        for ours, expected in zip(gradients(gated_residual_layer_norm_modulate, tensors), alone, strict=True):
            assert torch.equal(ours[:1], expected), f"run {run}"


@pytest.mark.parametrize("place", range(5))
def test_gradients_that_nobody_wants_are_not_computed(place):
    tensors = arguments()
    with watch() as seen:
        (alone,) = gradients(gated_residual_layer_norm_modulate, tensors, wanted=[place])
    assert torch.equal(alone, gradients(gated_residual_layer_norm_modulate, tensors)[place])
    sums = {"_sum_chunks_kernel": 1} if place >= 2 else {}
    assert seen.launches == {"_forward_kernel": 1, "_backward_kernel": 1, **sums}


@pytest.mark.parametrize("used", [(0,), (1,)])
def test_a_result_that_nobody_uses_has_no_part_in_the_gradients(used):
    tensors = arguments()
    ours = gradients(gated_residual_layer_norm_modulate, tensors, used=used)
    theirs = gradients(reference.gated_residual_layer_norm_modulate, tensors, used=used)
    for gradient, expected in zip(ours, theirs, strict=True):
        expected = torch.zeros_like(gradient) if expected is None else expected
        torch.testing.assert_close(gradient, expected)


def test_a_row_of_equal_values_has_no_deviation_but_eps():
    ones = torch.ones(1, 1, 3, device=DEVICE)
    assert torch.equal(layer_norm_modulate(3 * ones, 5 * ones[0], ones[0], eps=EPS), 5 * ones)


@pytest.mark.parametrize("size", ["batch_size", "num_tokens", "hidden_size"])
def test_any_size_may_be_0(size):
    tensors = arguments(**{size: 0})
    for gradient, tensor in zip(gradients(gated_residual_layer_norm_modulate, tensors), tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_offsets_may_pass_2_to_the_31():
    memory = torch.empty(2**31 + 2**10, dtype=torch.float16, device=DEVICE)
    near = arguments(batch_size=3, num_tokens=2, hidden_size=5, dtype=torch.float16)
    far = []
    for offset, tensor in zip(range(0, 5 * 2**7, 2**7), near, strict=True):
        strides = (2**30, *tensor.stride()[1:])
        far.append(memory.as_strided(tensor.shape, strides, offset).copy_(tensor))
    for ours, expected in zip(
        (*gated_residual_layer_norm_modulate(*far, eps=EPS), *gradients(gated_residual_layer_norm_modulate, far)),
        (*gated_residual_layer_norm_modulate(*near, eps=EPS), *gradients(gated_residual_layer_norm_modulate, near)),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_float64_is_rejected():
    residual, branch, gate, shift, scale = (tensor.double() for tensor in arguments())
    with pytest.raises(TypeError, match=r"^hidden_states must be .* got float64"):
        layer_norm_modulate(residual, shift, scale, eps=EPS)
    with pytest.raises(TypeError, match=r"^residual must be .* got float64"):
        gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps=EPS)


def test_differentiates_only_once():
    hidden_states, _, _, shift, scale = arguments()
    out = layer_norm_modulate(hidden_states.requires_grad_(), shift, scale, eps=EPS)
    (gradient,) = torch.autograd.grad(out.square().sum(), hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_layers_do_not_wait_for_the_gpu():
    with Readings() as readings:
        gradients(gated_residual_layer_norm_modulate, arguments())
    assert readings.count == 0


def test_a_block_of_the_dit_launches_two_kernels_forward_and_four_backward():
    state, *inputs = dit_arguments()
    norms = 2 * TINY.depth + 1  # the first block's first, then two for each block
    with watch() as seen:
        out = dit({name: parameter.requires_grad_() for name, parameter in state.items()}, *inputs, config=TINY)
        forward = Counter(seen.launches)
        out.sum().backward()
    assert forward == {"_forward_kernel": norms}
    assert seen.launches - forward == {"_backward_kernel": norms, "_sum_chunks_kernel": norms}


def test_the_dit_reads_values_only_to_check_its_labels():
    with Readings() as readings:
        dit(*dit_arguments(), config=TINY)
    assert readings.count == 1


def test_the_dit_rejects_float64():
    state, latents, *others = dit_arguments()
    state = {name: parameter.double() for name, parameter in state.items()}
    with pytest.raises(TypeError, match=r"^latents must be .* got float64"):
        dit(state, latents.double(), *others, config=TINY)
