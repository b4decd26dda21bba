"""Rotary tables against those of diffusers and transformers; the Triton kernels: what the suite does not ask of every one."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from gaugeblock.conformance.engine.triton.interpreter import watch
from gaugeblock.optimized.triton import launch
from gaugeblock.optimized.triton import rotary as kernels
from gaugeblock.reference.jax import rotary as jax_rotary
from gaugeblock.reference.torch import rotary as reference

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
FLUX = {"features": (16, 56, 56), "theta": 10000.0}
PAIRS = pytest.mark.parametrize("pairs", ["interleaved", "half-split"])
LAST_PLACE = 131071  # of 128k tokens


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def arguments(batch_size=2, num_heads=3, num_key_heads=2, num_tokens=19, head_size=12, dtype=torch.float32) -> list[torch.Tensor]:
    """query, key, their weights, cos and sin."""
    shapes = [(batch_size, heads, num_tokens, head_size) for heads in (num_heads, num_key_heads)]
    tensors = [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([*shapes, (head_size,), (head_size,)])]
    angles = draw(num_tokens, head_size // 2, seed=5)
    return [*tensors, angles.cos(), angles.sin()]


def gradients(tensors: list[torch.Tensor], pairs: str, wanted=range(4), used=(0, 1), module=kernels) -> list[torch.Tensor]:
    """Of the tensors at the places `wanted`, through the results at the places `used`; the results are their own cotangents."""
    leaves = [tensor.detach().requires_grad_(place in wanted) for place, tensor in enumerate(tensors)]
    with watch():
        every = module.qk_norm_rotary(*leaves, eps=1e-6, pairs=pairs)
        results = [every[place] for place in used]
        cotangents = [result.detach().clone() for result in results]
        found = torch.autograd.grad(results, [leaves[place] for place in wanted], cotangents, allow_unused=True)
    return list(found)


def flux_places() -> torch.Tensor:
    """Of 3 tokens of text, then of an image of 5 by 7."""
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    image = torch.stack([torch.zeros(35), rows.flatten(), columns.flatten()], 1)
    return torch.cat([torch.zeros(3, 3), image])


def assert_within_one_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Both rounded float64 numbers that differ in their last digits: nearly all are equal, the others neighbours."""
    assert ours.dtype == theirs.dtype == torch.float32
    differ = ours != theirs
    assert differ.float().mean() < 1e-3
    torch.testing.assert_close(ours, theirs, rtol=2**-23, atol=0)


@pytest.mark.parametrize("places", [flux_places(), torch.tensor([[0, 1, 2], [LAST_PLACE, 77777, 4099]])])
def test_the_table_of_three_axes_is_that_of_flux(places):
    ours = reference.rotary_table(places, **FLUX, dtype=torch.float32)
    theirs = FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(places)
    for table, expected in zip(ours, theirs, strict=True):
        assert table.shape == (len(places), 64)
        assert torch.equal(expected[:, 0::2], expected[:, 1::2])
        assert_within_one_rounding(table, expected[:, 0::2])


def test_the_table_of_one_axis_is_that_of_qwen3_but_for_its_rounding_of_angles():
    places = torch.tensor([0, 1, 17, 4095, 40959, LAST_PLACE])
    ours = reference.rotary_table(places[:, None], features=(128,), theta=1e6, dtype=torch.float64)
    config = Qwen3Config(head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    theirs = Qwen3RotaryEmbedding(config)(torch.empty(1), places[None])
    for table, expected in zip(ours, theirs, strict=True):
        assert torch.equal(expected[0, :, :64], expected[0, :, 64:])
        errors = (table - expected[0, :, :64]).abs()
        # frequencies and angles are rounded to float32, and the power's exponent: some units of 2^-24 of the angle
        assert (errors <= 2**-24 + 16 * 2**-24 * places[:, None]).all()
        assert errors[-1].max() > 1e-4, "what float64 is for"


def test_angles_are_rounded_once():
    places = torch.arange(LAST_PLACE - 50, LAST_PLACE, dtype=torch.int32)[:, None]
    exact = reference.rotary_table(places, features=(16,), theta=10000.0, dtype=torch.float64)
    angles = places.double() * 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cos, sin = reference.rotary_table(places, features=(16,), theta=10000.0, dtype=dtype)
        assert torch.equal(cos, exact[0].to(dtype)) and torch.equal(sin, exact[1].to(dtype))
    torch.testing.assert_close(torch.atan2(exact[1], exact[0]), torch.remainder(angles + torch.pi, 2 * torch.pi) - torch.pi)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tables_of_the_twins_agree(dtype):
    places = np.concatenate([flux_places().numpy(), np.array([[LAST_PLACE, 77777, 4099]], np.float32)])
    ours = reference.rotary_table(torch.from_numpy(places), **FLUX, dtype=getattr(torch, dtype))
    theirs = jax_rotary.rotary_table(jnp.asarray(places), **FLUX, dtype=dtype)
    with jax.enable_x64(True):
        for table, expected in zip(ours, theirs, strict=True):
            assert str(expected.dtype) == dtype
            torch.testing.assert_close(table.double(), torch.from_numpy(np.array(expected, np.float64)), rtol=2**-7, atol=1e-9)
            assert (table.double().numpy() != np.array(expected, np.float64)).mean() < 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": (16, 56)}, r"^places must be \[num_tokens, axes=2\], got \(38, 3\)"),
        ({"features": (16, 55, 56)}, r"^features must be even"),
        ({"features": (16, 0, 56)}, r"^features must be in 2\.\."),
        ({"features": [16, 56, 56]}, r"^features must be a tuple"),
        ({"theta": 0.0}, r"^theta must be positive"),
        ({"dtype": torch.int32}, r"^dtype must be .* got torch.int32"),
        ({"places": flux_places() > 0}, r"^places must be .* got bool"),
    ],
)
def test_bad_tables_are_told(changes, message):
    call = {"places": flux_places(), **FLUX, "dtype": torch.float32} | changes
    with pytest.raises((TypeError, ValueError), match=message):
        reference.rotary_table(call.pop("places"), **call)


