"""Norms with parameters: what the conformance suite does not ask of every implementation."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gaugeblock.conformance.engine.triton.interpreter import watch
from gaugeblock.optimized.triton import group_norm_kernels, group_norms, launch, norms, row_norms
from gaugeblock.reference.jax import norms as jax_norms
from gaugeblock.reference.torch import norms as reference

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
EPS = 1e-6
ROWS = {"rms_norm": ("weight",), "layer_norm_affine": ("weight", "bias")}
GROUPS = ("group_norm", "group_norm_silu")
# At sizes of these tests float32 sums lose a digit of its seven, and a rounded result half a unit.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels run as the gate runs them."""
    with watch():
        yield


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def parameters_of(function: str, width: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    names = ROWS.get(function, ("weight", "bias"))
    return [1 + draw(width, seed=seed, dtype=dtype) / 2 for seed, _ in enumerate(names, 1)]


def images_of(batch_size=2, channels=6, height=5, width=7, dtype=torch.float32) -> list[torch.Tensor]:
    """images, weight and bias, for groups of 3 channels."""
    return [draw(batch_size, channels, height, width, seed=0, dtype=dtype), *parameters_of("group_norm", channels, dtype)]


def results(function: Callable, tensors: list[torch.Tensor], wanted=None, **options: Any) -> list[torch.Tensor]:
    """What it returns, and the gradients of the tensors at the places `wanted`, by default all, for one fixed cotangent."""
    wanted = range(len(tensors)) if wanted is None else wanted
    leaves = [tensor.detach().requires_grad_(place in wanted) for place, tensor in enumerate(tensors)]
    out = function(*leaves, **options)
    cotangent = torch.cos(torch.arange(out.numel(), device=DEVICE)).bfloat16()  # which every dtype holds
    return [
        out.detach(),
        *torch.autograd.grad(out, [leaves[place] for place in wanted], cotangent.reshape(out.shape).to(out.dtype)),
    ]


def assert_right(name: str, tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """The kernel's results are those of the reference in float64."""
    ours = results(getattr(norms, name), tensors, **options)
    exact = results(getattr(reference, name), [tensor.double() for tensor in tensors], **options)
    for result, expected in zip(ours, exact, strict=True):
        assert result.shape == expected.shape
        assert (result - expected).abs().max() <= RELATIVE[result.dtype] * expected.abs().max()
    return ours


class Operations(TorchDispatchMode):
    """Names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 5, 24), (2, 3, 2, 5, 24)])
def test_rows_may_have_any_leading_axes(name, shape):
    arrays = [draw(*shape, seed=0), *parameters_of(name, 24)]
    flat = [arrays[0].reshape(-1, 24), *arrays[1:]]
    expected = getattr(reference, name)(*flat, eps=EPS).reshape(shape)
    assert torch.equal(getattr(reference, name)(*arrays, eps=EPS), expected)
    assert torch.equal(getattr(norms, name)(*arrays, eps=EPS), getattr(norms, name)(*flat, eps=EPS).reshape(shape))
    of_jax = getattr(jax_norms, name)(*(jnp.asarray(each.cpu().numpy()) for each in arrays), eps=EPS)
    assert of_jax.shape == shape and np.allclose(of_jax, expected.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_heads_of_an_attention_are_normalized_where_they_lie(name):
    """Queries [B, A, S, F] are a view into one tensor of queries, keys and values, [B, S, 3, A, F]."""
    queries = draw(2, 7, 3, 4, 16, seed=0)[:, :, 0].transpose(1, 2)
    tensors = [queries, *parameters_of(name, 16)]
    assert_right(name, tensors, eps=EPS)
    with Operations() as seen:
        getattr(norms, name)(*tensors, eps=EPS)
    assert "empty" in " ".join(seen.names) and not {"clone", "copy_", "contiguous", "_to_copy"} & set(seen.names)


@pytest.mark.parametrize("name", ROWS)
def test_axes_that_no_three_strides_address_are_copied(name):
    rows = draw(2, 3, 4, 5, 8, seed=0)[:, ::2, ::2, ::2].transpose(0, 3)
    assert_right(name, [rows, *parameters_of(name, 8)], eps=EPS)


@pytest.mark.parametrize("name", ROWS)
def test_wide_rows_are_those_that_a_program_has_whole(name, monkeypatch):
    tensors = [draw(3, 700, seed=0), *parameters_of(name, 700)]
    whole = assert_right(name, tensors, eps=EPS)
    monkeypatch.setattr(row_norms, "WIDEST", 256)
    with watch() as seen:
        wide = assert_right(name, tensors, eps=EPS)
    assert seen.launches["_statistics_kernel"] == seen.launches["_row_sums_kernel"] == 1
    for one, other in zip(whole, wide, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_programs_go_through_more_blocks_than_one(dtype, monkeypatch):
    """100 rows of 100 columns are 7 blocks, of which each of 2 programs takes every second one."""
    monkeypatch.setattr(row_norms, "WARPS_PER_MULTIPROCESSOR", 4)
    assert_right(
        "layer_norm_affine", [draw(100, 100, seed=0, dtype=dtype), *parameters_of("layer_norm_affine", 100, dtype)], eps=EPS
    )


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", RELATIVE)
def test_a_group_that_is_cut_is_one_that_is_not(name, dtype, monkeypatch):
    """35 pixels of 3 channels: whole; parts of 16 pixels; and, 8 of them to a tile of 4, parts that are merged in two steps."""
    tensors, options = images_of(dtype=dtype), {"num_groups": 2, "eps": EPS}
    whole = assert_right(name, tensors, **options)
    monkeypatch.setattr(group_norms, "LARGEST_WHOLE", 8)
    for tile, part in ((16, 48), (4, 12)):
        monkeypatch.setattr(group_norms, "TILE", tile)
        monkeypatch.setattr(group_norms, "PART", part)
        with watch() as seen:
            cut = assert_right(name, tensors, **options)
        assert seen.launches == {
            "group_statistics_kernel": 1, "group_norm_kernel": 1, "group_gradients_kernel": 2, "_sum_chunks_kernel": 1
        }  # fmt: skip
        for one, other in zip(whole, cut, strict=True):
            torch.testing.assert_close(one, other)


def test_more_parts_than_are_merged_at_a_time(monkeypatch):
    for constant, value in (("LARGEST_WHOLE", 8), ("TILE", 2), ("PART", 2)):
        monkeypatch.setattr(group_norms, constant, value)
    tensors = [draw(1, 2, 17, 17, seed=0) + 3, *parameters_of("group_norm", 2)]
    assert group_norm_kernels.MERGED.value < 17 * 17 // 2
    assert_right("group_norm_silu", tensors, num_groups=2, eps=EPS)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("whole", [True, False])
def test_images_keep_their_order_in_memory(name, whole, monkeypatch):
    if not whole:
        for constant, value in (("LARGEST_WHOLE", 8), ("TILE", 16), ("PART", 32)):
            monkeypatch.setattr(group_norms, constant, value)
    images, *parameters = images_of()
    images = images.to(memory_format=torch.channels_last)
    out, gradient, *_ = assert_right(name, [images, *parameters], num_groups=2, eps=EPS)
    assert out.stride() == gradient.stride() == images.stride()


@pytest.mark.parametrize("name", GROUPS)
def test_rows_of_an_image_may_lie_apart(name):
    images, *parameters = images_of(height=9, width=11)
    assert_right(name, [images[:, :, 1:8:2, 2:9], *parameters], num_groups=3, eps=EPS)


@pytest.mark.parametrize("cut", [False, True])
def test_bits_of_an_example_depend_on_neither_batch_nor_run(cut, monkeypatch):
    if cut:
        monkeypatch.setattr(group_norms, "LARGEST_WHOLE", 64)
        monkeypatch.setattr(group_norms, "PART", 48)
        monkeypatch.setattr(group_norms, "TILE", 16)
    images, *parameters = images_of(batch_size=3)
    options = {"num_groups": 2, "eps": EPS}
    runs = [results(norms.group_norm_silu, [images, *parameters], **options) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    alone, of_alone, *_ = results(norms.group_norm_silu, [images[:1], *parameters], **options)
    assert torch.equal(runs[0][0][:1], alone) and torch.equal(runs[0][1][:1], of_alone)


@pytest.mark.parametrize("name", [*ROWS, *GROUPS])
@pytest.mark.parametrize("place", range(3))
def test_gradients_that_nobody_wants_are_not_computed(name, place):
    if name in ROWS:
        tensors, options = [draw(5, 20, seed=0), *parameters_of(name, 20)], {"eps": EPS}
    else:
        tensors, options = images_of(), {"num_groups": 2, "eps": EPS}
    if place >= len(tensors):
        pytest.skip("has no bias")
    function = getattr(norms, name)
    with watch() as seen:
        _, alone = results(function, tensors, wanted=[place], **options)
    assert torch.equal(alone, results(function, tensors, **options)[1 + place])
    kernels = ("_forward_kernel", "_backward_kernel") if name in ROWS else ("group_norm_kernel", "group_gradients_kernel")
    assert seen.launches == {**dict.fromkeys(kernels, 1), **({"_sum_chunks_kernel": 1} if place else {})}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_any_size_of_rows_may_be_0(name, shape):
    for result in results(getattr(norms, name), [draw(*shape, seed=0), *parameters_of(name, shape[-1])], eps=EPS)[1:]:
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"height": 0}, {"width": 0}])
def test_there_may_be_no_images_or_pixels(sizes):
    out, *gradients = results(norms.group_norm_silu, images_of(**sizes), num_groups=2, eps=EPS)
    assert out.numel() == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("module", [norms, reference])
def test_a_group_of_one_number_is_its_bias(module):
    images, weight, bias = images_of(height=1, width=1)
    out, of_images, of_weight, of_bias = results(module.group_norm, [images, weight, bias], num_groups=6, eps=EPS)
    assert torch.equal(out, bias[:, None, None].expand_as(out)) and not of_images.any() and not of_weight.any() and of_bias.all()


def test_offsets_may_pass_2_to_the_31():
    memory = torch.empty(2**31 + 2**10, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((3, 2, 5), (2**30, 5, 1)).copy_(draw(3, 2, 5, seed=0, dtype=torch.float16))
    tensors = parameters_of("layer_norm_affine", 5, torch.float16)
    ours, near = (results(norms.layer_norm_affine, [each, *tensors], eps=EPS) for each in (far, far.clone()))
    assert all(torch.equal(one, other) for one, other in zip(ours, near, strict=True))
    images = memory.as_strided((3, 4, 2, 3), (2**30, 6, 3, 1), 2**7).copy_(draw(3, 4, 2, 3, seed=1, dtype=torch.float16))
    tensors = parameters_of("group_norm", 4, torch.float16)
    near_images = images.contiguous()
    for ours, near in zip(
        results(norms.group_norm, [images, *tensors], num_groups=2, eps=EPS),
        results(norms.group_norm, [near_images, *tensors], num_groups=2, eps=EPS),
        strict=True,
    ):
        assert torch.equal(ours, near)


@pytest.mark.parametrize("name", [*ROWS, *GROUPS])
def test_the_host_reads_nothing_and_float64_is_rejected(name):
    if name in ROWS:
        tensors, options, first = [draw(5, 20, seed=0), *parameters_of(name, 20)], {"eps": EPS}, "hidden_states"
    else:
        tensors, options, first = images_of(), {"num_groups": 2, "eps": EPS}, "images"
    with Operations() as seen:
        results(getattr(norms, name), tensors, **options)
    assert not {"_local_scalar_dense", "nonzero", "equal", "masked_select"} & set(seen.names)
    with pytest.raises(TypeError, match=rf"^{first} must be .* got float64"):
        getattr(norms, name)(*(tensor.double() for tensor in tensors), **options)


@pytest.mark.parametrize("name", [*ROWS, *GROUPS])
def test_kernels_differentiate_only_once(name):
    grouped = name in GROUPS
    tensors = images_of() if grouped else [draw(5, 20, seed=0), *parameters_of(name, 20)]
    tensors[0].requires_grad_()
    out = getattr(norms, name)(*tensors, **({"num_groups": 2, "eps": EPS} if grouped else {"eps": EPS}))
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("name", "tensors", "options", "message"),
    [
        ("rms_norm", [torch.ones(()), torch.ones(1)], {}, r"^hidden_states must be \[\.\.\., hidden_size\], got \(\)"),
        ("rms_norm", [torch.ones(2, 3), torch.ones(4)], {}, r"^weight must be \[hidden_size=3\], got \(4,\)"),
        ("layer_norm_affine", [torch.ones(2, 3), *[torch.ones(3)] * 2], {"eps": -1.0}, r"^eps must be positive, got -1\.0"),
        (
            "group_norm",
            [torch.ones(1, 6, 2, 2), *[torch.ones(6)] * 2],
            {"num_groups": 4},
            r"^num_groups must divide channels=6, got 4",
        ),
        (
            "group_norm_silu",
            [torch.ones(1, 6, 2), *[torch.ones(6)] * 2],
            {"num_groups": 2},
            r"^images must be \[batch_size, channels",
        ),
    ],
)
@pytest.mark.parametrize("module", [norms, reference])
def test_a_bad_call_is_told(module, name, tensors, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(module, name)(*tensors, **{"eps": EPS} | options)