@PAIRS
def test_a_quarter_turn_by_hand(pairs):
    heads = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    expected = {"interleaved": [-2.0, 1.0, -4.0, 3.0], "half-split": [-3.0, -4.0, 1.0, 2.0]}[pairs]
    assert reference.rotate(heads, cos, sin, pairs=pairs).flatten().tolist() == expected


@PAIRS
def test_scores_depend_on_the_distance_of_places_alone(pairs):
    """What rotary embeddings are for: all places may move by the same number."""
    query, key = draw(1, 1, 6, 16).double(), draw(1, 1, 6, 16, seed=1).double()
    scores = []
    for first in (0, 1000):
        places = torch.arange(first, first + 6)[:, None]
        cos, sin = reference.rotary_table(places, features=(16,), theta=10000.0, dtype=torch.float64)
        turned = [reference.rotate(each.cpu(), cos, sin, pairs=pairs) for each in (query, key)]
        scores.append(turned[0] @ turned[1].mT)
    torch.testing.assert_close(scores[0], scores[1])


@PAIRS
@pytest.mark.parametrize("head_size", [16, 40, 256])
def test_slices_of_one_product_are_read_in_place_and_results_lie_as_they_do(pairs, head_size):
    tokens, heads = 5, 3
    product = draw(2, tokens, 3 * heads * head_size)
    query, key, _ = (each.unflatten(-1, (heads, head_size)).transpose(1, 2) for each in product.chunk(3, -1))
    cos, sin = draw(tokens, head_size // 2, seed=1), draw(tokens, head_size // 2, seed=2)
    weights = draw(head_size, seed=3), draw(head_size, seed=4)
    with watch():
        ours = kernels.qk_norm_rotary(query, key, *weights, cos, sin, eps=1e-6, pairs=pairs)
    theirs = reference.qk_norm_rotary(query, key, *weights, cos, sin, eps=1e-6, pairs=pairs)
    for turned, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(turned, expected)
        assert turned.transpose(1, 2).is_contiguous(), "heads of a token lie side by side"


@PAIRS
def test_more_blocks_than_programs_add_up_the_weights_gradients(pairs, monkeypatch):
    tensors = arguments(num_heads=17, num_tokens=33, head_size=128)
    expected = gradients(tensors, pairs, module=reference)
    for programs in (1, 2, 5):
        monkeypatch.setattr(kernels, "PROGRAMS_PER_MULTIPROCESSOR", programs)
        for gradient, other in zip(gradients(tensors, pairs), expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", range(4))
def test_gradients_that_nobody_wants_are_not_computed(place):
    tensors = arguments()
    with watch() as seen:
        (alone,) = gradients(tensors, "half-split", wanted=[place])
    assert torch.equal(alone, gradients(tensors, "half-split")[place])
    sums = {"_sum_chunks_kernel": 1} if place >= 2 else {}
    assert seen.launches == {"_turn_kernel": 2, "_norm_backward_kernel": 1, **sums}


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_nobody_uses_has_no_part_in_the_gradients(used):
    tensors = arguments()
    ours, theirs = (gradients(tensors, "interleaved", used=[used], module=module) for module in (kernels, reference))
    for gradient, expected in zip(ours, theirs, strict=True):
        assert (gradient is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", ["batch_size", "num_heads", "num_tokens", "head_size"])
def test_any_size_may_be_0(size):
    tensors = arguments(**{size: 0})
    for gradient, tensor in zip(gradients(tensors, "interleaved")[:1], tensors, strict=False):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_bits_of_an_example_do_not_depend_on_its_batch_nor_on_the_run():
    tensors = arguments(batch_size=3)
    alone = gradients([*(each[:1] for each in tensors[:2]), *tensors[2:]], "half-split", wanted=(0, 1))
    for _ in range(2):
        for ours, expected in zip(gradients(tensors, "half-split", wanted=(0, 1)), alone, strict=True):
            assert torch.equal(ours[:1], expected)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_what_the_kernels_do_not_take_is_told(dtype):
    tensors = arguments()
    with pytest.raises(TypeError, match=r"^query must be .* got float64"):
        kernels.qk_norm_rotary(*(each.to(dtype) for each in tensors), eps=1e-6, pairs="half-split")
    with pytest.raises(TypeError, match=r"^cos must be float32, got torch.float64"):
        kernels.rotate(tensors[0], *(each.to(dtype) for each in tensors[4:]), pairs="half-split")


def test_differentiates_only_once():
    query, *others = arguments()
    with watch():
        out, _ = kernels.qk_norm_rotary(query.requires_grad_(), *others, eps=1e-6, pairs="half-split")
        (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
